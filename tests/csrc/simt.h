// What kernel sources see instead of nvcc (g++ -x c++ -include simt.h): the names of csrc/common/portable.cuh and the part
// of CUDA that its head lists. Every operation that synchronises or touches memory is a call into the runtime (runtime.h),
// with the line it was called from.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <source_location>
#include <tuple>
#include <type_traits>

#include "../../csrc/common/ops.h"

namespace simt {

using Where = std::source_location;

// --- the runtime ------------------------------------------------------------------------------------------------------

struct Position {  // of the running thread
    uint3 thread, block;
    dim3 block_size, grid_size;
};
extern Position* here;

enum class Op { kSync, kIndex, kUp, kDown, kXor, kBallot, kAny, kAll, kMatchAny, kMatchAll, kAdd, kMin, kMax, kAnd, kOr,
                kExclusiveOr, kMatrix, kMultiply, kBarrier, kBarrierCount, kBarrierOr, kBarrierAnd };

struct Call {  // what a lane brings to a warp operation
    Op op;
    unsigned mask;
    uint64_t value;
    int argument, width;
    const void* operands;
    Where at;
    uint64_t result;
};
struct Product {  // operands of kMultiply
    float* d;
    const uint32_t *a, *b;
    float (*value)(uint32_t pair, int element);
};
struct Matrices {  // operands of kMatrix
    uint32_t* r;
    const void* row;
};
struct Kernel {
    const char* name;
    dim3 grid;
    int block;
    int64_t dynamic_bytes;
    int cluster;  // 0: a plain launch; else dependent, in clusters of so many blocks
    std::function<void()> body;
};

int run(const Kernel&);  // returns 0, or an error as soon as there is a report
int barrier(Op, int predicate, Where);
uint64_t warp(Call);
void* shared(const void* key, size_t bytes, const char* name);
void* dynamic_shared();
void before_atomic(const void*, size_t, Where);
void after_atomic(bool changed);
void acquire(const void*, bool always);  // always: even without a fence behind it
void release(const void*, bool always);  // always: even without a fence ahead of it
void fence();
void yield();
void copy_async(void* to, const void* from, int size, int present, Where);
void commit_async();
void wait_async(int pending);
void grid_wait();
int largest_cluster();
void cluster_sync(bool ordered, Where);
const void* cluster_at(const void* shared, int rank, Where);

// --- helpers ----------------------------------------------------------------------------------------------------------

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
T from_bits(uint64_t bits) {
    T value;
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
T shuffle(Op op, unsigned mask, T value, int argument, int width, Where at) {
    return from_bits<T>(warp({op, mask, to_bits(value), argument, width, nullptr, at, 0}));
}
template <class T>
T reduce(Op op, unsigned mask, T value, Where at) {  // sign-extended, so that comparisons may be of 64 bits
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>);
    return static_cast<T>(warp({op, mask, static_cast<uint64_t>(static_cast<int64_t>(value)), 0, 32, nullptr, at, 0}));
}
inline unsigned vote(Op op, unsigned mask, bool value, Where at) {
    return static_cast<unsigned>(warp({op, mask, value, 0, 32, nullptr, at, 0}));
}
// The checks know atomics apart, so the plain accesses in here must not be seen.
template <class T, class F>
[[gnu::noinline, gnu::no_sanitize("thread")]] T atomic(T* at, F f, Where where) {
    before_atomic(at, sizeof(T), where);
    release(at, false);
    const T old = *at, now = f(old);
    *at = now;
    acquire(at, false);
    after_atomic(to_bits(old) != to_bits(now));
    return old;
}
template <class... Parameters, class Grid, class... Arguments>
int launch(int cluster, const char* name, void (*kernel)(Parameters...), Grid grid, int block, int64_t smem, crop::Stream,
           Arguments... arguments) {
    const std::tuple<std::decay_t<Parameters>...> bound(static_cast<Parameters>(arguments)...);
    dim3 blocks;
    if constexpr (std::is_same_v<Grid, dim3>) blocks = grid;
    else blocks = dim3(grid <= INT32_MAX ? static_cast<unsigned>(grid) : 0);  // 0 is refused
    return run({name, blocks, block, smem, cluster, [&] { std::apply(kernel, bound); }});
}

}  // namespace simt

// --- csrc/common/portable.cuh -----------------------------------------------------------------------------------------

#define GLOBAL(threads, blocks) void
#define DEV inline
#define UNROLL
#define ROLLED
#define SHARED(type, name, extent)           \
    static const char name##_key = 0;        \
    using name##_array = type extent;        \
    name##_array& name = *static_cast<name##_array*>(::simt::shared(&name##_key, sizeof(name##_array), #name))
#define DYN_SHARED(type, name) type* name = static_cast<type*>(::simt::dynamic_shared())
#define LAUNCH(grid, block, smem, stream, kernel, ...) ::simt::launch(0, #kernel, kernel, grid, block, smem, stream, __VA_ARGS__)
#define LAUNCH_DEPENDENT(grid, block, smem, stream, kernel, ...) \
    ::simt::launch(1, #kernel, kernel, grid, block, smem, stream, __VA_ARGS__)
#define LAUNCH_CLUSTER(cluster, grid, block, smem, stream, kernel, ...) \
    ::simt::launch(cluster, #kernel, kernel, grid, block, smem, stream, __VA_ARGS__)
#define LARGEST_CLUSTER(device, kernel, threads) ((void)(device), (void)(threads), ::simt::largest_cluster())

#define threadIdx (::simt::here->thread)
#define blockIdx (::simt::here->block)
#define blockDim (::simt::here->block_size)
#define gridDim (::simt::here->grid_size)
#define SIMT_AT ::simt::Where at = ::simt::Where::current()

namespace crop::ptx {

inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16, SIMT_AT) {
    const simt::Product product{d, a, b, [](uint32_t pair, int i) { return std::bit_cast<float>(i ? pair & 0xffff0000u : pair << 16); }};
    simt::warp({simt::Op::kMultiply, ~0u, 0, 0, 32, &product, at, 0});
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half, SIMT_AT) {
    const simt::Product product{d, a, b, [](uint32_t pair, int i) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16 * i)));
    }};
    simt::warp({simt::Op::kMultiply, ~0u, 0, 0, 32, &product, at, 0});
}
template <int kCount>
void ldmatrix(uint32_t* r, const void* row, simt::Where at) {
    const simt::Matrices matrices{r, row};
    simt::warp({simt::Op::kMatrix, ~0u, 0, kCount, 32, &matrices, at, 0});
}
inline void ldmatrix_x1(uint32_t (&r)[1], const void* row, SIMT_AT) { ldmatrix<1>(r, row, at); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, SIMT_AT) { ldmatrix<2>(r, row, at); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_AT) { ldmatrix<4>(r, row, at); }

inline void cp_async4(void* to, const void* from, int present = 4, SIMT_AT) { simt::copy_async(to, from, 4, present, at); }
inline void cp_async8(void* to, const void* from, int present = 8, SIMT_AT) { simt::copy_async(to, from, 8, present, at); }
inline void cp_async16(void* to, const void* from, int present = 16, SIMT_AT) { simt::copy_async(to, from, 16, present, at); }
inline void cp_commit() { simt::commit_async(); }
template <int kPending>
void cp_wait() {
    simt::wait_async(kPending);
}

inline float ex2(float x) {
    const float y = exp2f(x);
    return fabsf(y) < 1.17549435e-38f ? 0.0f : y;  // .ftz
}
inline void settle(uint32_t&) {}
inline void prefetch(const void*) {}
inline uint4 load_once(const uint4* from) { return *from; }
inline uint4 load_again(const uint4* from) { return *from; }
inline void store_once(uint4* to, uint4 v) { *to = v; }

[[gnu::noinline, gnu::no_sanitize("thread")]] inline uint32_t ld_acquire(const uint32_t* from, SIMT_AT) {
    simt::yield();
    simt::before_atomic(from, 4, at);
    simt::acquire(from, true);
    return *from;
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline void st_release(uint32_t* to, uint32_t v, SIMT_AT) {
    simt::before_atomic(to, 4, at);
    simt::release(to, true);
    simt::after_atomic(*to != v);
    *to = v;
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline uint32_t add_acq_rel(uint32_t* to, uint32_t v, SIMT_AT) {
    simt::before_atomic(to, 4, at);
    simt::release(to, true);
    const uint32_t old = *to;
    *to = old + v;
    simt::acquire(to, true);
    simt::after_atomic(v != 0);
    return old;
}
inline void grid_wait() { simt::grid_wait(); }
inline void grid_launch_dependents() {}
inline void cluster_sync(SIMT_AT) { simt::cluster_sync(true, at); }
inline void cluster_sync_relaxed(SIMT_AT) { simt::cluster_sync(false, at); }
template <class T>
const T* cluster_at(const T* shared, int rank, SIMT_AT) {
    return static_cast<const T*>(simt::cluster_at(shared, rank, at));
}

}  // namespace crop::ptx

// --- CUDA C++ ---------------------------------------------------------------------------------------------------------

inline void __syncthreads(SIMT_AT) { simt::barrier(simt::Op::kBarrier, 0, at); }
inline int __syncthreads_count(int predicate, SIMT_AT) { return simt::barrier(simt::Op::kBarrierCount, predicate, at); }
inline int __syncthreads_or(int predicate, SIMT_AT) { return simt::barrier(simt::Op::kBarrierOr, predicate, at); }
inline int __syncthreads_and(int predicate, SIMT_AT) { return simt::barrier(simt::Op::kBarrierAnd, predicate, at); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_AT) { simt::warp({simt::Op::kSync, mask, 0, 0, 32, nullptr, at, 0}); }
inline void __threadfence() { simt::fence(); }
inline void __threadfence_system() { simt::fence(); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { simt::yield(); }

#define SIMT_SHUFFLE(name, op)                                                 \
    template <class T>                                                         \
    T name(unsigned mask, T value, int argument, int width = 32, SIMT_AT) {    \
        return simt::shuffle(simt::Op::op, mask, value, argument, width, at);  \
    }
SIMT_SHUFFLE(__shfl_sync, kIndex)
SIMT_SHUFFLE(__shfl_up_sync, kUp)
SIMT_SHUFFLE(__shfl_down_sync, kDown)
SIMT_SHUFFLE(__shfl_xor_sync, kXor)

#define SIMT_REDUCE(name, op) \
    template <class T>        \
    T name(unsigned mask, T value, SIMT_AT) { return simt::reduce(simt::Op::op, mask, value, at); }
SIMT_REDUCE(__reduce_add_sync, kAdd)
SIMT_REDUCE(__reduce_min_sync, kMin)
SIMT_REDUCE(__reduce_max_sync, kMax)
SIMT_REDUCE(__reduce_and_sync, kAnd)
SIMT_REDUCE(__reduce_or_sync, kOr)
SIMT_REDUCE(__reduce_xor_sync, kExclusiveOr)

inline unsigned __ballot_sync(unsigned mask, bool value, SIMT_AT) { return simt::vote(simt::Op::kBallot, mask, value, at); }
inline int __any_sync(unsigned mask, bool value, SIMT_AT) { return simt::vote(simt::Op::kAny, mask, value, at); }
inline int __all_sync(unsigned mask, bool value, SIMT_AT) { return simt::vote(simt::Op::kAll, mask, value, at); }
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_AT) {
    return simt::shuffle<uint64_t>(simt::Op::kMatchAny, mask, simt::to_bits(value), 0, 32, at);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, SIMT_AT) {
    const unsigned same = simt::shuffle<uint64_t>(simt::Op::kMatchAll, mask, simt::to_bits(value), 0, 32, at);
    *all = same != 0;
    return same;
}

#define SIMT_ATOMIC(name, expression)                                                        \
    template <class T>                                                                       \
    T name(T* address, std::type_identity_t<T> value, SIMT_AT) {                             \
        return simt::atomic(address, [=]([[maybe_unused]] T old) -> T { return expression; }, at);            \
    }
SIMT_ATOMIC(atomicAdd, static_cast<T>(old + value))
SIMT_ATOMIC(atomicSub, static_cast<T>(old - value))
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicAnd, old & value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicExch, value)
SIMT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value, SIMT_AT) {
    return simt::atomic(address, [=](T old) -> T { return old == expected ? value : old; }, at);
}

template <class T>
T __ldg(const T* from) { return *from; }
template <class T>
T __ldca(const T* from) { return *from; }
template <class T>
T __ldcg(const T* from) { return *from; }
template <class T>
T __ldcs(const T* from) { return *from; }
template <class T>
void __stcg(T* to, std::type_identity_t<T> value) { *to = value; }
template <class T>
void __stcs(T* to, std::type_identity_t<T> value) { *to = value; }

template <class T>
T min(T a, std::type_identity_t<T> b) { return b < a ? b : a; }
template <class T>
T max(T a, std::type_identity_t<T> b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned choice = selector >> 4 * i & 15, byte = bytes >> 8 * (choice & 7) & 255;
        result |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return (static_cast<uint64_t>(high) << 32 | low) << (by & 31) >> 32;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (static_cast<uint64_t>(high) << 32 | low) >> (by & 31);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
