// Launchers of attention_mass: one kernel with the log-sum-exp given, three without.
#include <algorithm>

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
int launch_passes(AttentionMassParams p, Stream stream, PartialPass partial_pass, MassPass mass_pass) {
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
int launch_fp32(const AttentionMassParams& params, bool aligned, Stream stream) {
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

// How candidates and units are shared out; the bits of the result do not depend on it.
struct MmaShape {
    int tiles, subtiles, cluster, warps;  // a warp has tiles * 16 candidates, a block of so many warps subtiles as many
    int64_t blocks;
    bool staged;  // queries go by shared memory: pays where warps have the same

    int keys() const { return 16 * tiles * subtiles; }
    int ways() const { return warps / subtiles * cluster; }
};

// Every tile reads all queries of its sample, so it grows while they outweigh its keys, unless that leaves a warp so many
// columns that waiting for products takes longer than the bytes. Clusters keep an H100 busy with few tiles. The clocks are
// estimates for that GPU from its data sheet and the latencies of its instructions, for comparison only.
template <int kDim, int kMaxTiles, bool kChecked>
MmaShape mma_shape(const AttentionMassParams& p, int max_cluster) {
    constexpr int64_t kL2Bytes = 3200, kGroupClocks = 220, kBusyWarps = 8 * 132;  // per clock; of 8 columns; that hide latency
    const int64_t columns = p.num_rows * (p.num_heads / p.num_kv_heads);
    const int64_t parts = ceil_div(columns, kUnitColumns), units = p.num_kv_heads * parts;
    auto shape_of = [&](int keys) {
        const int tiles = keys >= 32 && kMaxTiles == 2 ? 2 : 1;
        MmaShape shape{tiles, keys / (16 * tiles), 1, tiles == 2 ? kMmaWarps<kDim, 2> : kMmaWarps<kDim, 1>, 0, false};
        while (shape.subtiles < shape.warps && shape.ways() > units) shape.subtiles *= 2;  // no warp without a unit
        while (shape.cluster < max_cluster && 2 * shape.ways() <= std::min<int64_t>(units, kSlots)) shape.cluster *= 2;
        const int64_t tiles_of_all = p.num_images * ceil_div(p.num_tokens, shape.keys());
        while (shape.cluster > 1 && tiles_of_all * shape.warps * shape.cluster >= 4 * kBusyWarps) shape.cluster /= 2;
        shape.blocks = tiles_of_all * shape.cluster;
        shape.staged = !kChecked && shape.subtiles > 1 && shape.warps == 4;
        return shape;
    };
    auto clocks = [&](const MmaShape& shape) {
        const int64_t bytes = p.num_rows * p.num_heads * p.head_dim * 2, warps = shape.blocks * shape.warps;
        const int64_t groups = ceil_div(units, shape.ways()) * ceil_div(std::min<int64_t>(columns, kUnitColumns), 8);
        return std::max(shape.blocks / shape.cluster * bytes / kL2Bytes, groups * kGroupClocks * std::max(warps, kBusyWarps) / kBusyWarps);
    };
    MmaShape best = shape_of(16);
    for (int keys = 32; keys <= 16 * kMaxTiles * kMmaWarps<kDim, kMaxTiles> && columns > keys / 4; keys *= 2) {
        const MmaShape shape = shape_of(keys);
        if (clocks(shape) < clocks(best)) best = shape;
    }
    return best;
}

template <int kDim, bool kChecked>
int launch_mma(const AttentionMassParams& params, Stream stream) {
    constexpr int kMaxTiles = kChecked || kDim > 128 ? 1 : 2;
    return launch_passes(
        params, stream,
        [&](Partial* partial, int splits) {
            return LAUNCH_DEPENDENT(params.batch * params.num_kv_heads * splits, 32 * kLseWarps<kDim>, 0, stream,
                                    (lse_mma_kernel<kDim, kChecked>), params, partial, splits);
        },
        [&](const AttentionMassParams& p, float unit) {
            constexpr int kFew = 32 * kMmaWarps<kDim, 1>, kMany = 32 * kMmaWarps<kDim, kMaxTiles>;
            const int largest = std::min({LARGEST_CLUSTER(stream.device, (mass_mma_kernel<kDim, 1, kChecked, false>), kFew),
                                          LARGEST_CLUSTER(stream.device, (mass_mma_kernel<kDim, kMaxTiles, kChecked, false>), kMany),
                                          LARGEST_CLUSTER(stream.device, (mass_mma_kernel<kDim, kMaxTiles, kChecked, !kChecked>), kMany)});
            const MmaShape s = mma_shape<kDim, kMaxTiles, kChecked>(p, largest);
            const int threads = 32 * s.warps;
            if (s.staged)
                return LAUNCH_CLUSTER(s.cluster, s.blocks, threads, 0, stream, (mass_mma_kernel<kDim, kMaxTiles, kChecked, !kChecked>),
                                      p, s.subtiles, s.cluster, unit);
            if (s.tiles == 1)
                return LAUNCH_CLUSTER(s.cluster, s.blocks, threads, 0, stream, (mass_mma_kernel<kDim, 1, kChecked, false>), p,
                                      s.subtiles, s.cluster, unit);
            return LAUNCH_CLUSTER(s.cluster, s.blocks, threads, 0, stream, (mass_mma_kernel<kDim, kMaxTiles, kChecked, false>), p,
                                  s.subtiles, s.cluster, unit);
        });
}

}  // namespace

size_t attention_mass_scratch(const AttentionMassParams& p) {
    if (p.lse) return 0;
    return static_cast<size_t>(lse_count(p)) * (num_splits(p) * sizeof(Partial) + sizeof(float));
}

extern "C" int launch_attention_mass(const AttentionMassParams* params, Stream stream) {
    AttentionMassParams p = *params;
    if (p.num_images == 0 || p.num_tokens == 0) return 0;
    if (p.num_images * ceil_div(p.num_tokens, 16) > kMaxGrid || p.num_keys > kMaxGrid || p.num_rows * p.num_heads > kMaxGrid ||
        p.batch * p.num_kv_heads * num_splits(p) > kMaxGrid || lse_count(p) > kMaxGrid || p.num_kv_heads > kMaxGrid / 256)
        return fail("attention_mass: sizes must be below 2^31, KV heads at most 2^23");
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
        case 72:  // its last quarter of a step is zeros, as behind any 64 + 8 n up to 80
        case 80: return launch_mma<80, false>(p, stream);
        case 96: return launch_mma<96, false>(p, stream);
        case 128: return launch_mma<128, false>(p, stream);
        case 256: return launch_mma<256, false>(p, stream);
    }
    return p.head_dim <= 128 ? launch_mma<128, true>(p, stream) : launch_mma<256, true>(p, stream);
}

}  // namespace crop
