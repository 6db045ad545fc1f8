// Vectors of kLanes floats on the compiler's own vector types: one source for baseline, AVX2 and AVX-512.
// Every source in cpu/ is compiled once per instruction set with CROP_ISA naming its namespace (see dispatch.cpp). Such a
// file uses no inline function of the standard library: the linker keeps one copy, which might be the AVX-512 one.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ops.h"

namespace crop::CROP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HVec __attribute__((vector_size(2 * kLanes)));

template <class V>
struct Unaligned {
    typedef V type __attribute__((aligned(1), may_alias));
};
template <class V>
inline V load(const void* p) {
    return *static_cast<const typename Unaligned<V>::type*>(p);
}
template <class V>
inline void store(void* p, V v) {
    *static_cast<typename Unaligned<V>::type*>(p) = v;
}
template <class To, class From>
inline To bits(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &v, sizeof(to));
    return to;
}

inline Vec splat(float x) { return x - Vec{}; }  // minus keeps -0
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
// Order-preserving: unsigned comparison of keys = comparison of floats that are no NaN; -0 as +0.
inline UVec order_key(Vec x) {
    const IVec raw = bits<IVec>(x + 0.0f);
    return bits<UVec>(raw ^ (raw >> 31 | INT32_MIN));
}
inline Vec keep_where(IVec mask, Vec v) { return bits<Vec>(bits<IVec>(v) & mask); }

// Sum of the lanes, pairwise in a fixed order.
#if defined(__AVX2__)
inline float sum(__m128 v) {
    v += _mm_movehl_ps(v, v);
    return v[0] + v[1];
}
inline float sum(__m256 v) { return sum(_mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1)); }
#endif
#if defined(__AVX512F__)
inline float sum(__m512 v) { return sum(_mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1)); }
#elif !defined(__AVX2__)
inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#endif

#if defined(__AVX512F__)
inline bool any(IVec mask) { return _mm512_test_epi32_mask(bits<__m512i>(mask), bits<__m512i>(mask)); }
#elif defined(__AVX2__)
inline bool any(IVec mask) { return !_mm256_testz_si256(bits<__m256i>(mask), bits<__m256i>(mask)); }
#else
inline bool any(IVec mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
#endif

// One bit per lane, lane 0 lowest; each lane of the mask is all ones or zero.
inline uint64_t lane_bits(IVec mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(bits<__m512i>(mask));
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(bits<__m256>(mask)));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(bits<__m128>(mask)));
#else
    uint64_t set = 0;
    for (int i = 0; i < kLanes; ++i) set |= uint64_t{mask[i] != 0} << i;
    return set;
#endif
}

// exp of kCount vectors in place, as 2^n * polynomial; relative error about 1e-7. Results below 2^-125 are 0, overflow gives
// inf, NaN stays NaN. All vectors take each step together: one exp is a long chain of steps that wait for each other.
template <int kCount>
inline __attribute__((always_inline)) void exp(Vec (&x)[kCount]) {
    const auto each = [](auto step) {
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) step(i);
    };
    // Adding 1.5 * 2^23 rounds to an integer; the extra 126 makes the low bits the exponent of 2^(n - 1).
    const Vec shift = splat(12582912.0f + 126.0f);
    IVec tiny[kCount];
    Vec shifted[kCount], r[kCount], y[kCount];
    each([&](int i) { tiny[i] = x[i] < -86.6f; });
    each([&](int i) { r[i] = x[i] > 89.0f ? splat(89.0f) : x[i]; });
    each([&](int i) { shifted[i] = r[i] * 1.44269504088896341f + shift; });
    each([&](int i) { x[i] = shifted[i] - shift; });
    each([&](int i) { r[i] = r[i] - x[i] * 0.693359375f; });
    each([&](int i) { r[i] = r[i] - x[i] * -2.12194440e-4f; });
    // Coefficients of 2 * exp(r), which makes up for 2^(n - 1).
    each([&](int i) { y[i] = r[i] * (2 * 1.9875691500e-4f) + 2 * 1.3981999507e-3f; });
    each([&](int i) { y[i] = y[i] * r[i] + 2 * 8.3334519073e-3f; });
    each([&](int i) { y[i] = y[i] * r[i] + 2 * 4.1665795894e-2f; });
    each([&](int i) { y[i] = y[i] * r[i] + 2 * 1.6666665459e-1f; });
    each([&](int i) { y[i] = y[i] * r[i] + 2 * 5.0000001201e-1f; });
    each([&](int i) { y[i] = y[i] * r[i] + 2.0f; });
    each([&](int i) { y[i] = y[i] * r[i] + 2.0f; });
    each([&](int i) { x[i] = keep_where(~tiny[i], y[i] * bits<Vec>(bits<IVec>(shifted[i]) << 23)); });
}
inline Vec exp(Vec x) {
    Vec one[1] = {x};
    exp(one);
    return one[0];
}

// Storage types. load_as<T> and store_as<T> convert kLanes elements; round to nearest even.
struct BFloat16 { uint16_t raw; };
struct Float16 { uint16_t raw; };

inline float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return bits<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // Scaling by 2^112 also normalises denormals.
    return bits<float>(sign | bits<uint32_t>(bits<float>(rest << 13) * 5.192296858534828e33f));
}
inline uint16_t float_to_half(float f) {
    const uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000u;
    uint32_t rest = u & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (rest < 0x38800000u)  // denormal half: the addition rounds at its last bit
        return static_cast<uint16_t>(sign | (bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000u));
    rest += 0xfffu + (rest >> 13 & 1u);
    return static_cast<uint16_t>(sign | (rest - 0x38000000u) >> 13);
}
inline float bfloat_to_float(uint16_t b) { return bits<float>(static_cast<uint32_t>(b) << 16); }
inline uint16_t float_to_bfloat(float f) {
    const uint32_t u = bits<uint32_t>(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(u >> 16 | 0x40u);
    return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

inline float load_one(const float* p) { return *p; }
inline float load_one(const BFloat16* p) { return bfloat_to_float(p->raw); }
inline float load_one(const Float16* p) { return half_to_float(p->raw); }
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(BFloat16* p, float x) { p->raw = float_to_bfloat(x); }
inline void store_one(Float16* p, float x) { p->raw = float_to_half(x); }

inline Vec load_vec(const float* p) { return load<Vec>(p); }
inline Vec load_vec(const BFloat16* p) { return bits<Vec>(__builtin_convertvector(load<HVec>(p), UVec) << 16); }
inline void store_vec(float* p, Vec v) { store(p, v); }
inline void store_vec(BFloat16* p, Vec v) {
    const UVec u = bits<UVec>(v);
    const UVec rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    store(p, __builtin_convertvector(v != v ? u >> 16 | 0x40u : rounded, HVec));
}
#if defined(__AVX512F__)
inline Vec load_vec(const Float16* p) { return _mm512_cvtph_ps(load<__m256i>(p)); }
inline void store_vec(Float16* p, Vec v) { store(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__)
inline Vec load_vec(const Float16* p) { return _mm256_cvtph_ps(load<__m128i>(p)); }
inline void store_vec(Float16* p, Vec v) { store(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline Vec load_vec(const Float16* p) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i].raw);
    return v;
}
inline void store_vec(Float16* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) p[i].raw = float_to_half(v[i]);
}
#endif

// Calls f(T{}) with the storage type of a dtype code; an unknown code is an error.
template <class F>
inline int dispatch_dtype(const char* op, int dtype, F f) {
    switch (dtype) {
        case kFloat32: return f(float{});
        case kBFloat16: return f(BFloat16{});
        case kFloat16: return f(Float16{});
    }
    return fail("%s: dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got %d", op, dtype);
}

}  // namespace
}  // namespace crop::CROP_ISA
