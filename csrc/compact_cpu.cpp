// compact on the CPU: copies of rows, whatever they hold. Work items are about 64 KB of output each.
#include "parallel.h"
#include "simd.h"

namespace crop::CROP_ISA {
namespace {

constexpr int64_t kItemBytes = 1 << 16;
constexpr int64_t kStreamBytes = 4 << 20;  // outputs from here on bypass the caches

constexpr int64_t kPrefetchBytes = 1 << 10;  // of the next row

// Rows of a fixed small size, for position ids and masks.
template <int kBytes>
void copy_small(char* to, const char* from, int64_t stride, const int64_t* index, int64_t count) {
    for (int64_t k = 0; k < count; ++k, to += kBytes)
        if (index[k] < 0) __builtin_memset(to, 0, kBytes);
        else __builtin_memcpy(to, from + index[k] * stride, kBytes);
}

void copy_cached(char* to, const char* from, int64_t bytes) { __builtin_memcpy(to, from, bytes); }

// Past the caches: the output of a large call would only push out what is still needed.
#if defined(__AVX2__)
void copy_streaming(char* to, const char* from, int64_t bytes) {
    constexpr int64_t kStep = 4 * sizeof(__m256i);
    int64_t i = 0;
    for (; i + kStep <= bytes; i += kStep) {
        _mm_prefetch(from + i + 1024, _MM_HINT_T0);
        _mm_prefetch(from + i + 1088, _MM_HINT_T0);
        __m256i v[4];
        for (int j = 0; j < 4; ++j) v[j] = load<__m256i>(from + i + j * sizeof(__m256i));
        for (int j = 0; j < 4; ++j) _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i) + j, v[j]);
    }
    __builtin_memcpy(to + i, from + i, bytes - i);
    _mm_sfence();
}
#else
void copy_streaming(char* to, const char* from, int64_t bytes) { __builtin_memcpy(to, from, bytes); }
#endif

void copy_rows(char* to, const char* from, int64_t stride, int64_t bytes, const int64_t* index, int64_t count,
               bool large) {
    const bool stream = large && (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes)) % 32 == 0;
    auto* copy = stream ? copy_streaming : copy_cached;
    switch (bytes) {
        case 1: return copy_small<1>(to, from, stride, index, count);
        case 2: return copy_small<2>(to, from, stride, index, count);
        case 4: return copy_small<4>(to, from, stride, index, count);
        case 8: return copy_small<8>(to, from, stride, index, count);
    }
    for (int64_t k = 0; k < count;) {
        int64_t run = 1;  // neighbours that stay neighbours move together
        if (index[k] < 0) {
            __builtin_memset(to + k * bytes, 0, bytes);
        } else {
            if (stride == bytes)
                while (k + run < count && index[k + run] == index[k] + run) ++run;
            // The hardware does not see the next row coming.
            if (k + run < count && index[k + run] >= 0)
                for (int64_t i = 0; i < bytes && i < kPrefetchBytes; i += 64)
                    __builtin_prefetch(from + index[k + run] * stride + i);
            copy(to + k * bytes, from + index[k] * stride, run * bytes);
        }
        k += run;
    }
}

int check_index(const CompactParams& p) {
    int64_t limit = INT64_MAX;
    for (int64_t t = 0; t < p.num_tensors; ++t)
        limit = p.tensors[t].num_tokens < limit ? p.tensors[t].num_tokens : limit;
    for (int64_t b = 0; b < p.batch; ++b) {
        int64_t last = -1;
        for (int64_t k = 0; k < p.num_kept; ++k) {
            const int64_t j = p.index[b * p.num_kept + k];
            if (j < 0) continue;
            if (j >= limit)
                return fail("compact: index must be less than %lld, got %lld", (long long)limit, (long long)j);
            if (j <= last)
                return fail("compact: index must be strictly ascending where not negative, got %lld after %lld",
                            (long long)j, (long long)last);
            last = j;
        }
    }
    return 0;
}

}  // namespace

int compact(const CompactParams& p, int threads) {
    if (const int error = check_index(p)) return error;
    for (int64_t t = 0; t < p.num_tensors; ++t) {
        const CompactTensor& c = p.tensors[t];
        const int64_t rows = kItemBytes / c.row_bytes > 1 ? kItemBytes / c.row_bytes : 1;  // of an item
        const int64_t pieces = (p.num_kept + rows - 1) / rows;
        const int64_t bytes = p.batch * c.outer * p.num_kept * c.row_bytes;
        auto body = [&](int64_t item) {
            const int64_t plane = item / pieces, first = item % pieces * rows;
            const int64_t b = plane / c.outer, outer = plane % c.outer;
            const int64_t count = p.num_kept - first < rows ? p.num_kept - first : rows;
            copy_rows(c.target + (plane * p.num_kept + first) * c.row_bytes,
                      c.source + b * c.batch_stride + outer * c.outer_stride, c.token_stride, c.row_bytes,
                      p.index + b * p.num_kept + first, count, bytes >= kStreamBytes);
        };
        parallel_for(useful_threads(threads, bytes, 4 * kItemBytes), p.batch * c.outer * pieces, body);
    }
    return 0;
}

}  // namespace crop::CROP_ISA
