// Launcher of pack: one launch, one block per sample.
#include "pack.cuh"

namespace crop {

extern "C" int launch_pack(const PackParams* params, Stream stream) {
    if (params->batch == 0 || (params->width == 0 && params->num_tokens == 0)) return 0;
    if (params->batch > kMaxGrid) return fail("pack: batch must be below 2^31");
    return LAUNCH_DEPENDENT(params->batch, kPackThreads, 0, stream, pack_kernel, *params);
}

}  // namespace crop
