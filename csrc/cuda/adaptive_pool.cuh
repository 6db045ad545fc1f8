// adaptive_pool on CUDA. Forward: a thread owns one 16-byte piece of one pooled token. Backward: a pure gather, a thread owns
// one piece of one token's gradient and reads the gradient of its cell. Everything is written once; sums run in stored order,
// in float32, with true division (a rounded reciprocal is off by one ulp for some counts).
#pragma once
#include "../common/device.cuh"

namespace crop {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kAhead = 4;  // members of a cell, or rows of the gradient, whose pieces are on their way at once

// Rows of `pieces` pieces spread over blocks: `lanes` threads along a row, `rows` rows in a block, `chunks` blocks along a row.
struct PoolGrid {
    int lanes, rows;
    unsigned chunks;
};

// A thread owns one piece of `row`, `row + step`, ... up to `kRows` rows.
struct PoolSlot {
    int64_t row, channel;
    bool exists;
};
template <int kRows>
DEV PoolSlot pool_slot(const PoolGrid& grid, int64_t num_rows, int64_t dim, int count) {
    const int in_block = threadIdx.x / grid.lanes, lane = threadIdx.x % grid.lanes;
    const int64_t row = static_cast<int64_t>(blockIdx.x / grid.chunks) * grid.rows * kRows + in_block;
    const int64_t channel = (static_cast<int64_t>(blockIdx.x % grid.chunks) * grid.lanes + lane) * count;
    return {row, channel, in_block < grid.rows && row < num_rows && channel < dim};
}

// out[c] = mean, weighted mean or maximum of the tokens members[offsets[c] : offsets[c + 1]], accumulated in stored order.
// One member is copied bit for bit; no member gives zeros. saved: sum of weights, or winning token per channel (-1: none).
//
// A thread owns one piece of one pooled token and walks the members of the cell, four loads ahead of the sum.
// Bytes: every member row is read once (from memory), every pooled row written once. Deterministic: one writer, one order.
template <class T, int kMode>
GLOBAL(kPoolThreads, kMode == kMean ? 4 : 3)
pool_kernel(PoolParams p, PoolGrid grid, bool aligned) {
    constexpr int kCount = Piece<T>::kCount;
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const PoolSlot slot = pool_slot<1>(grid, p.num_out, p.dim, kCount);
    if (!slot.exists) return;
    const int64_t left = p.dim - slot.channel;
    const int first = max(p.offsets[slot.row], 0);
    const int stop = static_cast<int>(min(static_cast<int64_t>(max(p.offsets[slot.row + 1], 0)), p.num_members));
    const int count = max(stop - first, 0);
    auto token_of = [&](int i) {  // clamped: a plan on the device cannot be checked
        return min(max(static_cast<int64_t>(p.members[first + i]), static_cast<int64_t>(0)), p.num_tokens - 1);
    };
    auto piece_of = [&](int64_t token) {
        const T* from = static_cast<const T*>(p.tokens) + token * p.token_stride + slot.channel;
        return load_piece(from, left, aligned, ptx::load_once);
    };
    float sum[kCount] = {}, weighted[kCount] = {}, weights = 0;  // maximum: `sum` holds the best so far
    int winner[kCount];
    UNROLL
    for (int e = 0; e < kCount; ++e) winner[e] = -1;
    Piece<T> only;
    for (int i0 = 0; i0 < count; i0 += kAhead) {
        Piece<T> piece[kAhead];
        int64_t token[kAhead];
        float weight[kAhead];
        UNROLL
        for (int a = 0; a < kAhead; ++a) {
            if (i0 + a >= count) continue;
            token[a] = token_of(i0 + a);
            piece[a] = piece_of(token[a]);
            if (kMode == kWeighted) weight[a] = p.weight[token[a]];
        }
        UNROLL
        for (int a = 0; a < kAhead; ++a) {
            if (i0 + a >= count) continue;
            const bool start = i0 + a == 0;  // assigned, not added to zero: keeps -0
            if (start) only = piece[a];
            if (kMode == kWeighted) weights = start ? weight[a] : __fadd_rn(weights, weight[a]);
            UNROLL
            for (int e = 0; e < kCount; ++e) {
                const float x = piece[a].get(e);
                if (kMode == kMax) {  // larger wins; a NaN wins against a number; the first of equals stays
                    const bool wins = start || x > sum[e] || (x != x && sum[e] == sum[e]);
                    if (wins) sum[e] = x, winner[e] = static_cast<int>(token[a]);
                } else {
                    sum[e] = start ? x : __fadd_rn(sum[e], x);
                }
                if (kMode == kWeighted) {
                    const float product = __fmul_rn(weight[a], x);
                    weighted[e] = start ? product : __fadd_rn(weighted[e], product);
                }
            }
        }
    }
    Piece<T> result = only;  // zeros of a cell without members, or the only member
    if (count > 1) {
        const bool by_weight = kMode == kWeighted && weights != 0;
        UNROLL
        for (int e = 0; e < kCount; ++e) {
            if (kMode == kMax) result.set(e, sum[e]);
            else result.set(e, by_weight ? __fdiv_rn(weighted[e], weights) : __fdiv_rn(sum[e], static_cast<float>(count)));
        }
    }
    store_piece(static_cast<T*>(p.out) + slot.row * p.dim + slot.channel, result, left, aligned);
    if (!p.saved) return;
    if (kMode == kWeighted && slot.channel == 0) static_cast<float*>(p.saved)[slot.row] = weights;
    if (kMode == kMax) {
        Piece<int> numbers;
        UNROLL
        for (int e = 0; e < kCount; ++e) {
            numbers.word[e % 4] = static_cast<uint32_t>(winner[e]);
            int* saved = static_cast<int*>(p.saved) + slot.row * p.dim + slot.channel + e - 3;
            if (e % 4 == 3) store_piece(saved, numbers, left - (e - 3), aligned);
        }
    }
}

// The cell of a token; -1 if it is in none.
DEV int64_t cell_of(const PoolBackwardParams& p, int64_t token) {
    const int64_t cell = p.inverse[token];
    return cell < p.num_out ? cell : -1;
}

// Its number of members; whatever the offsets hold, without overflow.
DEV int count_of(const PoolBackwardParams& p, int64_t cell) {
    return static_cast<int>(static_cast<unsigned>(p.offsets[cell + 1]) - static_cast<unsigned>(p.offsets[cell]));
}

// grad_tokens[i] = grad[c] / count (mean), or grad[c] where i won the channel (max), with c = inverse[i]; 0 in no cell.
//
// A thread owns one piece of the gradients of four tokens, all on their way at once. Bytes: one row read (cells that are
// shared: from cache), one written per token. Deterministic: a gather with one writer.
template <class T, int kMode>
GLOBAL(kPoolThreads, 3)
pool_backward_kernel(PoolBackwardParams p, PoolGrid grid, bool aligned) {
    constexpr int kCount = Piece<T>::kCount;
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const PoolSlot slot = pool_slot<kAhead>(grid, p.num_tokens, p.dim, kCount);
    if (!slot.exists) return;
    const int64_t left = p.dim - slot.channel;
    int64_t cell[kAhead];
    Piece<T> result[kAhead];
    int members[kAhead];
    UNROLL
    for (int a = 0; a < kAhead; ++a) {
        const int64_t token = slot.row + a * grid.rows;
        cell[a] = token < p.num_tokens ? cell_of(p, token) : -1;
    }
    UNROLL
    for (int a = 0; a < kAhead; ++a) {
        members[a] = 1;
        if (cell[a] < 0) continue;
        result[a] = load_piece(static_cast<const T*>(p.grad) + cell[a] * p.dim + slot.channel, left, aligned);
        if (kMode == kMean) members[a] = count_of(p, cell[a]);
    }
    UNROLL
    for (int a = 0; a < kAhead; ++a) {
        const int64_t token = slot.row + a * grid.rows;
        if (token >= p.num_tokens) return;
        Piece<int> winner;
        UNROLL
        for (int e = 0; e < kCount; ++e) {
            if (kMode == kMax && cell[a] >= 0) {
                const int* saved = static_cast<const int*>(p.saved) + cell[a] * p.dim + slot.channel + e;
                if (e % 4 == 0) winner = load_piece(saved, left - e, aligned);
                if (winner.word[e % 4] != static_cast<uint32_t>(token)) result[a].set_bits(e, 0);
            }
            if (kMode == kMean && members[a] != 1)
                result[a].set(e, __fdiv_rn(result[a].get(e), static_cast<float>(members[a])));
        }
        store_piece(static_cast<T*>(p.grad_tokens) + token * p.dim + slot.channel, result[a], left, aligned);
    }
}

// Weighted: grad_tokens[i] = grad[c] * w_i / W and grad_weight[i] = <grad[c], x_i - out[c]> / W with W = saved[c]; where
// W = 0 or the cell has one member grad[c] / count and 0; 0 in no cell.
//
// A warp owns a token: lane l takes the pieces l, l + 32, ... and the lanes' sums meet in a fixed tree.
// Bytes: three rows read, one written per token. Deterministic: one writer, a fixed order of the sum.
template <class T>
GLOBAL(kPoolThreads, 3)
pool_weighted_backward_kernel(PoolBackwardParams p, bool aligned) {
    constexpr int kCount = Piece<T>::kCount;
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const int64_t token = static_cast<int64_t>(blockIdx.x) * (kPoolThreads / 32) + threadIdx.x / 32;
    if (token >= p.num_tokens) return;
    const int64_t lane = threadIdx.x % 32, cell = cell_of(p, token);
    const int count = cell < 0 ? 1 : count_of(p, cell);
    const float sum = cell < 0 ? 0.0f : static_cast<const float*>(p.saved)[cell], weight = p.weight[token];
    const bool by_weight = count != 1 && sum != 0;
    float dot = 0;
    for (int64_t channel = lane * kCount; channel < p.dim; channel += 32 * kCount) {
        const int64_t left = p.dim - channel;
        Piece<T> result;
        if (cell >= 0) {
            const int64_t at = cell * p.dim + channel;
            const Piece<T> grad = load_piece(static_cast<const T*>(p.grad) + at, left, aligned);
            result = grad;
            if (by_weight) {
                const T* tokens = static_cast<const T*>(p.tokens) + token * p.token_stride + channel;
                const Piece<T> x = load_piece(tokens, left, aligned);
                const Piece<T> y = load_piece(static_cast<const T*>(p.out) + at, left, aligned);
                UNROLL
                for (int e = 0; e < kCount; ++e) {
                    result.set(e, __fdiv_rn(__fmul_rn(grad.get(e), weight), sum));
                    dot = fmaf(grad.get(e), __fsub_rn(x.get(e), y.get(e)), dot);
                }
            } else if (count != 1) {
                UNROLL
                for (int e = 0; e < kCount; ++e) result.set(e, __fdiv_rn(grad.get(e), static_cast<float>(count)));
            }
        }
        store_piece(static_cast<T*>(p.grad_tokens) + token * p.dim + channel, result, left, aligned);
    }
    UNROLL
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(kWarp, dot, step);
    if (lane == 0) p.grad_weight[token] = by_weight ? __fdiv_rn(dot, sum) : 0.0f;
}

}  // namespace
}  // namespace crop
