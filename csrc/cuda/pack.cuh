// pack on CUDA: one ordered scan per sample, from its right end, where the slots are known without a count.
#pragma once
#include "../common/device.cuh"

namespace crop {
namespace {

constexpr int kPackThreads = 1024;
constexpr int kPackItems = 4;  // tokens of a thread in a slab, all on their way at once
constexpr int kPackSlab = kPackThreads * kPackItems;

// kept_index[b, width - n : width] = the n tokens of sample b that stay, ascending, -1 before them; slot_of = its inverse. A
// token stays by `stays` or because an image of the sample names it in `kept`.
//
// A block owns a sample: slot_of first holds 0 for what stays and -1 for what does not; then a scan from the right end turns
// the zeros into slots, slab by slab. Bytes: `stays` and `kept` read once, kept_index written once, slot_of twice.
// Deterministic: counts are integers, slots follow from ordered scans; `kept` names no token twice.
GLOBAL(kPackThreads, 1)
pack_kernel(PackParams p) {
    SHARED(int, warp_count, [32]);
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int64_t b = blockIdx.x;
    const uint8_t* stays = p.stays + b * p.num_tokens;
    int64_t *slot_of = p.slot_of + b * p.num_tokens, *kept_index = p.kept_index + b * p.width;
    for (int64_t n = thread; n < p.num_tokens; n += kPackThreads) slot_of[n] = stays[n] ? 0 : -1;
    __syncthreads();
    for (int64_t k = thread; k < p.num_images * p.num_kept; k += kPackThreads) {
        const int64_t image = k / p.num_kept;
        if ((p.sample ? p.sample[image] : image) != b) continue;
        const int64_t n = p.kept[k];
        if (n >= 0 && n < p.num_tokens) slot_of[n] = 0;
    }
    __syncthreads();
    int64_t left = p.width;  // slots that nobody has yet
    for (int64_t end = p.num_tokens; end > 0; end -= kPackSlab) {
        const int64_t last = end - 1 - warp * (32 * kPackItems) - lane;
        unsigned stay[kPackItems];
        int total = 0;  // of the warp
        UNROLL
        for (int v = 0; v < kPackItems; ++v) {
            const int64_t n = last - v * 32;
            stay[v] = __ballot_sync(kWarp, n >= 0 && slot_of[n] == 0);
            total += __popc(stay[v]);
        }
        if (lane == 0) warp_count[warp] = total;
        __syncthreads();
        const int upto = warp_scan(warp_count[lane]), all = __shfl_sync(kWarp, upto, 31);
        int before = warp ? __shfl_sync(kWarp, upto, max(warp - 1, 0)) : 0;
        UNROLL
        for (int v = 0; v < kPackItems; ++v) {
            const int64_t n = last - v * 32, slot = left - 1 - before - __popc(stay[v] & ((1u << lane) - 1));
            if (stay[v] >> lane & 1) {
                slot_of[n] = slot >= 0 ? slot : -1;  // more than `width` stay: the first of them have no slot
                if (slot >= 0) kept_index[slot] = n;
            }
            before += __popc(stay[v]);
        }
        left -= all;
        __syncthreads();  // before the next slab's counts
    }
    for (int64_t slot = thread; slot < left; slot += kPackThreads) kept_index[slot] = -1;
}

}  // namespace
}  // namespace crop
