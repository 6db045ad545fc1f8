// crop._C: one function per launcher, pointers as integers; planning takes addresses and returns arrays. Repeats the checks that
// protect memory; crop/ops does the rest.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "common/dispatch.h"
#include "common/ops.h"
#include "host/planning.h"

// setup.py defines CROP_HAVE_CUDA (0 or 1), CROP_CUDA_ARCHS (e.g. "80 90 90+PTX") and CROP_NVCC (its release).
#if CROP_HAVE_CUDA
#define CROP_ON_CUDA(launcher) {launcher}
#else
#define CROP_ON_CUDA(launcher) {}
#endif

namespace py = pybind11;
using namespace py::literals;

namespace bind {
namespace {

using crop::fail;
using Pointer = uintptr_t;  // Tensor.data_ptr(); 0 = absent
constexpr int kCpu = -1;

template <class T>
T* to(Pointer pointer) {
    return reinterpret_cast<T*>(pointer);
}

bool negative(std::initializer_list<int64_t> sizes) {
    for (int64_t size : sizes)
        if (size < 0) return true;
    return false;
}

int cuda_result(int code) {
#if CROP_HAVE_CUDA
    if (code > 0) fail("CUDA error %d: %s", code, crop::cuda_error_text(code));
#endif
    return code;
}

template <class Params>
struct CudaLauncher {
    int (*function)(const Params*, crop::Stream) = nullptr;
};

// Runs the launcher without the interpreter lock. `device`: number of the current CUDA device, or kCpu; `target`: the handle of
// its stream, or the number of threads.
template <class Params>
int launch(int device, int64_t target, const Params& params, int (*on_cpu)(const Params&, int),
           CudaLauncher<Params> on_cuda) {
    py::gil_scoped_release release;
    if (device == kCpu) return on_cpu(params, static_cast<int>(target));
    if (!on_cuda.function) return fail("crop was built without CUDA kernels");
    return cuda_result(on_cuda.function(&params, {device, to<void>(target)}));
}

// batch, num_heads, num_kv_heads, num_rows, num_keys, head_dim, num_images, num_tokens
using MassSizes = std::array<int64_t, 8>;

crop::AttentionMassParams mass_params(const MassSizes& sizes) {
    crop::AttentionMassParams p{};
    p.batch = sizes[0], p.num_heads = sizes[1], p.num_kv_heads = sizes[2], p.num_rows = sizes[3];
    p.num_keys = sizes[4], p.head_dim = sizes[5], p.num_images = sizes[6], p.num_tokens = sizes[7];
    return p;
}

size_t mass_scratch(int device, const crop::AttentionMassParams& p) {
    if (p.num_kv_heads < 1 || negative({p.num_heads, p.num_rows, p.num_keys, p.head_dim})) return 0;
#if CROP_HAVE_CUDA
    if (device != kCpu) return crop::attention_mass_scratch(p);
#else
    (void)device;
#endif
    return crop::attention_mass_scratch_cpu(p);
}

size_t attention_mass_scratch(int device, const MassSizes& sizes, bool own_lse) {
    crop::AttentionMassParams p = mass_params(sizes);
    static const float given = 0;
    p.lse = own_lse ? nullptr : &given;  // only its presence counts
    return mass_scratch(device, p);
}

int attention_mass(int device, int64_t target, Pointer query, Pointer key, Pointer vision_index, Pointer sample,
                   Pointer lse, Pointer visible_start, Pointer visible_len, Pointer mass, Pointer scratch,
                   size_t scratch_bytes, const MassSizes& sizes, const std::array<int64_t, 3>& query_stride,
                   const std::array<int64_t, 3>& key_stride, float scale, int dtype) {
    crop::AttentionMassParams p = mass_params(sizes);
    p.query = to<void>(query), p.key = to<void>(key), p.vision_index = to<int64_t>(vision_index);
    p.sample = to<int64_t>(sample), p.lse = to<float>(lse), p.visible_start = to<int64_t>(visible_start);
    p.visible_len = to<int64_t>(visible_len), p.mass = to<float>(mass), p.scratch = to<void>(scratch);
    for (int i = 0; i < 3; ++i) p.query_stride[i] = query_stride[i], p.key_stride[i] = key_stride[i];
    p.scale = scale, p.dtype = dtype;
    if (p.num_kv_heads < 1 || p.num_heads % p.num_kv_heads || p.head_dim < 1 || p.head_dim > 256 ||
        negative({p.batch, p.num_heads, p.num_rows, p.num_keys, p.num_images, p.num_tokens}))
        return fail("attention_mass: sizes must be consistent");
    if (!sample && p.num_images != p.batch) return fail("attention_mass: sample must be given for images != batch");
    if (scratch_bytes < mass_scratch(device, p)) return fail("attention_mass: scratch must be larger");
    return launch(device, target, p, crop::launch_attention_mass_cpu, CROP_ON_CUDA(crop::launch_attention_mass));
}

int select(int device, int64_t target, Pointer score, Pointer weight, Pointer priority, Pointer index,
           const std::vector<int64_t>& budget, Pointer kept, int64_t num_images, int64_t num_tokens, int64_t width) {
    const crop::SelectParams p{to<float>(score), to<float>(weight), to<int8_t>(priority), to<int64_t>(index),
                               budget.data(),    to<int64_t>(kept), num_images,           num_tokens,
                               width};
    if (negative({num_images, num_tokens, width}) || budget.size() != static_cast<size_t>(num_images))
        return fail("select: sizes must be consistent");
    for (int64_t keep : budget)
        if (keep < 0 || keep > num_tokens || keep > width) return fail("select: num_keep must be in [0, num_vision]");
    return launch(device, target, p, crop::launch_select_cpu, CROP_ON_CUDA(crop::launch_select));
}

int pack(int device, int64_t target, Pointer stays, Pointer kept, Pointer sample, Pointer kept_index, Pointer slot_of,
         int64_t batch, int64_t num_tokens, int64_t num_images, int64_t num_kept, int64_t width) {
    const crop::PackParams p{to<uint8_t>(stays),   to<int64_t>(kept), to<int64_t>(sample), to<int64_t>(kept_index),
                             to<int64_t>(slot_of), batch,             num_tokens,          num_images,
                             num_kept,             width};
    if (negative({batch, num_tokens, num_images, num_kept, width})) return fail("pack: sizes must not be negative");
    if (!sample && num_images != batch && num_images) return fail("pack: sample must be given for images != batch");
    return launch(device, target, p, crop::launch_pack_cpu, CROP_ON_CUDA(crop::launch_pack));
}

// source, target, outer, num_tokens, row_bytes, batch_stride, outer_stride, token_stride
using CompactRow = std::tuple<Pointer, Pointer, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

int compact(int device, int64_t target, const std::vector<CompactRow>& table, Pointer index, int64_t batch,
            int64_t num_kept) {
    std::vector<crop::CompactTensor> tensors;
    for (const auto& [source, result, outer, num_tokens, row_bytes, batch_stride, outer_stride, token_stride] : table) {
        if (negative({outer, num_tokens, row_bytes})) return fail("compact: sizes must not be negative");
        if (outer == 0 || row_bytes == 0) continue;
        tensors.push_back({to<char>(source), to<char>(result), outer, num_tokens, row_bytes, batch_stride, outer_stride,
                           token_stride});
    }
    if (negative({batch, num_kept})) return fail("compact: sizes must not be negative");
    const crop::CompactParams p{tensors.data(), to<int64_t>(index), static_cast<int64_t>(tensors.size()), batch, num_kept};
    return launch(device, target, p, crop::launch_compact_cpu, CROP_ON_CUDA(crop::launch_compact));
}

int invert_index(int device, int64_t target, Pointer index, Pointer inverse, int64_t batch, int64_t num_kept,
                 int64_t num_tokens) {
    if (negative({batch, num_kept, num_tokens})) return fail("invert_index: sizes must not be negative");
    const crop::InverseParams p{to<int64_t>(index), to<int64_t>(inverse), batch, num_kept, num_tokens};
    return launch(device, target, p, crop::launch_invert_index_cpu, CROP_ON_CUDA(crop::launch_invert_index));
}

int spread(int device, int64_t target, Pointer alike, Pointer near, Pointer chosen, int64_t num_tokens, int64_t count,
           int64_t at_once, int64_t row_stride, bool fresh) {
    const crop::SpreadParams p{to<float>(alike), to<float>(near), to<int64_t>(chosen), num_tokens,
                               count,            at_once,         row_stride,          fresh};
    if (count < 0 || count > num_tokens || at_once < 1)
        return fail("spread: count must be in [0, num_tokens] and at_once at least 1");
    return launch(device, target, p, crop::launch_spread_cpu, CROP_ON_CUDA(crop::launch_spread));
}

int saliency(int device, int64_t target, Pointer tokens, Pointer index, Pointer alone, Pointer mean, Pointer weight,
             int64_t num_tokens, int64_t dim, int64_t num_images, int64_t num_places, int64_t token_stride,
             const std::array<float, 3>& constants, int dtype) {
    const crop::SaliencyParams p{to<void>(tokens), to<int64_t>(index), to<uint8_t>(alone), to<float>(mean),
                                 to<float>(weight), num_tokens,        dim,                num_images,
                                 num_places,       token_stride,       constants[0],       constants[1],
                                 constants[2],     dtype};
    if (negative({num_tokens, dim, num_images, num_places})) return fail("saliency: sizes must not be negative");
    return launch(device, target, p, crop::launch_saliency_cpu, CROP_ON_CUDA(crop::launch_saliency));
}

int adaptive_pool(int device, int64_t target, Pointer tokens, Pointer members, Pointer offsets, Pointer weight,
                  Pointer out, Pointer saved, int64_t num_tokens, int64_t dim, int64_t num_members, int64_t num_out,
                  int64_t token_stride, int dtype, int mode) {
    const crop::PoolParams p{to<void>(tokens), to<int32_t>(members), to<int32_t>(offsets), to<float>(weight),
                             to<void>(out),    to<void>(saved),      num_tokens,           dim,
                             num_members,      num_out,              token_stride,         dtype,
                             mode};
    if (negative({num_tokens, dim, num_members, num_out}) || mode < crop::kMean || mode > crop::kMax)
        return fail("adaptive_pool: sizes must not be negative and mode must be known");
    if (mode == crop::kWeighted && !weight) return fail("adaptive_pool: weight must be given for this mode");
    return launch(device, target, p, crop::launch_adaptive_pool_cpu, CROP_ON_CUDA(crop::launch_adaptive_pool));
}

int adaptive_pool_backward(int device, int64_t target, Pointer grad, Pointer tokens, Pointer out, Pointer saved,
                           Pointer offsets, Pointer inverse, Pointer weight, Pointer grad_tokens, Pointer grad_weight,
                           int64_t num_tokens, int64_t dim, int64_t num_out, int64_t token_stride, int dtype, int mode) {
    const crop::PoolBackwardParams p{to<void>(grad),        to<void>(tokens),     to<void>(out),    to<void>(saved),
                                     to<int32_t>(offsets),  to<int32_t>(inverse), to<float>(weight), to<void>(grad_tokens),
                                     to<float>(grad_weight), num_tokens,          dim,              num_out,
                                     token_stride,          dtype,                mode};
    if (negative({num_tokens, dim, num_out}) || mode < crop::kMean || mode > crop::kMax)
        return fail("adaptive_pool: sizes must not be negative and mode must be known");
    if ((mode == crop::kWeighted && (!weight || !tokens || !out || !saved || !grad_weight)) ||
        (mode == crop::kMax && !saved && num_out))
        return fail("adaptive_pool: the tensors of the forward pass must be given");
    return launch(device, target, p, crop::launch_adaptive_pool_backward_cpu,
                  CROP_ON_CUDA(crop::launch_adaptive_pool_backward));
}

// VisionLayout.address: num_tokens, position, center, row, col, view, kind, what keeps them.
using LayoutRow = std::tuple<int64_t, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, py::object>;
// PoolPlan.address: num_out, members, offsets, leader, what keeps them.
using CellsRow = std::tuple<int64_t, Pointer, Pointer, Pointer, py::object>;
using Boxes = std::vector<std::array<float, 4>>;

crop::PlanLayout plan_layout(const LayoutRow& row) {
    const auto& [num_tokens, position, center, rows, cols, views, kind, kept] = row;
    return {num_tokens,        to<int64_t>(position), to<float>(center), to<int32_t>(rows), to<int32_t>(cols),
            to<int32_t>(views), to<uint8_t>(kind)};
}

crop::PlanGiven plan_given(const CellsRow& row) {
    const auto& [num_out, members, offsets, leader, kept] = row;
    return {num_out, to<int32_t>(members), to<int32_t>(offsets), to<int32_t>(leader)};
}

std::vector<crop::PlanBox> plan_boxes(const Boxes& boxes) {
    std::vector<crop::PlanBox> found;
    for (const auto& [x0, y0, x1, y1] : boxes) found.push_back({x0, y0, x1, y1});
    return found;
}

template <class T>
py::array_t<T> array_of(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

void check_plan(int code) {
    if (code) throw py::value_error(crop::last_error());
}

py::array plan_levels(const LayoutRow& layout, const Boxes& boxes, int ring) {
    py::array_t<uint8_t> level(std::get<0>(layout));
    crop::plan_levels(plan_layout(layout), plan_boxes(boxes), ring, level.mutable_data());
    return level;
}

py::tuple plan_cells(const LayoutRow& layout, const Boxes& boxes, int ring, const std::array<int, 3>& strides, int64_t budget) {
    const crop::PlanCells cells = crop::plan_cells(plan_layout(layout), plan_boxes(boxes), ring, strides.data(), budget);
    return py::make_tuple(array_of(cells.members), array_of(cells.offsets), array_of(cells.leader), array_of(cells.level));
}

py::tuple plan_pooled(const LayoutRow& layout, const CellsRow& cells) {
    const py::ssize_t count = std::get<0>(cells);
    py::array_t<float> center({count, py::ssize_t{2}});
    py::array_t<int32_t> row(count), col(count), view(count);
    py::array_t<uint8_t> kind(count);
    check_plan(crop::plan_pooled(plan_layout(layout), plan_given(cells),
                                 {center.mutable_data(), row.mutable_data(), col.mutable_data(), view.mutable_data(),
                                  kind.mutable_data()}));
    return py::make_tuple(center, row, col, view, kind);
}

py::tuple plan_leaders(const py::array_t<bool, py::array::c_style>& valid,
                       const std::vector<std::tuple<int64_t, LayoutRow, CellsRow>>& rows) {
    std::vector<crop::PlanImage> images;
    for (const auto& [sample, layout, cells] : rows) images.push_back({sample, plan_layout(layout), plan_given(cells)});
    const py::ssize_t batch = valid.shape(0), seq_len = valid.shape(1);
    py::array_t<int64_t> leader_of({batch, seq_len});
    std::vector<int64_t> counts(batch);
    check_plan(crop::plan_leaders(valid.data(), batch, seq_len, images, leader_of.mutable_data(), counts.data()));
    return py::make_tuple(leader_of, counts);
}

py::tuple plan_pool(const py::array_t<int64_t, py::array::c_style>& leader_of, py::ssize_t width) {
    const py::ssize_t batch = leader_of.shape(0), seq_len = leader_of.shape(1);
    py::array_t<int64_t> kept_index({batch, width}), slot_of({batch, seq_len}), source(batch * seq_len);
    py::array_t<bool> alone(batch * seq_len), real({batch, width});
    py::array_t<int32_t> offsets(batch * width + 1), leader(batch * width);
    std::vector<int32_t> members;
    check_plan(crop::plan_pool(leader_of.data(), batch, seq_len, width,
                               {kept_index.mutable_data(), slot_of.mutable_data(), source.mutable_data(), alone.mutable_data(),
                                real.mutable_data(), offsets.mutable_data(), leader.mutable_data()},
                               members));
    return py::make_tuple(kept_index, slot_of, source, alone, real, array_of(members), offsets, leader);
}

py::dict build_info() {
    py::list isas;
    for (int build = 0; build < crop::num_builds(); ++build) isas.append(crop::build_name(build));
    return py::dict("cuda"_a = bool(CROP_HAVE_CUDA), "cuda_archs"_a = CROP_CUDA_ARCHS, "nvcc"_a = CROP_NVCC, "cpu_isas"_a = isas,
                    "cpu_isa"_a = crop::active_isa(), "compiler"_a = __VERSION__);
}

}  // namespace
}  // namespace bind

PYBIND11_MODULE(_C, m) {
    m.attr("has_cuda") = bool(CROP_HAVE_CUDA);
    m.def("build_info", &bind::build_info);
    m.def("set_isa", &crop::set_isa, "name"_a);
    m.def("last_error", &crop::last_error);
    m.def("attention_mass_scratch", &bind::attention_mass_scratch);
    m.def("attention_mass", &bind::attention_mass);
    m.def("select", &bind::select);
    m.def("pack", &bind::pack);
    m.def("compact", &bind::compact);
    m.def("invert_index", &bind::invert_index);
    m.def("spread", &bind::spread);
    m.def("saliency", &bind::saliency);
    m.def("adaptive_pool", &bind::adaptive_pool);
    m.def("adaptive_pool_backward", &bind::adaptive_pool_backward);
    m.def("plan_levels", &bind::plan_levels);
    m.def("plan_cells", &bind::plan_cells);
    m.def("plan_pooled", &bind::plan_pooled);
    m.def("plan_leaders", &bind::plan_leaders);
    m.def("plan_pool", &bind::plan_pool);
}
