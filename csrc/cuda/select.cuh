// select on CUDA: radix selection on order-preserving integer keys, then one ordered scan; as in cpu/select.cpp.
//
// Classes (priority, filler) are settled before the radix: what is certainly taken gets the key 2^32 - 1, what is certainly
// not taken 0; no float has these keys. The rest competes by value. Digits are taken below the range of the competing keys,
// because attention masses share their leading bits; nothing is ever stashed, so no list can overflow.
#pragma once
#include "../common/device.cuh"

namespace crop {
namespace {

constexpr int kClasses = 128;  // priorities 0..127
constexpr uint32_t kAlways = 0xffffffffu, kNever = 0;
constexpr int kMaxTokens = 0x7fff0000;  // so that the end of a slab is an int
constexpr int kBudgets = 512;           // images of a launch: their budgets are a kernel parameter

struct Budgets {
    int keep[kBudgets];
};

DEV uint32_t score_key(float x) { return order_key(x == x ? x : -kInf); }

// The keys of a slab of one image. A warp owns consecutive tokens, a lane four neighbours in every 128 of them. A row that
// fits into one slab stays in registers (kResident); a longer one is read again, slab by slab, whenever it is visited.
template <int kThreads, int kItems, bool kResident>
struct Candidates {
    static constexpr int kSlab = kItems * kThreads, kGroups = kItems / 4;
    const float *score, *weight;
    const int8_t* priority;
    const int64_t* index;
    int count;
    bool vectors;  // groups of four lie at multiples of their size
    uint32_t key[kItems];
    int8_t rank[kItems];  // priority; -1 = never taken

    DEV int token(int slab, int group) const {
        return slab + static_cast<int>(threadIdx.x / 32 * 32 * kItems + group * 128 + threadIdx.x % 32 * 4);
    }
    DEV void load_ranks(int slab) {
        UNROLL
        for (int v = 0; v < kGroups; ++v) {
            const int n = token(slab, v);
            UNROLL
            for (int j = 0; j < 4; ++j) rank[4 * v + j] = n + j < count ? 0 : -1;
            if (priority && vectors && n < count) {
                const char4 four = *reinterpret_cast<const char4*>(priority + n);
                rank[4 * v] = four.x, rank[4 * v + 1] = four.y, rank[4 * v + 2] = four.z, rank[4 * v + 3] = four.w;
            } else if (priority) {
                UNROLL
                for (int j = 0; j < 4; ++j)
                    if (n + j < count) rank[4 * v + j] = priority[n + j];
            }
            UNROLL
            for (int j = 0; j < 4; ++j)
                if (rank[4 * v + j] < 0 || (index && n + j < count && index[n + j] < 0)) rank[4 * v + j] = -1;
        }
    }
    DEV void load(int slab) {
        float value[kItems];
        UNROLL
        for (int v = 0; v < kGroups; ++v) load_four(score, token(slab, v), value + 4 * v);
        if (weight) {
            float factor[kItems];
            UNROLL
            for (int v = 0; v < kGroups; ++v) load_four(weight, token(slab, v), factor + 4 * v);
            UNROLL
            for (int i = 0; i < kItems; ++i) value[i] = __fmul_rn(value[i], factor[i]);
        }
        load_ranks(slab);
        UNROLL
        for (int i = 0; i < kItems; ++i) key[i] = score_key(value[i]);
    }
    DEV void load_four(const float* from, int n, float* four) const {
        if (vectors && n < count) {
            const float4 v = *reinterpret_cast<const float4*>(from + n);
            four[0] = v.x, four[1] = v.y, four[2] = v.z, four[3] = v.w;
        } else {
            UNROLL
            for (int j = 0; j < 4; ++j) four[j] = n + j < count ? from[n + j] : 0.0f;
        }
    }
    // Only class `boundary` competes: better ones are taken, worse ones are not.
    DEV void settle(int boundary) {
        UNROLL
        for (int i = 0; i < kItems; ++i)
            if (rank[i] != boundary) key[i] = rank[i] > boundary ? kAlways : kNever;
    }
    // f(i) for every item of every slab, padding included; all threads make the same number of calls.
    template <class F>
    DEV void each(int boundary, F f) {
        for (int slab = 0; slab < count; slab += kSlab) {
            if (!kResident) load(slab), settle(boundary);
            UNROLL
            for (int i = 0; i < kItems; ++i) f(key[i]);
        }
    }
};

// Keys above `key` are taken, and the first `equal` of those that equal it.
struct Threshold {
    uint32_t key;
    int equal;
};

// The class in which the budget ends, and how many tokens better classes hold. Called by whole warps.
struct Boundary {
    int rank, taken;
};
DEV Boundary find_boundary(const int* members, int budget) {
    const int lane = threadIdx.x % 32;
    int here[4], sum = 0;  // four classes per lane, best first
    UNROLL
    for (int i = 0; i < 4; ++i) here[i] = members[kClasses - 1 - lane * 4 - i], sum += here[i];
    int before = warp_scan(sum) - sum, found = -1, taken = 0;
    UNROLL
    for (int i = 0; i < 4; ++i) {
        const int rank = kClasses - 1 - lane * 4 - i;
        if (found < 0 && before <= budget && (before + here[i] > budget || rank == 0)) found = rank, taken = before;
        before += here[i];
    }
    // Of the lanes that found a class, the first is right: a later one has more tokens before it.
    const int first = __ffs(__ballot_sync(kWarp, found >= 0)) - 1;
    return {__shfl_sync(kWarp, found, first), __shfl_sync(kWarp, taken, first)};
}

// kept[i, :] = the budget[i] best tokens in ascending order, then -1. Best first: priority descending, score * weight
// descending, n ascending.
//
// A block owns one image. Passes over the scores: one to count classes (with priorities), one for the range of the
// competing class, one histogram per 11 bits of that range (9 in small blocks), one to write; rows that fit into registers
// are read from memory once.
// Deterministic: counts are integers, and positions follow from ordered scans, not from atomics.
template <int kThreads, int kItems, bool kResident>
GLOBAL(kThreads, 1)
select_kernel(SelectParams p, int64_t first_image, bool vectors, Budgets budgets) {
    constexpr int kWarps = kThreads / 32, kDigitBits = kThreads == 1024 ? 11 : 9, kDigits = 1 << kDigitBits;
    static_assert(kDigits == 2 * kThreads, "two digits per thread");
    SHARED(int, histogram, [kDigits]);
    SHARED(int, members, [kClasses]);
    SHARED(int, warp_sum, [32]);
    SHARED(uint32_t, warp_low, [32]);
    SHARED(uint32_t, warp_high, [32]);
    SHARED(int, warp_count, [32]);  // taken in the low half, equal in the high half
    SHARED(int, chosen, [3]);       // digit, what is still needed, its count

    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    histogram[2 * thread] = histogram[2 * thread + 1] = 0;
    if (thread < kClasses) members[thread] = 0;
    if (thread < 32) warp_sum[thread] = 0, warp_low[thread] = kAlways, warp_high[thread] = kNever, warp_count[thread] = 0;
    __syncthreads();

    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const int64_t image = first_image + blockIdx.x, at = image * p.num_tokens;
    Candidates<kThreads, kItems, kResident> row;
    row.score = p.score + at, row.weight = p.weight ? p.weight + at : nullptr;
    row.priority = p.priority ? p.priority + at : nullptr, row.index = p.index ? p.index + at : nullptr;
    row.count = static_cast<int>(p.num_tokens), row.vectors = vectors;
    const int budget = budgets.keep[blockIdx.x];
    if (kResident) row.load(0);

    Boundary boundary = {0, 0};  // without priorities there is one class
    if (p.priority) {
        for (int slab = 0; slab < row.count; slab += row.kSlab) {
            if (!kResident) row.load_ranks(slab);
            UNROLL
            for (int i = 0; i < kItems; ++i)
                if (row.rank[i] >= 0) atomicAdd(members + row.rank[i], 1);
        }
        __syncthreads();
        boundary = find_boundary(members, budget);
    }
    int need = budget - boundary.taken;
    if (kResident) row.settle(boundary.rank);

    // Range and number of the competing keys.
    uint32_t low = kAlways, high = kNever;
    int competing = 0;
    row.each(boundary.rank, [&](uint32_t key) {
        if (key == kNever || key == kAlways) return;
        low = min(low, key), high = max(high, key), ++competing;
    });
    low = __reduce_min_sync(kWarp, low), high = __reduce_max_sync(kWarp, high);
    competing = __reduce_add_sync(kWarp, competing);
    if (lane == 0) warp_low[warp] = low, warp_high[warp] = high, warp_sum[warp] = competing;
    __syncthreads();
    low = __reduce_min_sync(kWarp, warp_low[lane]), high = __reduce_max_sync(kWarp, warp_high[lane]);
    competing = __reduce_add_sync(kWarp, warp_sum[lane]);

    Threshold limit = {kNever, 0};            // everything that competes
    if (need <= 0) limit = {kAlways - 1, 0};  // nothing of it
    else if (need < competing) {
        uint32_t range = high - low;
        for (bool done = false; !done;) {
            const int width = 32 - __clz(static_cast<int>(range)), shift = max(width - kDigitBits, 0);
            row.each(boundary.rank, [&](uint32_t key) {
                if (key == kNever || key == kAlways || key < low || key - low > range) return;
                atomicAdd(histogram + ((key - low) >> shift), 1);
            });
            __syncthreads();
            // Two digits per thread, largest first; the one in which the budget ends announces itself.
            const int top = kDigits - 1 - 2 * thread, upper = histogram[top], lower = histogram[top - 1], sum = upper + lower;
            histogram[top] = histogram[top - 1] = 0;
            int before = warp_scan(sum);
            if (lane == 31) warp_sum[warp] = before;
            __syncthreads();
            const int warps = warp_scan(lane < kWarps ? warp_sum[lane] : 0);
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

    // Ordered compaction: n ascends with (slab, warp, group of 128, lane, item).
    int64_t* kept = p.kept + image * p.width;
    int taken = 0, equal = 0;  // before this slab
    for (int slab = 0; slab < row.count; slab += row.kSlab) {
        if (!kResident) row.load(slab), row.settle(boundary.rank);
        auto state = [&](int i) {
            return (row.key[i] > limit.key ? 1 : 0) | (limit.equal > 0 && row.key[i] == limit.key ? 1 << 16 : 0);
        };
        int before[row.kGroups], total = 0;  // of the warp
        UNROLL
        for (int v = 0; v < row.kGroups; ++v) {
            const int mine = state(4 * v) + state(4 * v + 1) + state(4 * v + 2) + state(4 * v + 3), upto = warp_scan(mine);
            before[v] = total + upto - mine;
            total += __shfl_sync(kWarp, upto, 31);
        }
        if (lane == 0) warp_count[warp] = total;
        __syncthreads();
        const int warps = warp_scan(warp_count[lane]);
        const int ahead = warp ? __shfl_sync(kWarp, warps, max(warp - 1, 0)) : 0, all = __shfl_sync(kWarp, warps, 31);
        UNROLL
        for (int v = 0; v < row.kGroups; ++v) {
            int here = ahead + before[v];
            UNROLL
            for (int j = 0; j < 4; ++j) {
                const int mine = state(4 * v + j), more = taken + (here & 0xffff), ties = equal + (here >> 16);
                const int slot = more + min(ties, limit.equal), n = row.token(slab, v) + j;
                // The bound holds by construction unless somebody changes the scores meanwhile.
                if ((mine == 1 || (mine && ties < limit.equal)) && slot < budget) kept[slot] = row.index ? row.index[n] : n;
                here += mine;
            }
        }
        taken += all & 0xffff, equal += all >> 16;
        __syncthreads();  // before the next slab's counts
    }
    const int found = min(taken + min(equal, limit.equal), budget);
    for (int64_t k = found + thread; k < p.width; k += kThreads) kept[k] = -1;
}

}  // namespace
}  // namespace crop
