// compact on the CPU: copies of rows, whatever they hold. Work items are about 64 KB of output each.
#include "../common/parallel.h"
#include "../common/simd.h"

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

// A cache line at a time, which beats the library's copy by a tenth on rows that lie in cache. kStream: past the caches, for
// the output of a large call would only push out what is still needed; `to` is a multiple of 32 then.
template <bool kStream>
void copy_row(char* to, const char* from, int64_t bytes) {
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 64 <= bytes; i += 64) {
        if (kStream) __builtin_prefetch(from + i + kPrefetchBytes);
        const __m256i low = load<__m256i>(from + i), high = load<__m256i>(from + i + 32);
        if (kStream) {
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), low);
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + 32), high);
        } else {
            store(to + i, low);
            store(to + i + 32, high);
        }
    }
    if (kStream) _mm_sfence();
#endif
    __builtin_memcpy(to + i, from + i, bytes - i);
}

void copy_rows(char* to, const char* from, int64_t stride, int64_t bytes, const int64_t* index, int64_t count,
               bool large) {
    const bool stream = large && (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes)) % 32 == 0;
    auto* copy = stream ? copy_row<true> : copy_row<false>;
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

int invert_index(const InverseParams& p, int) {  // a few thousand numbers: waking threads would cost more
    for (int64_t b = 0; b < p.batch; ++b) {
        int64_t* inverse = p.inverse + b * p.num_tokens;
        __builtin_memset(inverse, 0xff, sizeof(int64_t) * p.num_tokens);
        for (int64_t k = 0; k < p.num_kept; ++k) {
            const int64_t j = p.index[b * p.num_kept + k];
            if (j >= 0 && j < p.num_tokens) inverse[j] = k;
        }
    }
    return 0;
}

}  // namespace crop::CROP_ISA
