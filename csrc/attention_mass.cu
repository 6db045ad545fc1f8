// Launchers of attention_mass: one kernel with the log-sum-exp given, three without.
#include "attention_mass_fp32.cuh"
#include "attention_mass_mma.cuh"

namespace crop {
namespace {

int64_t num_splits(const AttentionMassParams& p) { return ceil_div(p.num_keys, split_keys(p.head_dim)); }
int64_t lse_count(const AttentionMassParams& p) { return p.batch * p.num_heads * p.num_rows; }

// Whole 16-byte pieces of every row of query and key are addressed by multiples of 16.
bool aligned_rows(const AttentionMassParams& p) {
    const int64_t size = p.dtype == kFloat32 ? 4 : 2;
    bool aligned = aligned16(p.query) && aligned16(p.key);
    const int64_t query_size[3] = {p.batch, p.num_heads, p.num_rows}, key_size[3] = {p.batch, p.num_kv_heads, p.num_keys};
    for (int i = 0; i < 3; ++i) {
        aligned = aligned && (query_size[i] <= 1 || p.query_stride[i] * size % 16 == 0);
        aligned = aligned && (key_size[i] <= 1 || p.key_stride[i] * size % 16 == 0);
    }
    return aligned;
}

// What is the same for every type. `partial_pass(partial, splits)` launches the first of the two log-sum-exp kernels,
// `mass_pass(p, unit)` the kernel of the result.
template <class PartialPass, class MassPass>
int launch_passes(AttentionMassParams p, void* stream, PartialPass partial_pass, MassPass mass_pass) {
    const int64_t splits = num_splits(p);
    if (p.lse || splits == 0 || lse_count(p) == 0) return mass_pass(p, kLog2E);
    Partial* partial = static_cast<Partial*>(p.scratch);
    float* lse = reinterpret_cast<float*>(partial + lse_count(p) * splits);
    int error = partial_pass(partial, static_cast<int>(splits));
    if (error) return error;
    const int64_t blocks = ceil_div(lse_count(p), kCombineThreads);
    error = LAUNCH_DEPENDENT(blocks, kCombineThreads, 0, stream, lse_combine_kernel, p, partial, split_keys(p.head_dim),
                             splits, lse);
    if (error) return error;
    p.lse = lse;
    return mass_pass(p, 1.0f);
}

template <class Shape>
int launch_fp32(const AttentionMassParams& params, bool aligned, void* stream) {
    return launch_passes(
        params, stream,
        [&](Partial* partial, int splits) {
            return LAUNCH_DEPENDENT(params.batch * params.num_kv_heads * splits, kTileThreads, 0, stream,
                                    lse_fp32_kernel<Shape>, params, aligned, partial, split_keys(params.head_dim), splits);
        },
        [&](const AttentionMassParams& p, float unit) {
            return LAUNCH_DEPENDENT(p.num_images * ceil_div(p.num_tokens, kTileKeys), kTileThreads, 0, stream,
                                    mass_fp32_kernel<Shape>, p, aligned, unit);
        });
}

// How the candidates are cut into tiles; the bits of the result do not depend on it. Every block reads all queries of its
// sample, so a tile grows while its queries outweigh its keys, as long as the blocks fill half of a large GPU.
struct MmaShape {
    int tiles, subtiles;  // a warp has tiles * 16 candidates, a block subtiles * tiles * 16
};
template <int kDim, int kMaxTiles>
MmaShape mma_shape(const AttentionMassParams& p) {
    const int64_t columns = p.num_rows * (p.num_heads / p.num_kv_heads);
    const int64_t units = p.num_kv_heads * ceil_div(columns, kUnitColumns);
    auto subtiles_for = [&](int warps, int64_t keys) {  // enough for `keys`, and no warp without a unit
        int subtiles = 1;
        while (subtiles < warps && (keys > subtiles || warps / subtiles > units)) subtiles *= 2;
        return subtiles;
    };
    int64_t keys = 16;
    while (keys < kMaxKeys && columns > keys / 2 && p.num_images * ceil_div(p.num_tokens, 2 * keys) >= 64) keys *= 2;
    if (keys >= 32 && kMaxTiles == 2) return {2, subtiles_for(kMmaWarps<kDim, 2>, keys / 32)};
    return {1, subtiles_for(kMmaWarps<kDim, 1>, keys / 16)};
}

template <int kDim, bool kChecked>
int launch_mma(const AttentionMassParams& params, void* stream) {
    constexpr int kMaxTiles = kChecked || kDim > 128 ? 1 : 2;
    return launch_passes(
        params, stream,
        [&](Partial* partial, int splits) {
            return LAUNCH_DEPENDENT(params.batch * params.num_kv_heads * splits, 32 * kLseWarps<kDim>, 0, stream,
                                    (lse_mma_kernel<kDim, kChecked>), params, partial, splits);
        },
        [&](const AttentionMassParams& p, float unit) {
            const MmaShape shape = mma_shape<kDim, kMaxTiles>(p);
            const int64_t blocks = p.num_images * ceil_div(p.num_tokens, 16 * shape.tiles * shape.subtiles);
            if (shape.tiles == 1)
                return LAUNCH_DEPENDENT(blocks, (32 * kMmaWarps<kDim, 1>), 0, stream, (mass_mma_kernel<kDim, 1, kChecked>), p,
                                        shape.subtiles, unit);
            return LAUNCH_DEPENDENT(blocks, (32 * kMmaWarps<kDim, kMaxTiles>), 0, stream,
                                    (mass_mma_kernel<kDim, kMaxTiles, kChecked>), p, shape.subtiles, unit);
        });
}

}  // namespace

size_t attention_mass_scratch(const AttentionMassParams& p) {
    if (p.lse) return 0;
    return static_cast<size_t>(lse_count(p)) * (num_splits(p) * sizeof(Partial) + sizeof(float));
}

extern "C" int launch_attention_mass(const AttentionMassParams* params, void* stream) {
    AttentionMassParams p = *params;
    if (p.num_images == 0 || p.num_tokens == 0) return 0;
    if (p.num_images * ceil_div(p.num_tokens, 16) > kMaxGrid || p.num_keys > kMaxGrid || p.num_rows * p.num_heads > kMaxGrid ||
        p.batch * p.num_kv_heads * num_splits(p) > kMaxGrid || lse_count(p) > kMaxGrid)
        return fail("attention_mass: sizes must be below 2^31");
    p.scale *= kLog2E;
    const bool aligned = aligned_rows(p);
    if (p.dtype == kFloat32) {
        const bool few = p.num_rows * (p.num_heads / p.num_kv_heads) <= FewColumns::kColumns;  // the same bits
        return few ? launch_fp32<FewColumns>(p, aligned, stream) : launch_fp32<ManyColumns>(p, aligned, stream);
    }
    if (p.dtype != kBFloat16 && p.dtype != kFloat16)
        return fail("attention_mass: dtype must be float32, bfloat16 or float16, got code %d", p.dtype);
    switch (aligned ? p.head_dim : 0) {
        case 64: return launch_mma<64, false>(p, stream);
        case 80: return launch_mma<80, false>(p, stream);
        case 96: return launch_mma<96, false>(p, stream);
        case 128: return launch_mma<128, false>(p, stream);
        case 256: return launch_mma<256, false>(p, stream);
    }
    return p.head_dim <= 128 ? launch_mma<128, true>(p, stream) : launch_mma<256, true>(p, stream);
}

}  // namespace crop
