// select on CUDA: radix selection on order-preserving integer keys, then one ordered scan; the algorithm of select_cpu.cpp.
//
// Classes (priority, filler) are settled before the radix: what is certainly taken gets the key 2^32 - 1, what is certainly
// not taken 0; no float has these keys. The rest competes by value. Digits are taken below the range of the competing keys,
// because attention masses share their leading bits; at most three rounds of 11 bits. Nothing is ever stashed, so no list
// can overflow.
#pragma once
#include "common.cuh"

namespace crop {
namespace {

constexpr int kSelectThreads = 1024;
constexpr int kWarps = kSelectThreads / 32;
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kClasses = 128;                       // priorities 0..127
constexpr uint32_t kAlways = 0xffffffffu, kNever = 0;
constexpr int kMaxTokens = 0x7fff0000;              // so that the end of a slab is an int
constexpr int kBudgets = 512;                       // images of a launch: their budgets are a kernel parameter

struct Budgets {
    int keep[kBudgets];
};

// Order-preserving: unsigned comparison of keys = comparison of floats; -0 as +0, NaN as -inf.
DEV uint32_t order_key(float x) {
    if (x != x) x = -kInf;
    const uint32_t raw = x == 0.0f ? 0u : __float_as_uint(x);
    return raw & 0x80000000u ? ~raw : raw | 0x80000000u;
}

// The keys of one image. A thread has tokens n = i * 1024 + thread. Up to kItems * 1024 tokens their keys stay in registers
// (kResident); longer rows are read again, kItems * 1024 tokens ("slab") at a time, whenever they are visited.
template <int kItems, bool kResident>
struct Candidates {
    static constexpr int kSlab = kItems * kSelectThreads;
    const float *score, *weight;
    const int8_t* priority;
    const int64_t* index;
    int count;
    int boundary;  // the class that competes
    uint32_t key[kItems];

    DEV bool is_filler(int n) const { return index && index[n] < 0; }

    DEV uint32_t make(int n) const {
        if (is_filler(n)) return kNever;
        const int rank = priority ? priority[n] : 0;
        if (rank != boundary) return rank > boundary ? kAlways : kNever;
        return order_key(weight ? __fmul_rn(score[n], weight[n]) : score[n]);
    }
    DEV void load(int slab) {
        UNROLL
        for (int i = 0; i < kItems; ++i) {
            const int n = slab + i * kSelectThreads + static_cast<int>(threadIdx.x);
            key[i] = n < count ? make(n) : kNever;
        }
    }
    // f(key) for every token and then for padding (kNever); all threads make the same number of calls.
    template <class F>
    DEV void each(F f) {
        for (int slab = 0; slab < count; slab += kSlab) {
            if (!kResident) load(slab);
            UNROLL
            for (int i = 0; i < kItems; ++i) f(key[i]);
        }
    }
};

// counts[digit] += 1 for every lane with a digit >= 0; equal digits of a warp are added at once, since ties concentrate.
DEV void count_digit(int* counts, int digit) {
    const unsigned same = __match_any_sync(kWarp, digit);
    if (digit >= 0 && threadIdx.x % 32 == static_cast<unsigned>(__ffs(same)) - 1) atomicAdd(counts + digit, __popc(same));
}

// What the radix has found: keys above `low - 1` (equal = 0) or above `low` and the first `equal` of key `low`.
struct Threshold {
    uint32_t key;  // larger keys are taken
    int equal;     // and the first so many equal ones
};

// kept[i, :] = the budget[i] best tokens in ascending order, then -1. Best first: priority descending, score * weight
// descending, n ascending.
//
// A block owns one image. Passes over the scores: one to count classes (with priorities), one for the range of the
// competing class, up to three histograms, one to write; short rows are read from memory once or twice.
// Deterministic: counts are integers, and positions follow from ordered scans, not from atomics.
template <int kItems, bool kResident>
GLOBAL(kSelectThreads, 1)
select_kernel(SelectParams p, int64_t first_image, Budgets budgets) {
    SHARED(int, histogram, [kDigits]);
    SHARED(uint32_t, warp_count, [kItems * kWarps]);  // (item, warp): taken in the low half, equal in the high half
    SHARED(uint32_t, item_count, [kItems]);
    SHARED(int, warp_sum, [kWarps]);
    SHARED(uint32_t, warp_low, [kWarps]);
    SHARED(uint32_t, warp_high, [kWarps]);
    SHARED(int, chosen, [3]);  // class or digit, what precedes it or is still needed, its count

    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int64_t image = first_image + blockIdx.x, at = image * p.num_tokens;
    Candidates<kItems, kResident> row;
    row.score = p.score + at, row.weight = p.weight ? p.weight + at : nullptr;
    row.priority = p.priority ? p.priority + at : nullptr, row.index = p.index ? p.index + at : nullptr;
    row.count = static_cast<int>(p.num_tokens), row.boundary = 0;
    const int budget = budgets.keep[blockIdx.x];
    int need = budget;

    // The boundary class: higher ones are all taken, lower ones not at all.
    if (p.priority) {
        if (thread < kClasses) histogram[thread] = 0;
        __syncthreads();
        for (int n0 = 0; n0 < row.count; n0 += kSelectThreads) {
            const int n = n0 + thread;
            count_digit(histogram, n < row.count && !row.is_filler(n) ? max(static_cast<int>(row.priority[n]), -1) : -1);
        }
        __syncthreads();
        if (warp == 0) {  // four classes per lane, best first
            int members[4], sum = 0;
            UNROLL
            for (int i = 0; i < 4; ++i) members[i] = histogram[kClasses - 1 - lane * 4 - i], sum += members[i];
            int before = warp_scan(sum) - sum, found = 0, taken = 0;
            UNROLL
            for (int i = 0; i < 4; ++i) {
                const int rank = kClasses - 1 - lane * 4 - i;
                const bool last = before + members[i] > need || rank == 0;
                if (before <= need && last && found == 0) found = 1 + rank, taken = before;
                before += members[i];
            }
            // Of the lanes that found a class, the first is right: a later one has more tokens before it.
            const int first = __ffs(__ballot_sync(kWarp, found > 0)) - 1;
            if (lane == first) chosen[0] = found - 1, chosen[1] = taken;
        }
        __syncthreads();
        row.boundary = chosen[0];
        need -= chosen[1];
    }

    // Range and number of the competing keys.
    uint32_t low = kAlways, high = kNever;
    int competing = 0;
    if (kResident) row.load(0);
    row.each([&](uint32_t key) {
        if (key == kNever || key == kAlways) return;
        low = min(low, key), high = max(high, key), ++competing;
    });
    low = __reduce_min_sync(kWarp, low), high = __reduce_max_sync(kWarp, high);
    competing = __reduce_add_sync(kWarp, competing);
    if (lane == 0) warp_low[warp] = low, warp_high[warp] = high, warp_sum[warp] = competing;
    __syncthreads();
    low = __reduce_min_sync(kWarp, warp_low[lane]), high = __reduce_max_sync(kWarp, warp_high[lane]);
    competing = __reduce_add_sync(kWarp, warp_sum[lane]);

    Threshold limit = {kNever, 0};                      // everything that competes
    if (need <= 0) limit = {kAlways - 1, 0};            // nothing of it
    else if (need < competing) {
        uint32_t range = high - low;
        for (bool done = false; !done;) {
            const int width = 32 - __clz(static_cast<int>(range)), shift = max(width - kDigitBits, 0);
            for (int i = thread; i < kDigits; i += kSelectThreads) histogram[i] = 0;
            __syncthreads();
            row.each([&](uint32_t key) {
                const uint32_t offset = key - low;
                const bool counts = key != kNever && key != kAlways && key >= low && offset <= range;
                count_digit(histogram, counts ? static_cast<int>(offset >> shift) : -1);
            });
            __syncthreads();
            // Two digits per thread, largest first; the one in which the budget ends announces itself.
            const int top = kDigits - 1 - 2 * thread, upper = histogram[top], lower = histogram[top - 1];
            const int sum = upper + lower;
            int before = warp_scan(sum);
            if (lane == 31) warp_sum[warp] = before;
            __syncthreads();
            const int warps = warp_scan(warp_sum[lane]);
            before += (warp ? __shfl_sync(kWarp, warps, max(warp - 1, 0)) : 0) - sum;
            if (before < need && need <= before + upper) chosen[0] = top, chosen[1] = need - before, chosen[2] = upper;
            before += upper;
            if (before < need && need <= before + lower) chosen[0] = top - 1, chosen[1] = need - before, chosen[2] = lower;
            __syncthreads();
            low += static_cast<uint32_t>(chosen[0]) << shift;
            need = chosen[1];
            done = need == chosen[2] || shift == 0;
            limit = need == chosen[2] ? Threshold{low - 1, 0} : Threshold{low, need};
            range = (1u << shift) - 1;
        }
    }

    // Ordered compaction: n ascends with (slab, item, warp, lane).
    int64_t* kept = p.kept + image * p.width;
    int taken = 0, equal = 0;  // before this slab
    for (int slab = 0; slab < row.count; slab += row.kSlab) {
        if (!kResident) row.load(slab);
        UNROLL
        for (int i = 0; i < kItems; ++i) {
            const int more = __popc(__ballot_sync(kWarp, row.key[i] > limit.key));
            const int same = __popc(__ballot_sync(kWarp, limit.equal > 0 && row.key[i] == limit.key));
            if (lane == 0) warp_count[i * kWarps + warp] = static_cast<uint32_t>(more | same << 16);
        }
        __syncthreads();
        if (warp < kItems) {
            const int own = static_cast<int>(warp_count[thread]), upto = warp_scan(own);
            warp_count[thread] = static_cast<uint32_t>(upto - own);
            if (lane == 31) item_count[warp] = static_cast<uint32_t>(upto);
        }
        __syncthreads();
        UNROLL
        for (int i = 0; i < kItems; ++i) {
            const unsigned below = (1u << lane) - 1, prefix = warp_count[i * kWarps + warp];
            const bool greater = row.key[i] > limit.key, same = limit.equal > 0 && row.key[i] == limit.key;
            const int more = taken + static_cast<int>(prefix & 0xffffu) + __popc(__ballot_sync(kWarp, greater) & below);
            const int ties = equal + static_cast<int>(prefix >> 16) + __popc(__ballot_sync(kWarp, same) & below);
            const int n = slab + i * kSelectThreads + thread;
            const int slot = more + min(ties, limit.equal);
            // The bound holds by construction unless somebody changes the scores meanwhile.
            if ((greater || (same && ties < limit.equal)) && slot < budget) kept[slot] = row.index ? row.index[n] : n;
            taken += static_cast<int>(item_count[i] & 0xffffu), equal += static_cast<int>(item_count[i] >> 16);
        }
        __syncthreads();  // before the next slab's counts
    }
    const int found = min(taken + min(equal, limit.equal), budget);
    for (int64_t k = found + thread; k < p.width; k += kSelectThreads) kept[k] = -1;
}

}  // namespace
}  // namespace crop
