// spread on CUDA: the whole greedy choice of an image in one block, which needs nothing of the host between two rounds.
#pragma once
#include "../common/device.cuh"

namespace crop {
namespace {

constexpr int kSpreadThreads = 1024;
constexpr int kSpreadTokens = 8 * kSpreadThreads;               // at most
constexpr uint32_t kTaken = 0xffffffffu, kUnknown = kTaken - 1;  // keys beyond those of all numbers: chosen before; NaN

// Unsigned comparison of keys = comparison of floats, a NaN largest.
DEV uint32_t near_key(float x) { return x == x ? order_key(x) : kUnknown; }

// chosen[k] = the token with the least `near` that is not chosen yet, by rounds of `at_once`; after a round near = the largest of
// near and alike[those of the round]. Equal ones: the smaller token.
//
// A block owns the image, a thread the tokens threadIdx.x, threadIdx.x + blockDim.x, ...: their keys stay in registers. A choice
// is a minimum over the block, of keys first, then of tokens, with one barrier: every warp reduces the minima of all warps, in
// one of two buffers. Bytes: a row of alike is read once when its token was chosen, but for those of the last round; whole warps
// read neighbours. Deterministic: nothing is calculated, only compared.
template <int kItems>
GLOBAL(kSpreadThreads, 1)
spread_kernel(SpreadParams p) {
    constexpr int kRows = 16 / kItems;  // whose values are on their way at once; without branches, so some come twice
    DYN_SHARED(int, round);  // tokens chosen in this one
    SHARED(uint32_t, warp_key, [2 * 32]);
    SHARED(uint32_t, warp_token, [2 * 32]);
    const int thread = threadIdx.x, threads = blockDim.x, lane = thread % 32, warp = thread / 32;
    const int tokens = static_cast<int>(p.num_tokens), count = static_cast<int>(p.count), most = static_cast<int>(p.at_once);
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    uint32_t key[kItems];
    UNROLL
    for (int i = 0; i < kItems; ++i) {
        const float value = p.near[min(thread + i * threads, tokens - 1)];
        key[i] = thread + i * threads < tokens ? near_key(value) : kTaken;
    }
    int buffer = 0;
    for (int first = 0; first < count; first += most) {
        const int here = min(most, count - first);
        for (int k = 0; k < here; ++k, buffer ^= 32) {
            uint32_t least = kTaken, token = 0;
            UNROLL
            for (int i = 0; i < kItems; ++i)
                if (key[i] < least) least = key[i], token = thread + i * threads;
            uint32_t best = __reduce_min_sync(kWarp, least);
            uint32_t found = __reduce_min_sync(kWarp, least == best ? token : kTaken);
            if (lane == 0) warp_key[buffer + warp] = best, warp_token[buffer + warp] = found;
            __syncthreads();
            const bool exists = lane * 32 < threads;
            least = exists ? warp_key[buffer + lane] : kTaken, token = exists ? warp_token[buffer + lane] : kTaken;
            best = __reduce_min_sync(kWarp, least);
            found = __reduce_min_sync(kWarp, least == best ? token : kTaken);
            UNROLL
            for (int i = 0; i < kItems; ++i)
                if (found == static_cast<uint32_t>(thread + i * threads)) key[i] = kTaken;
            if (thread == 0) round[k] = static_cast<int>(found), p.chosen[first + k] = found;
        }
        if (first + here == count) break;
        __syncthreads();
        UNROLL
        for (int i = 0; i < kItems; ++i)
            if (p.fresh && first == 0 && key[i] != kTaken) key[i] = 0;
        for (int group = 0; group < here; group += kRows) {
            float value[kRows][kItems];
            UNROLL
            for (int k = 0; k < kRows; ++k) {
                const float* row = p.alike + round[min(group + k, here - 1)] * p.row_stride;
                UNROLL
                for (int i = 0; i < kItems; ++i) value[k][i] = row[min(thread + i * threads, tokens - 1)];
            }
            UNROLL
            for (int k = 0; k < kRows; ++k) {
                UNROLL
                for (int i = 0; i < kItems; ++i) key[i] = max(key[i], near_key(value[k][i]));
            }
        }
    }
}

}  // namespace
}  // namespace crop
