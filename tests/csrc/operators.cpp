// Between csrc/bindings.cpp and the emulated launchers (linked with --wrap): every tensor that the parameters name is moved to
// device memory of exactly its extent. In place of the CPU kernels: nothing.
#include "../../csrc/common/ops.h"

#include <cstdarg>
#include <cstdio>
#include <initializer_list>
#include <vector>

extern "C" {
void* emu_take(const char*, void*, int64_t row_bytes, int axes, const int64_t* sizes, const int64_t* strides, int output);
void emu_give_back();
const char* emu_report();
}

namespace crop {
namespace {

char message[512] = "";

struct Axis {
    int64_t size, stride;  // in elements
};

struct Device {
    ~Device() { emu_give_back(); }

    template <class T>
    void take(const char* name, T*& pointer, int64_t element, int64_t row, std::initializer_list<Axis> axes, bool output) {
        std::vector<int64_t> sizes, strides;
        for (Axis axis : axes) sizes.push_back(axis.size), strides.push_back(axis.stride * element);
        pointer = static_cast<T*>(emu_take(name, const_cast<void*>(static_cast<const void*>(pointer)), row * element,
                                           static_cast<int>(sizes.size()), sizes.data(), strides.data(), output));
    }
    template <class T>
    void in(const char* name, T*& pointer, int64_t count, int64_t element = sizeof(T)) {
        take(name, pointer, element, count, {}, false);
    }
    template <class T>
    void out(const char* name, T*& pointer, int64_t count, int64_t element = sizeof(T)) {
        take(name, pointer, element, count, {}, true);
    }
};

int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace

extern "C" {

int __real_launch_attention_mass(const AttentionMassParams*, Stream);
int __wrap_launch_attention_mass(const AttentionMassParams* params, Stream stream) {
    AttentionMassParams p = *params;
    Device device;
    const int64_t size = size_of(p.dtype), candidates = p.num_images * p.num_tokens;
    const int64_t *q = p.query_stride, *k = p.key_stride;
    device.take("query", p.query, size, p.head_dim, {{p.batch, q[0]}, {p.num_heads, q[1]}, {p.num_rows, q[2]}}, false);
    device.take("key", p.key, size, p.head_dim, {{p.batch, k[0]}, {p.num_kv_heads, k[1]}, {p.num_keys, k[2]}}, false);
    device.in("vision_index", p.vision_index, candidates);
    device.in("sample", p.sample, p.num_images);
    device.in("lse", p.lse, p.batch * p.num_heads * p.num_rows);
    device.in("visible_start", p.visible_start, p.batch);
    device.in("visible_len", p.visible_len, p.batch * p.num_rows);
    device.out("mass", p.mass, candidates);
    device.out("scratch", p.scratch, static_cast<int64_t>(attention_mass_scratch(p)), 1);
    return __real_launch_attention_mass(&p, stream);
}

int __real_launch_select(const SelectParams*, Stream);
int __wrap_launch_select(const SelectParams* params, Stream stream) {
    SelectParams p = *params;
    Device device;
    const int64_t candidates = p.num_images * p.num_tokens;
    device.in("score", p.score, candidates);
    device.in("weight", p.weight, candidates);
    device.in("priority", p.priority, candidates);
    device.in("index", p.index, candidates);
    device.out("kept", p.kept, p.num_images * p.width);
    return __real_launch_select(&p, stream);
}

int __real_launch_pack(const PackParams*, Stream);
int __wrap_launch_pack(const PackParams* params, Stream stream) {
    PackParams p = *params;
    Device device;
    device.in("stays", p.stays, p.batch * p.num_tokens);
    device.in("kept", p.kept, p.num_images * p.num_kept);
    device.in("sample", p.sample, p.num_images);
    device.out("kept_index", p.kept_index, p.batch * p.width);
    device.out("slot_of", p.slot_of, p.batch * p.num_tokens);
    return __real_launch_pack(&p, stream);
}

int __real_launch_compact(const CompactParams*, Stream);
int __wrap_launch_compact(const CompactParams* params, Stream stream) {
    CompactParams p = *params;
    Device device;
    std::vector<CompactTensor> tensors(p.tensors, p.tensors + p.num_tensors);
    for (CompactTensor& t : tensors) {
        device.take("source", t.source, 1, t.row_bytes,
                    {{p.batch, t.batch_stride}, {t.outer, t.outer_stride}, {t.num_tokens, t.token_stride}}, false);
        device.out("target", t.target, p.batch * t.outer * p.num_kept * t.row_bytes);
    }
    p.tensors = tensors.data();
    device.in("index", p.index, p.batch * p.num_kept);
    return __real_launch_compact(&p, stream);
}

int __real_launch_invert_index(const InverseParams*, Stream);
int __wrap_launch_invert_index(const InverseParams* params, Stream stream) {
    InverseParams p = *params;
    Device device;
    device.in("index", p.index, p.batch * p.num_kept);
    device.out("inverse", p.inverse, p.batch * p.num_tokens);
    return __real_launch_invert_index(&p, stream);
}

int __real_launch_spread(const SpreadParams*, Stream);
int __wrap_launch_spread(const SpreadParams* params, Stream stream) {
    SpreadParams p = *params;
    Device device;
    device.take("alike", p.alike, sizeof(float), p.num_tokens, {{p.num_tokens, p.row_stride}}, false);
    device.in("near", p.near, p.num_tokens);
    device.out("chosen", p.chosen, p.count);
    return __real_launch_spread(&p, stream);
}

int __real_launch_saliency(const SaliencyParams*, Stream);
int __wrap_launch_saliency(const SaliencyParams* params, Stream stream) {
    SaliencyParams p = *params;
    Device device;
    device.take("tokens", p.tokens, size_of(p.dtype), p.dim, {{p.num_tokens, p.token_stride}}, false);
    device.in("index", p.index, p.num_images * p.num_places);
    device.in("alone", p.alone, p.num_tokens);
    device.out("mean", p.mean, p.num_images * p.dim);
    device.out("weight", p.weight, p.num_tokens);
    return __real_launch_saliency(&p, stream);
}

int __real_launch_adaptive_pool(const PoolParams*, Stream);
int __wrap_launch_adaptive_pool(const PoolParams* params, Stream stream) {
    PoolParams p = *params;
    Device device;
    const int64_t size = size_of(p.dtype);
    device.take("tokens", p.tokens, size, p.dim, {{p.num_tokens, p.token_stride}}, false);
    device.in("members", p.members, p.num_members);
    device.in("offsets", p.offsets, p.num_out + 1);
    device.in("weight", p.weight, p.num_tokens);
    device.out("out", p.out, p.num_out * p.dim, size);
    device.out("saved", p.saved, p.num_out * (p.mode == kMax ? p.dim : 1), 4);
    return __real_launch_adaptive_pool(&p, stream);
}

int __real_launch_adaptive_pool_backward(const PoolBackwardParams*, Stream);
int __wrap_launch_adaptive_pool_backward(const PoolBackwardParams* params, Stream stream) {
    PoolBackwardParams p = *params;
    Device device;
    const int64_t size = size_of(p.dtype);
    device.in("grad", p.grad, p.num_out * p.dim, size);
    device.take("tokens", p.tokens, size, p.dim, {{p.num_tokens, p.token_stride}}, false);
    device.in("out", p.out, p.num_out * p.dim, size);
    device.in("saved", p.saved, p.num_out * (p.mode == kMax ? p.dim : 1), 4);
    device.in("offsets", p.offsets, p.num_out + 1);
    device.in("inverse", p.inverse, p.num_tokens);
    device.in("weight", p.weight, p.num_tokens);
    device.out("grad_tokens", p.grad_tokens, p.num_tokens * p.dim, size);
    device.out("grad_weight", p.grad_weight, p.num_tokens);
    return __real_launch_adaptive_pool_backward(&p, stream);
}

}  // extern "C"

const char* cuda_error_text(int) { return emu_report(); }
const char* last_error() { return message; }
int fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    return kBadArgument;
}

int num_builds() { return 0; }
const char* build_name(int) { return ""; }
const char* active_isa() { return "emulated"; }
int set_isa(const char*) { return kBadArgument; }
int launch_attention_mass_cpu(const AttentionMassParams&, int) { return kBadArgument; }
int launch_select_cpu(const SelectParams&, int) { return kBadArgument; }
int launch_pack_cpu(const PackParams&, int) { return kBadArgument; }
int launch_compact_cpu(const CompactParams&, int) { return kBadArgument; }
int launch_invert_index_cpu(const InverseParams&, int) { return kBadArgument; }
int launch_spread_cpu(const SpreadParams&, int) { return kBadArgument; }
int launch_saliency_cpu(const SaliencyParams&, int) { return kBadArgument; }
int launch_adaptive_pool_cpu(const PoolParams&, int) { return kBadArgument; }
int launch_adaptive_pool_backward_cpu(const PoolBackwardParams&, int) { return kBadArgument; }
size_t attention_mass_scratch_cpu(const AttentionMassParams&) { return 0; }

}  // namespace crop
