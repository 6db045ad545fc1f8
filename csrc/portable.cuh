// The only file of the CUDA kernels that compilers see differently. nvcc gets the definitions below; any other compiler
// is an emulator of the CUDA execution model and supplies the same names ahead of this file (g++ -include).
//
//   GLOBAL(threads, blocks)    a kernel of at most so many threads per block, registers for so many blocks on an SM
//   DEV                        an inlined device function
//   SHARED(type, name, [n])    16-byte aligned static shared memory of one kernel; pass it to functions as a pointer
//   UNROLL                     unroll the loop that follows: its counter indexes registers
//   LAUNCH(grid, block, stream, kernel, arguments...)   asynchronous; returns the cudaError_t as int. Arguments convert
//                              to the parameter types of the kernel; a kernel name with commas needs parentheses.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GLOBAL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DEV __device__ __forceinline__
#define SHARED(type, name, extent) __shared__ __align__(16) type name extent
#define UNROLL _Pragma("unroll")
#define LAUNCH(grid, block, stream, kernel, ...) ::crop::launch(kernel, grid, block, stream, __VA_ARGS__)

namespace crop {
namespace {

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t grid, int block, void* stream, Arguments... arguments) {
    const dim3 blocks(static_cast<unsigned>(grid));
    kernel<<<blocks, block, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace crop
#endif
