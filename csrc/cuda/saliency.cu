// Launcher of saliency: three launches for a whole batch.
#include "saliency.cuh"

namespace crop {
namespace {

template <class T>
int launch_all(const SaliencyParams& p, Stream stream) {
    const int64_t slabs = ceil_div(p.dim, kMeanPieces * Piece<T>::kCount), blocks = p.num_images * slabs;
    const int64_t warps = ceil_div(p.num_images * p.num_places, kDistanceThreads / 32);
    if (blocks > kMaxGrid || warps > kMaxGrid) return fail("saliency: sizes must be below 2^31");
    const bool aligned = aligned16(p.tokens) && aligned16(p.mean) && p.token_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    int error = LAUNCH_DEPENDENT(blocks, kMeanThreads, 0, stream, saliency_mean_kernel<T>, p, static_cast<unsigned>(slabs), aligned);
    if (!error) error = LAUNCH_DEPENDENT(warps, kDistanceThreads, 0, stream, saliency_distance_kernel<T>, p, aligned);
    if (!error) error = LAUNCH_DEPENDENT(p.num_images, kWeightThreads, 0, stream, saliency_weight_kernel, p);
    return error;
}

}  // namespace

extern "C" int launch_saliency(const SaliencyParams* params, Stream stream) {
    if (params->num_images == 0 || params->num_places == 0 || params->num_tokens == 0)
        return fail("saliency: index must name a token; without any the weights are 1");
    return for_dtype("saliency", params->dtype, [&](auto zero) { return launch_all<decltype(zero)>(*params, stream); });
}

}  // namespace crop
