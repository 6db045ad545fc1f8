// The only file of the CUDA kernels that compilers see differently. nvcc gets the definitions below; any other compiler
// is an emulator of the CUDA execution model and supplies the same names ahead of this file (g++ -include).
//
//   GLOBAL(threads, blocks)    a kernel of at most so many threads per block, registers for so many blocks on an SM
//   DEV                        an inlined device function
//   SHARED(type, name, [n])    16-byte aligned static shared memory of one kernel; pass it to functions as a pointer. A
//                              type with a comma needs an alias; one per line.
//   DYN_SHARED(type, name)     `type* name`: the dynamic shared memory of the launch, 128-byte aligned
//   UNROLL                     unroll the loop that follows: its counter indexes registers
//   ROLLED                     do not unroll it: registers are dearer than its branch
//   LAUNCH(grid, block, smem, stream, kernel, arguments...)   asynchronous; returns the cudaError_t as int. `grid`: blocks
//                              along x (any integer) or dim3; `smem`: bytes of dynamic shared memory, up to what the device
//                              has. Arguments convert to the parameter types of the kernel; a kernel name with commas
//                              needs parentheses.
//   LAUNCH_DEPENDENT(...)      the same, but from sm_90 on the kernel may start before the one ahead of it on the stream has
//                              ended: it calls ptx::grid_wait() before it touches anything a kernel ahead of it touches.
//   LAUNCH_CLUSTER(blocks, ...)  the same, in clusters of so many blocks (1, 2, 4 or 8) with neighbouring blockIdx.x, which run
//                              at the same time; at most LARGEST_CLUSTER(device, kernel, threads)
//   ptx::                      one instruction each; no other `asm` and no __CUDA_ARCH__ outside this file
//
// What both compilers and the checks of the emulator understand:
//   - barriers __syncthreads{,_or,_and,_count}, __syncwarp; one barrier per source line
//   - __shfl*_sync, __ballot/any/all_sync, __match_any/all_sync, __reduce_*_sync with a mask of exactly the calling lanes;
//     no __activemask, no code that relies on lanes running in step without __syncwarp
//   - atomicAdd/Sub/Min/Max/And/Or/Xor/Exch/CAS/Inc on 32 and 64 bits, __threadfence; shared-memory atomics order nothing:
//     use a barrier
//   - no __ldg and no __restrict__ on what a kernel ahead may write: the compiler would trust that nobody does
//   - no memcpy or memset in kernels, no __device__ or __constant__ variables, no static variables, no heap
//   - waiting for another block: ptx::ld_acquire, never a plain or volatile load
#pragma once
#include <cstdint>

#include "ops.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

#define GLOBAL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DEV __device__ __forceinline__
#define SHARED(type, name, extent) __shared__ __align__(16) type name extent
#define DYN_SHARED(type, name)                                       \
    extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define LAUNCH(grid, block, smem, stream, kernel, ...) ::crop::launch(0, kernel, grid, block, smem, stream, __VA_ARGS__)
#define LAUNCH_DEPENDENT(grid, block, smem, stream, kernel, ...) LAUNCH_CLUSTER(1, grid, block, smem, stream, kernel, __VA_ARGS__)
#define LAUNCH_CLUSTER(cluster, grid, block, smem, stream, kernel, ...) \
    ::crop::launch(cluster, kernel, grid, block, smem, stream, __VA_ARGS__)
#define LARGEST_CLUSTER(device, kernel, threads) (::crop::largest_cluster<kernel>(device, threads))

namespace crop {
namespace {

inline dim3 as_grid(dim3 grid) { return grid; }
inline dim3 as_grid(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

constexpr int kDevices = 64;  // of which answers are remembered

// While it lives a capture on this thread allows what loading a kernel takes, of which it would otherwise know nothing.
class Uncaptured {
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;

  public:
    Uncaptured() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~Uncaptured() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    Uncaptured(const Uncaptured&) = delete;
};

// Architecture whose code a device, the current one, runs, 0 if it cannot be told. That of the device says too much: code
// compiled for an older one lacks what the newer one adds. All kernels of a build are compiled alike, so the first one answers
// for all.
inline int compiled_for(int device, const void* kernel) {
    static std::atomic<int> known[kDevices] = {};
    int arch = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
    cudaFuncAttributes attributes = {};
    if (arch == 0) {
        const Uncaptured asking;
        if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return cudaGetLastError(), 0;  // the launch will say why
        arch = attributes.ptxVersion;
        if (device < kDevices) known[device].store(arch, std::memory_order_relaxed);
    }
    return arch;
}

// cluster 0: a launch that depends on nothing but the order of the stream; 1: dependent; more: dependent, in clusters.
template <class Grid, class... Parameters, class... Arguments>
int launch(int cluster, void (*kernel)(Parameters...), Grid grid, int block, int64_t smem, Stream stream,
           Arguments... arguments) {
    if (smem > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
        if (error != cudaSuccess) return static_cast<int>(error);
    }
    const bool modern = cluster > 0 && compiled_for(stream.device, reinterpret_cast<const void*>(kernel)) >= 90;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = as_grid(grid), config.blockDim = dim3(static_cast<unsigned>(block));
    config.dynamicSmemBytes = static_cast<size_t>(smem), config.stream = static_cast<cudaStream_t>(stream.handle);
    config.attrs = attributes, config.numAttrs = !modern ? 0 : cluster > 1 ? 2 : 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (error != cudaSuccess) cudaGetLastError();  // reported here: not to be found by somebody else
    return static_cast<int>(error);
}

// Blocks of the largest cluster of a kernel that a device, the current one, can hold. A part of a GPU may have too few processors
// side by side for eight; it is asked once, since a launch that fails may end a capture.
template <auto kKernel>
int largest_cluster(int device, int threads) {
    static std::atomic<int> known[kDevices] = {};
    if (compiled_for(device, reinterpret_cast<const void*>(kKernel)) < 90) return 1;
    int largest = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
    if (largest > 0) return largest;
    const Uncaptured asking;
    for (largest = 8; largest > 1; largest /= 2) {
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(largest);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(static_cast<unsigned>(largest)), config.blockDim = dim3(static_cast<unsigned>(threads));
        config.attrs = &attribute, config.numAttrs = 1;
        int clusters = 0;
        if (cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config) == cudaSuccess && clusters > 0) break;
        cudaGetLastError();
    }
    if (device < kDevices) known[device].store(largest, std::memory_order_relaxed);
    return largest;
}

namespace ptx {

DEV unsigned shared_address(const void* shared) { return static_cast<unsigned>(__cvta_generic_to_shared(shared)); }

// d += a * b for a 16x16 (row major), b 16x8 (column major), d 16x8, over the warp. With g = lane / 4, t = lane % 4 a lane
// holds a[0..3] = the pairs (row g, g + 8, g, g + 8; columns 2t.. and, for the last two, 2t + 8..), b[0..1] = the pairs
// (rows 2t.. and 2t + 8..; column g), d[0..3] = (row g: columns 2t, 2t + 1; row g + 8: the same).
DEV void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEV void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Matrices of 8 rows of 16 bytes in shared memory; lane i names row i % 8 of matrix i / 8. A lane receives of each matrix
// the elements (row lane / 4, columns 2 * (lane % 4) and the next).
DEV void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
}
DEV void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
DEV void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Copies to shared memory in the background: the first `present` of 4, 8 or 16 bytes, then zeros. `from` must be a valid
// aligned address even if nothing is present. Visible to the issuing thread after cp_wait, to others after a barrier.
DEV void cp_async4(void* to, const void* from, int present = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(present) : "memory");
}
DEV void cp_async8(void* to, const void* from, int present = 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(present) : "memory");
}
DEV void cp_async16(void* to, const void* from, int present = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(present) : "memory");
}
DEV void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>  // all but the last so many groups have arrived
DEV void cp_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

DEV float ex2(float x) {  // 2^x, two ulp
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x is computed here, once, and not again wherever it is used.
DEV void settle(uint32_t& x) { asm volatile("" : "+r"(x)); }

// 16 bytes that nobody writes after grid_wait. once: leaves no trace in L1, and L2 fetches ahead. Not .nc: a dependent launch
// begins while the kernel ahead may still write what this one reads.
DEV uint4 load_once(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
DEV uint4 load_again(const uint4* from) {  // other blocks will want it: stays in L1 as long as possible
    uint4 v;
    asm volatile("ld.global.L1::evict_last.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
DEV void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }  // a hint
DEV void store_once(uint4* to, uint4 v) {  // not read again soon
    asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Synchronisation of blocks through a word in global memory.
DEV uint32_t ld_acquire(const uint32_t* from) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
DEV void st_release(uint32_t* to, uint32_t v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
DEV uint32_t add_acq_rel(uint32_t* to, uint32_t v) {  // returns the old value
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(to), "r"(v) : "memory");
    return old;
}

// Programmatic dependent launch: wait for everything ahead on the stream; allow the next kernel to start.
DEV void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEV void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A barrier of all threads of a cluster: each sees then what the others wrote to memory, shared memory included.
DEV void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// The barrier alone: nobody need see what others wrote, so nobody waits for writes. What a thread has read it must have used.
DEV void cluster_sync_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait;" ::: "memory");
#endif
}
// Where block `rank` of the cluster has what this block has at `shared`. Not before that block has begun, nor after it has
// ended: a cluster_sync stands ahead, at least a relaxed one behind.
template <class T>
DEV const T* cluster_at(const T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
    const T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
    return there;
#else
    return shared;
#endif
}

}  // namespace ptx
}  // namespace
}  // namespace crop
#endif
