// Launchers of compact: one launch for up to kCopyTensors tensors. The backward pass is the same kernel with the inverse index.
#include "compact.cuh"

namespace crop {
namespace {

// Largest unit that divides every address of the tensor.
int unit_log2(const CompactTensor& c, int64_t batch) {
    uint64_t all = reinterpret_cast<uintptr_t>(c.source) | reinterpret_cast<uintptr_t>(c.target) |
                   static_cast<uint64_t>(c.row_bytes) | 16;
    if (batch > 1) all |= static_cast<uint64_t>(c.batch_stride);
    if (c.outer > 1) all |= static_cast<uint64_t>(c.outer_stride);
    if (c.num_tokens > 1) all |= static_cast<uint64_t>(c.token_stride);
    return __builtin_ctzll(all);
}

// Fills the job; returns the number of its blocks.
int64_t plan_job(const CompactTensor& c, const CompactParams& p, CopyJob& job) {
    job.tensor = c;
    job.unit_log2 = unit_log2(c, p.batch);
    job.units = c.row_bytes >> job.unit_log2;
    job.lanes = static_cast<int>(job.units < kBlockUnits ? job.units : kBlockUnits);
    job.rows = kBlockUnits / job.lanes;
    const int64_t pieces = ceil_div(job.units, job.lanes);
    job.pieces = static_cast<unsigned>(pieces);
    return ceil_div(p.batch * c.outer * p.num_kept, job.rows) * pieces;
}

}  // namespace

extern "C" int launch_compact(const CompactParams* params, Stream stream) {
    const CompactParams& p = *params;
    if (p.batch == 0 || p.num_kept == 0) return 0;
    for (int64_t first = 0; first < p.num_tensors; first += kCopyTensors) {
        CopyTable table = {};
        int64_t blocks = 0;
        for (int64_t t = first; t < p.num_tensors && t < first + kCopyTensors; ++t) {
            CopyJob& job = table.job[table.count++];
            job.first_block = static_cast<unsigned>(blocks);
            blocks += plan_job(p.tensors[t], p, job);
            if (blocks > kMaxGrid) return fail("compact: tensors must have less than 2^31 blocks of rows in all");
        }
        const int error = LAUNCH_DEPENDENT(blocks, kCopyThreads, 0, stream, compact_kernel, table, p.index, p.batch, p.num_kept);
        if (error) return error;
    }
    return 0;
}

extern "C" int launch_invert_index(const InverseParams* params, Stream stream) {
    if (params->batch == 0 || params->num_tokens == 0) return 0;
    if (params->batch > kMaxGrid) return fail("invert_index: batch must be below 2^31");
    return LAUNCH_DEPENDENT(params->batch, kInvertThreads, 0, stream, invert_index_kernel, *params);
}

}  // namespace crop
