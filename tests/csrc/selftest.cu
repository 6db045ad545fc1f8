// Kernels of the emulator's own tests, in the portable dialect: one per group of operations, to be compared with scalar
// models, and kernels with a fault to be switched on. nvcc compiles them too, so that a GPU can be asked the same questions.
#include "../../csrc/common/portable.cuh"

#define TEST extern "C" __attribute__((visibility("default"))) int

namespace crop {
namespace {

// Every operation on 32-bit values of one warp; out[operation * threads + thread].
GLOBAL(64, 1)
collectives_kernel(const int* in, int* out, unsigned mask, int argument, int width) {
    const int t = threadIdx.x, n = blockDim.x;
    if (!(mask >> t % 32 & 1)) return;
    const int v = in[t];
    int* to = out + t;
    int all = 0;
    to[0 * n] = __shfl_sync(mask, v, argument, width);
    to[1 * n] = __shfl_up_sync(mask, v, argument, width);
    to[2 * n] = __shfl_down_sync(mask, v, argument, width);
    to[3 * n] = __shfl_xor_sync(mask, v, argument, width);
    to[4 * n] = static_cast<int>(__ballot_sync(mask, v & 1));
    to[5 * n] = __any_sync(mask, v == argument);
    to[6 * n] = __all_sync(mask, v > -100);
    to[7 * n] = static_cast<int>(__match_any_sync(mask, v));
    to[8 * n] = static_cast<int>(__match_all_sync(mask, v / 1000, &all));
    to[9 * n] = all;
    to[10 * n] = __reduce_add_sync(mask, v);
    to[11 * n] = __reduce_min_sync(mask, v);
    to[12 * n] = __reduce_max_sync(mask, v);
    to[13 * n] = static_cast<int>(__reduce_and_sync(mask, static_cast<unsigned>(v)));
    to[14 * n] = static_cast<int>(__reduce_or_sync(mask, static_cast<unsigned>(v)));
    to[15 * n] = static_cast<int>(__reduce_xor_sync(mask, static_cast<unsigned>(v)));
    to[16 * n] = static_cast<int>(__reduce_max_sync(mask, static_cast<unsigned>(v)));
    to[17 * n] = __float_as_int(__shfl_down_sync(mask, __int_as_float(v), 1));
    to[18 * n] = static_cast<int>(__shfl_xor_sync(mask, static_cast<int64_t>(v) << 32, 1) >> 32);
}

GLOBAL(64, 1)
barriers_kernel(const int* in, int* out) {
    const int t = threadIdx.x, n = blockDim.x;
    SHARED(int, turn, [64]);
    turn[t] = in[t];
    __syncthreads();
    out[t] = turn[(t + 1) % n];
    out[n + t] = __syncthreads_count(in[t] > 0);
    out[2 * n + t] = __syncthreads_or(in[t] == 7);
    out[3 * n + t] = __syncthreads_and(in[t] < 1000);
}

GLOBAL(64, 1)
atomics_kernel(int* at, unsigned* wrap, float* sum, unsigned long long* wide, const int* in) {
    const int v = in[threadIdx.x];
    atomicAdd(at + 0, v), atomicSub(at + 1, v), atomicMin(at + 2, v), atomicMax(at + 3, v);
    atomicAnd(at + 4, v), atomicOr(at + 5, v), atomicXor(at + 6, v);
    if (threadIdx.x == 3) atomicExch(at + 7, v);
    for (int seen = at[8] * 0, old; (old = atomicCAS(at + 8, seen, seen + v)) != seen;) seen = old;
    atomicInc(wrap, 9), atomicDec(wrap + 1, 9);
    atomicAdd(sum, 0.5f), atomicAdd(wide, 1ull << 32), atomicMax(wide + 1, static_cast<unsigned long long>(v));
}

GLOBAL(1, 1)
integers_kernel(const unsigned* in, unsigned* out) {
    const unsigned a = in[0], b = in[1], c = in[2];
    const long long wide = static_cast<long long>(static_cast<unsigned long long>(a) << 32 | b);
    out[0] = __popc(a), out[1] = __clz(static_cast<int>(a)), out[2] = __ffs(static_cast<int>(a)), out[3] = __brev(a);
    out[4] = __byte_perm(a, b, c), out[5] = __funnelshift_l(a, b, c), out[6] = __funnelshift_r(a, b, c);
    out[7] = __umulhi(a, b), out[8] = __popcll(wide), out[9] = __clzll(wide), out[10] = __ffsll(wide);
    out[11] = min(static_cast<int>(a), static_cast<int>(b)), out[12] = max(a, b);
}

// d = a * b + c for one tile, with ldmatrix (x4 for a, x2 for b) from shared memory that cp.async has filled.
template <class T>
GLOBAL(32, 1)
product_kernel(const uint4* a, const uint4* b, float* d) {
    const int lane = threadIdx.x;
    DYN_SHARED(uint4, rows);  // a: 16 rows of two pieces, b transposed: 8 rows of two pieces
    ptx::cp_async16(rows + lane, a + lane);
    ptx::cp_commit();
    if (lane < 16) ptx::cp_async16(rows + 32 + lane, b + lane);
    ptx::cp_commit();
    ptx::cp_wait<1>();
    __syncwarp();
    uint32_t x[4], y[2], z[1];
    ptx::ldmatrix_x4(x, rows + lane % 16 * 2 + lane / 16);
    ptx::cp_wait<0>();
    __syncwarp();
    ptx::ldmatrix_x2(y, rows + 32 + lane % 8 * 2 + lane / 8 % 2);
    ptx::ldmatrix_x1(z, rows + 32 + lane % 8 * 2);
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
    ptx::mma(sum, x, y, T{});
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = z[0] == y[0] ? sum[i] : -1;
}

// Pieces with fewer bytes than they could have; 16-byte loads with every hint; ex2.
GLOBAL(32, 1)
pieces_kernel(const unsigned char* in, unsigned char* out, const float* x, float* y) {
    SHARED(unsigned char, held, [32 * 28]);
    const int t = threadIdx.x;
    ptx::cp_async4(held + 4 * t, in + 4 * t, t % 5);
    ptx::cp_async8(held + 128 + 8 * t, in + 128 + 8 * t, t % 9);
    ptx::cp_async16(held + 384 + 16 * t, in + 384 + 16 * t, t % 17);
    ptx::cp_commit();
    ptx::cp_wait<0>();
    __syncthreads();
    for (int i = t; i < 896; i += 32) out[i] = held[i];
    const uint4* from = reinterpret_cast<const uint4*>(in);
    uint4 v = ptx::load_once(from + t % 2);
    v.x ^= ptx::load_again(from + 2).x ^ __ldg(from + 3).x;
    if (t < 2) ptx::store_once(reinterpret_cast<uint4*>(out + 896) + t, v);
    y[t] = ptx::ex2(x[t]);
}

// Each block waits for the block before it, adds its own and passes on; the order of the blocks is a ticket.
GLOBAL(64, 1)
chain_kernel(uint32_t* ticket, uint32_t* flag, int* sum, int* out) {
    SHARED(unsigned, number, [1]);
    if (threadIdx.x == 0) number[0] = ptx::add_acq_rel(ticket, 1);
    __syncthreads();
    const unsigned n = number[0];
    if (threadIdx.x == 0) {
        while (n > 0 && ptx::ld_acquire(flag + n - 1) == 0) {}
        sum[n] = (n > 0 ? sum[n - 1] : 0) + static_cast<int>(n);
        ptx::st_release(flag + n, 1);
    }
    __syncthreads();
    out[n * blockDim.x + threadIdx.x] = sum[n];
}

// The last block sums what all have left. fault 1: no fence; 2: fence ahead of the write; 3: no barrier; 4: no second fence.
GLOBAL(64, 1)
last_block_kernel(const int* in, int* partial, unsigned* count, int* out, int fault) {
    SHARED(bool, last, [1]);
    const int t = threadIdx.x;
    if (fault == 2) __threadfence();
    const int sum = __reduce_add_sync(~0u, in[blockIdx.x * 64 + t]);
    if (t % 32 == 0) partial[blockIdx.x * 2 + t / 32] = sum;
    if (fault != 1 && fault != 2) __threadfence();
    if (fault != 3) __syncthreads();
    if (t == 0) {
        if (fault != 1 && fault != 2) __threadfence();
        last[0] = atomicAdd(count, 1) == gridDim.x - 1;
        if (fault != 4) __threadfence();
    }
    __syncthreads();
    if (!last[0] || t > 0) return;
    int total = 0;
    for (unsigned i = 0; i < gridDim.x * 2; ++i) total += partial[i];
    out[0] = total;
}

// Histogram, then a sum over the block. fault 1: no barrier after zeroing; 2: not atomic; 3: no barrier ahead of reading;
// 4: reads one past the end of the input; 5: writes one past the end of the output; 6: bins are not zeroed; 7: barrier in a
// branch; 8: reads one past the end of shared memory; 9: one thread never comes; 10: index of a local array out of bounds;
// 11: misaligned 16-byte load; 12: overflow; 13: writes its input.
GLOBAL(96, 1)
histogram_kernel(int* in, int n, int* out, int fault) {
    SHARED(int, bins, [16]);
    const int t = threadIdx.x;
    if (t < 16 && fault != 6) bins[t] = 0;
    if (fault != 1) __syncthreads();
    for (int i = t; i < n + (fault == 4); i += blockDim.x) {
        const int bin = in[i] & 15;
        if (fault == 2) bins[bin] += 1;
        else atomicAdd(bins + bin, 1);
    }
    if (fault == 7 && t < 32) __syncthreads();
    else if (fault != 3 && (fault != 9 || t != 5)) __syncthreads();
    if (fault == 9 && t == 5) __syncwarp(0xffffffffu);
    if (t < 16 + (fault == 5)) out[t] = bins[t < 16 ? t : 15];
    if (fault == 8 && t == 16) out[0] = bins[n / 16];
    if (fault == 10) {
        int local[4] = {1, 2, 3, 4};
        out[t % 16] += local[t];
    }
    if (fault == 11 && t == 0) out[0] += __ldg(reinterpret_cast<const int4*>(in + 1)).x;
    if (fault == 12 && t == 0) out[0] += in[0] + 0x7fffffff;
    if (fault == 13 && t == 0) in[0] = 3;
}

// Warps exchange through shared memory. fault 1: no __syncwarp; 2: only a shuffle; 3: mask without the caller; 4: full mask
// in a branch; 5: a lane of the mask has ended; 6: different operations; 7: mma by half a warp.
GLOBAL(64, 1)
exchange_kernel(const int* in, int* out, int fault) {
    SHARED(int, held, [64]);
    const int t = threadIdx.x, lane = t % 32;
    if (fault == 5 && lane == 31) return;
    held[t] = in[t];
    if (fault == 2) __shfl_sync(~0u, in[t], 0);
    else if (fault == 3) __syncwarp(lane < 16 ? 0xffffu : 0xffffu);
    else if (fault == 4) {
        if (lane < 16) __syncwarp(~0u);
    } else if (fault == 6) {
        if (lane < 16) __syncwarp(~0u);
        else __shfl_sync(~0u, t, 0);
    } else if (fault == 7) {
        float d[4] = {};
        const uint32_t a[4] = {}, b[2] = {};
        if (lane < 16) ptx::mma(d, a, b, __half{});
        __syncwarp();
    } else if (fault != 1) __syncwarp();
    out[t] = held[t ^ 1];
    if (fault == 0) {  // halves with masks of their own, a warp-wide exchange afterwards
        __syncwarp();
        const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
        if (lane < 16) held[t] = __shfl_xor_sync(half, in[t], 8);
        else held[t] = __shfl_xor_sync(half, in[t], 4);
        __syncwarp();
        out[t] += held[t ^ 2];
    }
}

// A pipeline of two stages. fault 1: no barrier behind the wait; 2: waits for too little; 3: no barrier ahead of the next
// copy; 4: the source ends one row early; 5: nobody waits at the end.
GLOBAL(32, 1)
pipeline_kernel(const int* in, int rows, int* out, int fault) {
    SHARED(int, stage, [2][32]);
    const int t = threadIdx.x;
    int sum = 0;
    ptx::cp_async4(&stage[0][t], in + t);
    ptx::cp_commit();
    for (int row = 0; row < rows; ++row) {
        if (row + 1 < rows + (fault == 4)) ptx::cp_async4(&stage[(row + 1) % 2][t], in + (row + 1) * 32 + t);
        ptx::cp_commit();
        if (fault == 2) ptx::cp_wait<2>();
        else ptx::cp_wait<1>();
        if (fault != 1) __syncthreads();
        sum += stage[row % 2][31 - t];
        if (fault != 3) __syncthreads();
    }
    if (fault == 5) ptx::cp_async4(&stage[0][t], in + t);
    out[t] = sum;
}

// fault 1: two blocks add to one word; 2: to neighbouring bytes (no fault); 3: they wait for each other without a release.
GLOBAL(32, 1)
blocks_kernel(int* word, unsigned char* bytes, uint32_t* flag, int fault) {
    if (threadIdx.x != 0) return;
    if (fault == 1) word[0] += 1;
    else atomicAdd(word, 1);
    bytes[blockIdx.x] = static_cast<unsigned char>(blockIdx.x + 1);
    if (fault == 3)
        while (ptx::ld_acquire(flag) == 0) {}
}

// A dependent launch. fault 1: reads ahead of grid_wait; 2: never waits.
GLOBAL(32, 1)
dependent_kernel(const int* in, int* out, int fault) {
    const int early = fault == 1 ? in[threadIdx.x] : 0;
    if (fault != 2) ptx::grid_wait();
    if (fault != 2) out[threadIdx.x] = fault == 1 ? early : in[threadIdx.x];
    ptx::grid_launch_dependents();
}

// Blocks of a cluster read what their neighbour holds. fault 1: no barrier ahead; 2: none behind; 3: a block that is not there;
// 4: writes again while others read; 5: one thread never comes (no fault: it has ended).
GLOBAL(64, 1)
cluster_kernel(const int* in, int* out, int cluster, int fault) {
    SHARED(int, held, [64]);
    ptx::grid_wait();
    const int t = threadIdx.x, at = blockIdx.x * 64 + t, rank = static_cast<int>(blockIdx.x) % cluster;
    held[t] = in[at];
    if (fault == 5 && t == 63) return;
    if (fault == 6) ptx::cluster_sync_relaxed();
    else if (fault != 1) ptx::cluster_sync();
    if (fault == 4) held[t] = 0;
    const int* there = ptx::cluster_at(held + 62 - t % 63, fault == 3 ? cluster : (rank + 1) % cluster);
    out[at] = *there;
    if (fault != 2) ptx::cluster_sync_relaxed();
}

GLOBAL(32, 1) nothing_kernel(int* out) {
    DYN_SHARED(int, memory);
    SHARED(int, more, [4096]);
    if (threadIdx.x) return;
    memory[0] = more[0] = 1;
    out[0] = memory[0] + more[0];
}

Stream on(void* handle) { return {0, handle}; }

}  // namespace

TEST collectives(const int* in, int* out, int threads, unsigned mask, int argument, int width, void* stream) {
    return LAUNCH(1, threads, 0, on(stream), collectives_kernel, in, out, mask, argument, width);
}
TEST barriers(const int* in, int* out, int threads, void* stream) { return LAUNCH(1, threads, 0, on(stream), barriers_kernel, in, out); }
TEST atomics(int* at, unsigned* wrap, float* sum, unsigned long long* wide, const int* in, void* stream) {
    return LAUNCH(2, 64, 0, on(stream), atomics_kernel, at, wrap, sum, wide, in);
}
TEST integers(const unsigned* in, unsigned* out, void* stream) { return LAUNCH(1, 1, 0, on(stream), integers_kernel, in, out); }
TEST product(const void* a, const void* b, float* d, int half, void* stream) {
    const uint4 *x = static_cast<const uint4*>(a), *y = static_cast<const uint4*>(b);
    return half ? LAUNCH(1, 32, 768, on(stream), product_kernel<__half>, x, y, d)
                : LAUNCH(1, 32, 768, on(stream), product_kernel<__nv_bfloat16>, x, y, d);
}
TEST pieces(const unsigned char* in, unsigned char* out, const float* x, float* y, void* stream) {
    return LAUNCH(1, 32, 0, on(stream), pieces_kernel, in, out, x, y);
}
TEST chain(uint32_t* ticket, uint32_t* flag, int* sum, int* out, int blocks, void* stream) {
    return LAUNCH(blocks, 64, 0, on(stream), chain_kernel, ticket, flag, sum, out);
}
TEST last_block(const int* in, int* partial, unsigned* count, int* out, int blocks, int fault, void* stream) {
    return LAUNCH(blocks, 64, 0, on(stream), last_block_kernel, in, partial, count, out, fault);
}
TEST histogram(int* in, int n, int* out, int fault, void* stream) {
    return LAUNCH(1, 96, 0, on(stream), histogram_kernel, in, n, out, fault);
}
TEST exchange(const int* in, int* out, int fault, void* stream) { return LAUNCH(1, 64, 0, on(stream), exchange_kernel, in, out, fault); }
TEST pipeline(const int* in, int rows, int* out, int fault, void* stream) {
    return LAUNCH(1, 32, 0, on(stream), pipeline_kernel, in, rows, out, fault);
}
TEST blocks(int* word, unsigned char* bytes, uint32_t* flag, int fault, void* stream) {
    return LAUNCH(2, 32, 0, on(stream), blocks_kernel, word, bytes, flag, fault);
}
TEST dependent(const int* in, int* out, int fault, void* stream) {
    return LAUNCH_DEPENDENT(1, 32, 0, on(stream), dependent_kernel, in, out, fault);
}
TEST cluster(const int* in, int* out, int64_t grid, int size, int fault, void* stream) {
    return LAUNCH_CLUSTER(size, grid, 64, 0, on(stream), cluster_kernel, in, out, size, fault);
}
TEST nothing(int* out, int64_t grid, int threads, int64_t smem, void* stream) {
    return LAUNCH(grid, threads, smem, on(stream), nothing_kernel, out);
}

}  // namespace crop
