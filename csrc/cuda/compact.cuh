// compact on CUDA: copies of rows, whatever they hold, for all tensors of a call in one launch.
#pragma once
#include "../common/device.cuh"

namespace crop {
namespace {

constexpr int kCopyThreads = 256;
constexpr int kCopyUnits = 4;                              // units of a thread, all on their way at once
constexpr int kBlockUnits = kCopyThreads * kCopyUnits;     // of a block
constexpr int kInvertThreads = 1024;
constexpr int kCopyTensors = 32;                           // of a launch: the table is a kernel parameter

// A tensor cut into units of 2^unit_log2 bytes and these into blocks of (rows, lanes): whole rows where they are short,
// parts of one row where they are long.
struct CopyJob {
    CompactTensor tensor;
    int64_t units;          // of a row
    int unit_log2;          // 0..4: 1, 2, 4, 8 or 16 bytes
    int lanes, rows;        // of a block; lanes * rows <= kBlockUnits
    unsigned pieces;        // blocks along a row
    unsigned first_block;   // number of the first block of this tensor
};
struct CopyTable {
    CopyJob job[kCopyTensors];
    int count;
};

template <class Unit>
DEV void copy_block(const CopyJob& job, int64_t num_rows, int64_t row0, int64_t unit0, const int64_t* offset, Unit zero) {
    Unit held[kCopyUnits];
    bool exists[kCopyUnits];
    char* target[kCopyUnits];
    UNROLL
    for (int i = 0; i < kCopyUnits; ++i) {
        const int at = i * kCopyThreads + threadIdx.x, row = at / job.lanes;
        const int64_t unit = unit0 + at % job.lanes;
        exists[i] = row < job.rows && row0 + row < num_rows && unit < job.units;
        held[i] = zero;
        if (!exists[i]) continue;
        const int64_t byte = unit * static_cast<int64_t>(sizeof(Unit));
        target[i] = job.tensor.target + (row0 + row) * job.tensor.row_bytes + byte;
        if (offset[row] >= 0) held[i] = __ldcs(reinterpret_cast<const Unit*>(job.tensor.source + offset[row] + byte));
    }
    UNROLL
    for (int i = 0; i < kCopyUnits; ++i)
        if (exists[i]) __stcs(reinterpret_cast<Unit*>(target[i]), held[i]);
}

// target[b, o, k] = source[b, o, index[b, k]], row by row; an index that is negative or too large gives zeros.
//
// A block owns a run of output rows, or a part of one. Its threads first turn the rows into source addresses (kept in
// shared memory), then copy units in lane order, so neighbours touch neighbouring bytes.
// Bytes: every kept row is read once and written once. Deterministic: one writer per byte.
GLOBAL(kCopyThreads, 5)
compact_kernel(CopyTable table, const int64_t* index, int64_t batch, int64_t num_kept) {
    SHARED(int64_t, offset, [kBlockUnits]);  // of a row's source in bytes; -1 = zeros
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    int t = 0;
    while (t + 1 < table.count && table.job[t + 1].first_block <= blockIdx.x) ++t;
    const CopyJob& job = table.job[t];
    const CompactTensor& tensor = job.tensor;
    const unsigned block = blockIdx.x - job.first_block;
    const int64_t row0 = static_cast<int64_t>(block / job.pieces) * job.rows;
    const int64_t unit0 = static_cast<int64_t>(block % job.pieces) * job.lanes;
    const int64_t num_rows = batch * tensor.outer * num_kept;
    for (int r = threadIdx.x; r < job.rows && row0 + r < num_rows; r += kCopyThreads) {
        const int64_t plane = (row0 + r) / num_kept, k = (row0 + r) % num_kept;
        const int64_t b = plane / tensor.outer, outer = plane % tensor.outer, j = index[b * num_kept + k];
        const bool exists = j >= 0 && j < tensor.num_tokens;
        offset[r] = exists ? b * tensor.batch_stride + outer * tensor.outer_stride + j * tensor.token_stride : -1;
    }
    __syncthreads();
    switch (job.unit_log2) {
        case 4: return copy_block<uint4>(job, num_rows, row0, unit0, offset, make_uint4(0, 0, 0, 0));
        case 3: return copy_block<uint2>(job, num_rows, row0, unit0, offset, make_uint2(0, 0));
        case 2: return copy_block<unsigned>(job, num_rows, row0, unit0, offset, 0);
        case 1: return copy_block<unsigned short>(job, num_rows, row0, unit0, offset, 0);
        default: return copy_block<unsigned char>(job, num_rows, row0, unit0, offset, 0);
    }
}

// inverse[b, index[b, k]] = k and -1 elsewhere; an index that is negative or too large is left out.
//
// A block owns a sample: it writes -1 everywhere, then the places of what was kept. Bytes: the index is read once, the inverse
// written once, kept places twice. Deterministic: an index has no place twice.
GLOBAL(kInvertThreads, 2)
invert_index_kernel(InverseParams p) {
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const int64_t b = blockIdx.x;
    const int64_t* index = p.index + b * p.num_kept;
    int64_t* inverse = p.inverse + b * p.num_tokens;
    for (int64_t n = threadIdx.x; n < p.num_tokens; n += kInvertThreads) inverse[n] = -1;
    __syncthreads();
    for (int64_t k = threadIdx.x; k < p.num_kept; k += kInvertThreads) {
        const int64_t j = index[k];
        if (j >= 0 && j < p.num_tokens) inverse[j] = k;
    }
}

}  // namespace
}  // namespace crop
