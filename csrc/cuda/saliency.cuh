// saliency on CUDA: three kernels on one stream, means of the images, distances of their tokens, weights. Sums are float32; what
// is summed and in which order depends on the image alone.
#pragma once
#include "../common/device.cuh"

namespace crop {
namespace {

constexpr int kMeanThreads = 256, kDistanceThreads = 256, kWeightThreads = 1024;
constexpr int kMeanPieces = 8, kMeanRows = kMeanThreads / kMeanPieces;  // a block's 16-byte pieces along a row, and its rows
constexpr int kMeanAhead = 4, kDistanceAhead = 2;                       // pieces of a thread that are on their way at once

// Row of the n-th token of an image, -1 = none. On the device nobody can check: what does not exist is filler.
DEV int64_t token_row(const SaliencyParams& p, int64_t image, int64_t n) {
    const int64_t row = p.index[image * p.num_places + n];
    return row < p.num_tokens ? row : -1;
}
template <class T>
DEV const T* token_at(const SaliencyParams& p, int64_t row) {
    return static_cast<const T*>(p.tokens) + row * p.token_stride;
}

// mean[i, :] = mean of the tokens of image i; weight = 1 everywhere.
//
// A block owns 8 pieces of the mean of one image: thread (r, c) adds piece c of the tokens r, r + 32, ..., then one thread
// per channel adds the 32 sums in order. Bytes: every token is read once. Deterministic: one writer, one order.
template <class T>
GLOBAL(kMeanThreads, 4)
saliency_mean_kernel(SaliencyParams p, unsigned slabs, bool aligned) {
    constexpr int kCount = Piece<T>::kCount, kChannels = kMeanPieces * kCount;
    SHARED(float, part, [kMeanRows * kChannels]);
    SHARED(int, members, [kMeanRows]);
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    for (int64_t n = static_cast<int64_t>(blockIdx.x) * kMeanThreads + threadIdx.x; n < p.num_tokens;
         n += static_cast<int64_t>(gridDim.x) * kMeanThreads)
        p.weight[n] = 1.0f;
    const int64_t image = blockIdx.x / slabs, slab = static_cast<int64_t>(blockIdx.x % slabs) * kChannels;
    const int row = threadIdx.x / kMeanPieces, column = threadIdx.x % kMeanPieces * kCount;
    const int64_t left = p.dim - slab - column;
    float sum[kCount] = {};
    int count = 0;
    for (int64_t first = row; first < p.num_places; first += kMeanRows * kMeanAhead) {
        Piece<T> held[kMeanAhead];  // zeros
        UNROLL
        for (int a = 0; a < kMeanAhead; ++a) {
            const int64_t n = first + a * kMeanRows, at = n < p.num_places ? token_row(p, image, n) : -1;
            if (at < 0) continue;
            ++count;
            if (left > 0) held[a] = load_piece(token_at<T>(p, at) + slab + column, left, aligned);
        }
        UNROLL
        for (int a = 0; a < kMeanAhead; ++a) {
            UNROLL
            for (int e = 0; e < kCount; ++e) sum[e] = __fadd_rn(sum[e], held[a].get(e));
        }
    }
    UNROLL
    for (int e = 0; e < kCount; ++e) part[row * kChannels + column + e] = sum[e];
    if (column == 0) members[row] = count;
    __syncthreads();
    const int channel = threadIdx.x;
    if (channel >= kChannels || slab + channel >= p.dim) return;
    float total = 0;
    int tokens = 0;
    for (int r = 0; r < kMeanRows; ++r) total = __fadd_rn(total, part[r * kChannels + channel]), tokens += members[r];
    p.mean[image * p.dim + slab + channel] = __fdiv_rn(total, static_cast<float>(max(tokens, 1)));
}

// weight[row] = 1 - cosine of a token and the mean of its image.
//
// A warp owns a token: lane l takes the pieces l, l + 32, ... and the lanes' sums meet in a fixed tree. Bytes: every token is
// read once more, the mean comes from L1. Deterministic: one writer, one order.
template <class T>
GLOBAL(kDistanceThreads, 4)
saliency_distance_kernel(SaliencyParams p, bool aligned) {
    constexpr int kCount = Piece<T>::kCount, kStep = 32 * kCount;
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const int64_t item = static_cast<int64_t>(blockIdx.x) * (kDistanceThreads / 32) + threadIdx.x / 32;
    if (item >= p.num_images * p.num_places) return;
    const int64_t image = item / p.num_places, row = token_row(p, image, item % p.num_places);
    if (row < 0) return;
    const T* token = token_at<T>(p, row);
    const float* mean = p.mean + image * p.dim;
    const bool mean_aligned = aligned && p.dim % 4 == 0;
    float dot = 0, square = 0, length = 0;
    for (int64_t first = threadIdx.x % 32 * kCount; first < p.dim; first += kDistanceAhead * kStep) {
        Piece<T> x[kDistanceAhead];  // zeros
        Piece<float> y[kDistanceAhead][kCount / 4];
        UNROLL
        for (int a = 0; a < kDistanceAhead; ++a) {
            const int64_t channel = first + a * kStep, left = p.dim - channel;
            if (left <= 0) continue;
            x[a] = load_piece(token + channel, left, aligned);
            UNROLL
            for (int q = 0; q < kCount / 4; ++q) y[a][q] = load_piece(mean + channel + 4 * q, left - 4 * q, mean_aligned);
        }
        UNROLL
        for (int a = 0; a < kDistanceAhead; ++a) {
            UNROLL
            for (int e = 0; e < kCount; ++e) {
                const float value = x[a].get(e), middle = y[a][e / 4].get(e % 4);
                dot = fmaf(value, middle, dot), square = fmaf(value, value, square), length = fmaf(middle, middle, length);
            }
        }
    }
    UNROLL
    for (int step = 16; step > 0; step /= 2) {
        dot += __shfl_xor_sync(kWarp, dot, step);
        square += __shfl_xor_sync(kWarp, square, step);
        length += __shfl_xor_sync(kWarp, length, step);
    }
    const float norm = __fsqrt_rn(square) * __fsqrt_rn(length);
    if (threadIdx.x % 32 == 0) p.weight[row] = 1.0f - __fdiv_rn(dot, norm < 1e-12f ? 1e-12f : norm);
}

// Sum over a block of kWeightThreads, in a fixed tree; every thread gets it.
template <class V>
DEV V block_sum(V value, V* part) {
    UNROLL
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kWarp, value, step);
    __syncthreads();  // `part` was read
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
    __syncthreads();
    value = part[threadIdx.x % 32];
    UNROLL
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kWarp, value, step);
    return value;
}

// weight[row] = exp(sharpness * clamp((distance - middle) / (spread + flat))), 1 for what is alone.
//
// A block owns an image and passes over its distances three times: middle, spread, weights. Deterministic: one writer, one order.
GLOBAL(kWeightThreads, 1)
saliency_weight_kernel(SaliencyParams p) {
    SHARED(float, part, [32]);
    SHARED(int, members, [32]);
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const int64_t image = blockIdx.x;
    float sum = 0;
    int count = 0;
    for (int64_t n = threadIdx.x; n < p.num_places; n += kWeightThreads) {
        const int64_t row = token_row(p, image, n);
        if (row >= 0) sum = __fadd_rn(sum, p.weight[row]), ++count;
    }
    const float tokens = static_cast<float>(max(block_sum(count, members), 1));
    const float middle = __fdiv_rn(block_sum(sum, part), tokens);
    float square = 0;
    for (int64_t n = threadIdx.x; n < p.num_places; n += kWeightThreads) {
        const int64_t row = token_row(p, image, n);
        const float off = row >= 0 ? p.weight[row] - middle : 0.0f;
        square = fmaf(off, off, square);
    }
    const float spread = __fsqrt_rn(__fdiv_rn(block_sum(square, part), tokens)) + p.flat;
    for (int64_t n = threadIdx.x; n < p.num_places; n += kWeightThreads) {
        const int64_t row = token_row(p, image, n);
        if (row < 0) continue;
        float z = __fdiv_rn(p.weight[row] - middle, spread);
        z = z < -p.farthest ? -p.farthest : z > p.farthest ? p.farthest : z;  // NaN stays
        p.weight[row] = p.alone && p.alone[row] ? 1.0f : expf(p.sharpness * z);
    }
}

}  // namespace
}  // namespace crop
