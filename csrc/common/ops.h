// Every launcher. Raw pointers, sizes, strides (in elements; compact's in bytes), dtype code, stream; no torch anywhere.
//
// Each operator has one parameter struct and two launchers with the same meaning: launch_<op>_cpu (threads = how many
// threads may be used; never changes a bit of the result) and launch_<op> (CUDA, asynchronous on `stream`, never
// synchronises). Return value: 0 = done; below 0 = bad argument; above 0 = cudaError_t. Text of the last failure of this
// thread: last_error(). Index tensors are int64 and contiguous, plan tensors int32; null marks an absent optional tensor.
#pragma once
#include <cstddef>
#include <cstdint>

namespace crop {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum PoolMode : int { kMean = 0, kWeighted = 1, kMax = 2 };
constexpr int kBadArgument = -1;

struct Stream {  // of the current device
    int device;    // its number
    void* handle;  // cudaStream_t
};

struct AttentionMassParams {
    const void* query;             // (batch, num_heads, num_rows, head_dim)
    const void* key;               // (batch, num_kv_heads, num_keys, head_dim)
    const int64_t* vision_index;   // (num_images, num_tokens); -1 = filler
    const int64_t* sample;         // (num_images,) or null: image i belongs to sample i
    const float* lse;              // (batch, num_heads, num_rows) or null: computed
    const int64_t* visible_start;  // (batch,) or null: 0
    const int64_t* visible_len;    // (batch, num_rows) or null: num_keys
    float* mass;                   // (num_images, num_tokens)
    void* scratch;                 // attention_mass_scratch bytes
    int64_t batch, num_heads, num_kv_heads, num_rows, num_keys, head_dim, num_images, num_tokens;
    int64_t query_stride[3], key_stride[3];  // batch, head, row or key; channels are contiguous
    float scale;
    int dtype;  // DType of query and key
};

struct SelectParams {
    const float* score;      // (num_images, num_tokens)
    const float* weight;     // (num_images, num_tokens) or null: 1
    const int8_t* priority;  // (num_images, num_tokens) or null: 0
    const int64_t* index;    // (num_images, num_tokens) or null: n
    const int64_t* budget;   // (num_images,) on the host, each in [0, min(num_tokens, width)]
    int64_t* kept;           // (num_images, width)
    int64_t num_images, num_tokens, width;
};

// Where the tokens of a sample go that stay, by `stays` or because an image of the sample names them in `kept`: to the right end
// of `width` entries, in order. slot_of is the inverse, -1 = does not stay.
struct PackParams {
    const uint8_t* stays;   // (batch, num_tokens) bool
    const int64_t* kept;    // (num_images, num_kept), no place twice; negative = filler
    const int64_t* sample;  // (num_images,) or null: image i belongs to sample i
    int64_t* kept_index;    // (batch, width); -1 = filler
    int64_t* slot_of;       // (batch, num_tokens)
    int64_t batch, num_tokens, num_images, num_kept, width;
};

struct CompactTensor {
    const char* source;  // (batch, outer, num_tokens) rows
    char* target;        // (batch, outer, num_kept) rows, contiguous
    int64_t outer, num_tokens, row_bytes;
    int64_t batch_stride, outer_stride, token_stride;  // of source, in bytes
};

struct CompactParams {
    const CompactTensor* tensors;  // (num_tensors,) on the host
    const int64_t* index;          // (batch, num_kept), ascending where >= 0; negative = zero row
    int64_t num_tensors, batch, num_kept;
};

// inverse[b, index[b, k]] = k and -1 elsewhere; what is negative or too large is left out. The gradient of compact is compact by
// the inverse.
struct InverseParams {
    const int64_t* index;  // (batch, num_kept), no place twice
    int64_t* inverse;      // (batch, num_tokens)
    int64_t batch, num_kept, num_tokens;
};

// The tokens of an image that are least alike: by rounds the `at_once` with the least `near` (NaN last, then the smaller token) that
// are not chosen yet, after which near = max(near, alike[each of the round]); fresh: after the first one that without `near`.
struct SpreadParams {
    const float* alike;  // (num_tokens, num_tokens), rows `row_stride` apart
    const float* near;   // (num_tokens,)
    int64_t* chosen;     // (count,), in the order of choice
    int64_t num_tokens, count, at_once, row_stride;  // count <= num_tokens, at_once >= 1
    bool fresh;
};

// Weights of the tokens of an image by how far they are from its mean, in standard deviations; 1 for all other tokens.
struct SaliencyParams {
    const void* tokens;    // (num_tokens, dim), rows `token_stride` apart
    const int64_t* index;  // (num_images, num_places), no token twice; -1 = filler
    const uint8_t* alone;  // (num_tokens,) bool, weight 1, or null
    float* mean;           // (num_images, dim), scratch
    float* weight;         // (num_tokens,)
    int64_t num_tokens, dim, num_images, num_places, token_stride;
    float sharpness, farthest, flat;
    int dtype;
};

struct PoolParams {
    const void* tokens;      // (num_tokens, dim), rows `token_stride` apart
    const int32_t* members;  // (num_members,)
    const int32_t* offsets;  // (num_out + 1,)
    const float* weight;     // (num_tokens,), kWeighted only
    void* out;               // (num_out, dim)
    void* saved;             // for backward, or null; kWeighted: float (num_out,) sums, kMax: int32 (num_out, dim) rows
    int64_t num_tokens, dim, num_members, num_out, token_stride;
    int dtype, mode;
};

struct PoolBackwardParams {
    const void* grad;        // (num_out, dim)
    const void* tokens;      // (num_tokens, dim), rows `token_stride` apart; kWeighted only
    const void* out;         // (num_out, dim); kWeighted only
    const void* saved;       // as written by the forward pass
    const int32_t* offsets;  // (num_out + 1,)
    const int32_t* inverse;  // (num_tokens,); -1 = in no cell
    const float* weight;     // (num_tokens,); kWeighted only
    void* grad_tokens;       // (num_tokens, dim)
    float* grad_weight;      // (num_tokens,); kWeighted only
    int64_t num_tokens, dim, num_out, token_stride;
    int dtype, mode;
};

int launch_attention_mass_cpu(const AttentionMassParams& params, int threads);
int launch_select_cpu(const SelectParams& params, int threads);
int launch_pack_cpu(const PackParams& params, int threads);
int launch_compact_cpu(const CompactParams& params, int threads);
int launch_invert_index_cpu(const InverseParams& params, int threads);
int launch_spread_cpu(const SpreadParams& params, int threads);
int launch_saliency_cpu(const SaliencyParams& params, int threads);
int launch_adaptive_pool_cpu(const PoolParams& params, int threads);
int launch_adaptive_pool_backward_cpu(const PoolBackwardParams& params, int threads);
size_t attention_mass_scratch_cpu(const AttentionMassParams& params);

extern "C" {
int launch_attention_mass(const AttentionMassParams* params, Stream stream);
int launch_select(const SelectParams* params, Stream stream);
int launch_pack(const PackParams* params, Stream stream);
int launch_compact(const CompactParams* params, Stream stream);
int launch_invert_index(const InverseParams* params, Stream stream);
int launch_spread(const SpreadParams* params, Stream stream);
int launch_saliency(const SaliencyParams* params, Stream stream);
int launch_adaptive_pool(const PoolParams* params, Stream stream);
int launch_adaptive_pool_backward(const PoolBackwardParams* params, Stream stream);
}
size_t attention_mass_scratch(const AttentionMassParams& params);
const char* cuda_error_text(int code);

// Text of the last failure of the calling thread, and the way to set it; fail() returns kBadArgument.
const char* last_error();
[[gnu::format(printf, 1, 2)]] int fail(const char* format, ...);

}  // namespace crop
