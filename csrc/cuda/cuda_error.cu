// Texts of CUDA errors, with advice where the usual cause is known.
#include <cuda_runtime.h>

#include "../common/ops.h"

namespace crop {

const char* cuda_error_text(int code) {
    switch (code) {
        case cudaErrorInsufficientDriver:
            return "the NVIDIA driver is missing or older than the CUDA release crop was built with (crop.build_info()): "
                   "update the driver or rebuild with an older nvcc";
        case cudaErrorNoKernelImageForDevice:
            return "crop was built for other GPU architectures (crop.build_info()): rebuild with CROP_CUDA_ARCHS set to "
                   "the compute capability of this GPU";
    }
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace crop
