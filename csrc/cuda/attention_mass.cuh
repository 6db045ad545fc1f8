// attention_mass on CUDA: what the kernels for half types (attention_mass_mma.cuh) and for float32
// (attention_mass_fp32.cuh) share.
//
// "Column" = (row, query head of the KV head's group): column = row * group + head. Rows are counted from the first row of
// the sample that sees a key. A logit is a sum over the channels in a fixed order, and the mass of a key one
// sum over the columns in an order that the sample's own sizes decide, in every variant: the bits depend neither on the
// variant, the alignment, the batch neighbours nor on padding rows (they add +0).
//
// Logits, their log-sum-exp and everything between are in units of log 2: exp is one instruction.
#pragma once
#include "../common/device.cuh"

namespace crop {
namespace {

// Keys of a partial log-sum-exp, counted from the sample's first visible key. The kernels know it as a constant.
inline int64_t split_keys(int64_t head_dim) { return head_dim > 128 ? 128 : 256; }
constexpr int kCombineThreads = 128;
constexpr float kHuge = 3.402823466e38f;
constexpr float kLog2E = 1.4426950408889634f;

// Rows [first, first + count) of a sample hold all its counted rows, which see keys of [start, stop).
struct Rows {
    int first, count, counted, start, stop;
};

DEV int clamp_key(int64_t key, int64_t num_keys) {
    return static_cast<int>(key < 0 ? 0 : key > num_keys ? num_keys : key);
}

DEV int first_key(const AttentionMassParams& p, int64_t b) {
    return p.visible_start ? clamp_key(p.visible_start[b], p.num_keys) : 0;
}

// End of the keys row `row` sees; 0 for a padding row.
DEV int row_end(const AttentionMassParams& p, int64_t b, int64_t row, int start) {
    const int end = clamp_key(p.visible_len ? p.visible_len[b * p.num_rows + row] : p.num_keys, p.num_keys);
    return end > start ? end : 0;
}

// Called by the whole block; `shared` holds 4 ints. Integers only, so the order of the atomics does not matter.
template <int kThreads>
DEV Rows find_rows(const AttentionMassParams& p, int64_t b, int* shared) {
    if (threadIdx.x < 4) shared[threadIdx.x] = threadIdx.x == 0 ? 0x7fffffff : 0;
    __syncthreads();
    const int start = first_key(p, b);
    int first = 0x7fffffff, last = 0, counted = 0, stop = 0;
    ROLLED
    for (int row = threadIdx.x; row < p.num_rows; row += kThreads) {
        const int end = row_end(p, b, row, start);
        if (end == 0) continue;
        first = min(first, row), last = row + 1;
        counted += 1, stop = max(stop, end);
    }
    first = __reduce_min_sync(kWarp, first), last = __reduce_max_sync(kWarp, last);
    counted = __reduce_add_sync(kWarp, counted), stop = __reduce_max_sync(kWarp, stop);
    if (threadIdx.x % 32 == 0 && counted) {
        atomicMin(shared, first), atomicMax(shared + 1, last);
        atomicAdd(shared + 2, counted), atomicMax(shared + 3, stop);
    }
    __syncthreads();
    if (shared[2] == 0) return {0, 0, 0, start, start};
    return {shared[0], shared[1] - shared[0], shared[2], start, shared[3]};
}

// What is subtracted from a logit: a row whose lse is infinite gives 0 to finite logits and NaN to +inf.
DEV float shift_of(float lse, float unit) { return lse == -kInf ? kInf : __fmul_rn(lse, unit); }

// The mean over counted rows and heads.
DEV float mean_of(float total, const Rows& rows, int64_t num_heads) {
    return total / static_cast<float>(max(static_cast<int64_t>(1), rows.counted * num_heads));
}

// --- log-sum-exp of the rows, where the caller has none ---------------------------------------------------------------

// Running maximum and sum of 2^(x - maximum). A NaN ends up in the sum.
struct Partial {
    float high, sum;
};

// -inf (nothing seen yet) and +inf would turn differences into NaN.
DEV float finite(float high) { return high == -kInf ? 0.0f : high == kInf ? kHuge : high; }

DEV Partial merge(Partial a, Partial b) {
    const float high = fmaxf(a.high, b.high), shift = finite(high);
    const float left = __fmul_rn(a.sum, ptx::ex2(a.high - shift)), right = __fmul_rn(b.sum, ptx::ex2(b.high - shift));
    return {high, __fadd_rn(left, right)};
}

// A block of the partial kernels owns (sample, KV head, split), in this order. Their result:
// partial[b, kv, split, row * group + head] = (max, sum 2^(x - max)) over the visible keys of the split.
struct Split {
    int64_t b;
    unsigned head;  // b * num_kv_heads + kv
    int kv, number;
};
DEV Split split_of(const AttentionMassParams& p, int splits) {
    const unsigned head = blockIdx.x / static_cast<unsigned>(splits), heads = static_cast<unsigned>(p.num_kv_heads);
    return {head / heads, head, static_cast<int>(head % heads), static_cast<int>(blockIdx.x % static_cast<unsigned>(splits))};
}
DEV Partial* partials_of(const AttentionMassParams& p, Partial* partial, const Split& split, int splits) {
    return partial + (static_cast<int64_t>(split.head) * splits + split.number) * p.num_rows * (p.num_heads / p.num_kv_heads);
}

// lse[b, h, r] = log2 of the merged partials of the row's splits in ascending order; +inf for a padding row. A thread owns
// one column. Splits behind the row's last visible key are not read, so the result does not depend on num_keys.
GLOBAL(kCombineThreads, 8)
lse_combine_kernel(AttentionMassParams p, const Partial* partial, int64_t split_keys, int splits, float* lse) {
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const int64_t group = p.num_heads / p.num_kv_heads, columns = p.num_rows * group;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
    if (item >= p.batch * p.num_kv_heads * columns) return;
    const int64_t head = item / columns, column = item % columns, b = head / p.num_kv_heads;
    const int64_t row = column / group, query_head = head % p.num_kv_heads * group + column % group;
    const int start = first_key(p, b), end = row_end(p, b, row, start);
    Partial all = {-kInf, 0.0f};
    for (int split = 0; start + split * split_keys < end; ++split)
        all = merge(all, partial[(head * splits + split) * columns + column]);
    lse[(b * p.num_heads + query_head) * p.num_rows + row] = end ? finite(all.high) + log2f(all.sum) : kInf;
}

}  // namespace
}  // namespace crop
