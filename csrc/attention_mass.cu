// Launchers of attention_mass: one kernel with the log-sum-exp given, three without.
#include "attention_mass.cuh"

namespace crop {
namespace {

constexpr int64_t kFewColumns = FewColumns::kColumns;  // both shapes give the same bits: the limit is a matter of speed

int64_t num_splits(const AttentionMassParams& p) { return ceil_div(p.num_keys, kSplitKeys); }
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

template <class T, class Shape>
int launch_shape(AttentionMassParams p, void* stream) {
    const bool aligned = aligned_rows(p);
    const int64_t blocks = p.num_images * ceil_div(p.num_tokens, kTileKeys);
    const int64_t splits = num_splits(p), split_blocks = p.batch * p.num_kv_heads * splits;
    if (blocks > kMaxGrid || p.num_keys > kMaxGrid || p.num_rows * p.num_heads > kMaxGrid || split_blocks > kMaxGrid ||
        lse_count(p) > kMaxGrid)
        return fail("attention_mass: sizes must be below 2^31");
    if (!p.lse && splits > 0 && lse_count(p) > 0) {
        Partial* partial = static_cast<Partial*>(p.scratch);
        float* lse = reinterpret_cast<float*>(partial + lse_count(p) * splits);
        int error = LAUNCH(split_blocks, kMassThreads, 0, stream, (lse_partial_kernel<T, Shape>), p, aligned, partial, splits);
        if (error) return error;
        error = LAUNCH(ceil_div(lse_count(p), kMassThreads), kMassThreads, 0, stream, lse_combine_kernel, p, partial, splits, lse);
        if (error) return error;
        p.lse = lse;
    }
    return LAUNCH(blocks, kMassThreads, 0, stream, (mass_kernel<T, Shape>), p, aligned);
}

}  // namespace

size_t attention_mass_scratch(const AttentionMassParams& p) {
    if (p.lse) return 0;
    return static_cast<size_t>(lse_count(p)) * (num_splits(p) * sizeof(Partial) + sizeof(float));
}

extern "C" int launch_attention_mass(const AttentionMassParams* params, void* stream) {
    const AttentionMassParams& p = *params;
    if (p.num_images == 0 || p.num_tokens == 0) return 0;
    return for_dtype("attention_mass", p.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool few = p.num_rows * (p.num_heads / p.num_kv_heads) <= kFewColumns;
        return few ? launch_shape<T, FewColumns>(p, stream) : launch_shape<T, ManyColumns>(p, stream);
    });
}

}  // namespace crop
