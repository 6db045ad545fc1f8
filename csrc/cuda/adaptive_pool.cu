// Launchers of adaptive_pool: one kernel per direction.
#include <initializer_list>

#include "adaptive_pool.cuh"

namespace crop {
namespace {

// Blocks for `num_rows` rows of `dim` elements, `count` elements to a piece and `rows` rows to a thread.
int64_t plan_grid(int64_t num_rows, int64_t rows, int64_t dim, int64_t count, PoolGrid& grid) {
    const int64_t pieces = ceil_div(dim, count), chunks = ceil_div(pieces, kPoolThreads);
    grid.chunks = static_cast<unsigned>(chunks);
    grid.lanes = static_cast<int>(ceil_div(pieces, chunks));
    grid.rows = kPoolThreads / grid.lanes;
    return ceil_div(num_rows, grid.rows * rows) * chunks;
}

// Whole 16-byte pieces of every row are addressed by multiples of 16.
bool aligned_rows(int64_t stride, int64_t size, std::initializer_list<const void*> pointers) {
    bool aligned = stride * size % 16 == 0;
    for (const void* pointer : pointers) aligned = aligned && aligned16(pointer);
    return aligned;
}

template <class T>
int launch_forward(PoolParams p, Stream stream) {
    if (p.num_tokens == 0) p.num_members = 0;
    const int64_t size = sizeof(T);
    const bool aligned = aligned_rows(p.token_stride, size, {p.tokens}) && aligned_rows(p.dim, size, {p.out, p.saved});
    PoolGrid grid;
    const int64_t blocks = plan_grid(p.num_out, 1, p.dim, Piece<T>::kCount, grid);
    if (blocks > kMaxGrid || p.num_members > kMaxGrid || p.num_tokens > kMaxGrid)
        return fail("adaptive_pool: sizes must be below 2^31");
    switch (p.mode) {
        case kMean: return LAUNCH_DEPENDENT(blocks, kPoolThreads, 0, stream, (pool_kernel<T, kMean>), p, grid, aligned);
        case kWeighted: return LAUNCH_DEPENDENT(blocks, kPoolThreads, 0, stream, (pool_kernel<T, kWeighted>), p, grid, aligned);
        default: return LAUNCH_DEPENDENT(blocks, kPoolThreads, 0, stream, (pool_kernel<T, kMax>), p, grid, aligned);
    }
}

template <class T>
int launch_backward(const PoolBackwardParams& p, Stream stream) {
    const int64_t size = sizeof(T);
    bool aligned = aligned_rows(p.dim, size, {p.grad, p.grad_tokens});
    if (p.mode == kMax) aligned = aligned && aligned16(p.saved);
    if (p.mode == kWeighted) aligned = aligned && aligned_rows(p.token_stride, size, {p.tokens, p.out});
    PoolGrid grid;
    int64_t blocks = plan_grid(p.num_tokens, kAhead, p.dim, Piece<T>::kCount, grid);
    if (p.mode == kWeighted) blocks = ceil_div(p.num_tokens, kPoolThreads / 32);
    if (blocks > kMaxGrid || p.num_tokens > kMaxGrid) return fail("adaptive_pool: sizes must be below 2^31");
    switch (p.mode) {
        case kMean: return LAUNCH_DEPENDENT(blocks, kPoolThreads, 0, stream, (pool_backward_kernel<T, kMean>), p, grid, aligned);
        case kMax: return LAUNCH_DEPENDENT(blocks, kPoolThreads, 0, stream, (pool_backward_kernel<T, kMax>), p, grid, aligned);
        default: return LAUNCH_DEPENDENT(blocks, kPoolThreads, 0, stream, pool_weighted_backward_kernel<T>, p, aligned);
    }
}

}  // namespace

extern "C" int launch_adaptive_pool(const PoolParams* params, Stream stream) {
    if (params->num_out == 0 || params->dim == 0) return 0;
    return for_dtype("adaptive_pool", params->dtype,
                     [&](auto zero) { return launch_forward<decltype(zero)>(*params, stream); });
}

extern "C" int launch_adaptive_pool_backward(const PoolBackwardParams* params, Stream stream) {
    if (params->num_tokens == 0 || params->dim == 0) return 0;
    return for_dtype("adaptive_pool", params->dtype,
                     [&](auto zero) { return launch_backward<decltype(zero)>(*params, stream); });
}

}  // namespace crop
