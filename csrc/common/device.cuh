// What the CUDA kernels share: 16-byte pieces of rows of any element type, and sums over a warp.
#pragma once
#include "ops.h"
#include "portable.cuh"

namespace crop {
namespace {

constexpr int64_t kMaxGrid = 0x7fffffff;  // blocks along x; also the limit of row numbers held as int
constexpr unsigned kWarp = 0xffffffffu;   // all lanes
constexpr float kInf = __builtin_inff();

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Calls f with a value of the C++ type of the elements.
template <class F>
int for_dtype(const char* op, int dtype, F f) {
    switch (dtype) {
        case kFloat32: return f(float{});
        case kBFloat16: return f(__nv_bfloat16{});
        case kFloat16: return f(__half{});
    }
    return fail("%s: dtype must be float32, bfloat16 or float16, got code %d", op, dtype);
}

DEV float to_float(float x) { return x; }
DEV float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DEV float to_float(__half x) { return __half2float(x); }
DEV uint32_t raw_bits(int x) { return static_cast<uint32_t>(x); }
DEV uint32_t raw_bits(float x) { return __float_as_uint(x); }
DEV uint32_t raw_bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
DEV uint32_t raw_bits(__half x) { return __half_as_ushort(x); }
DEV void from_float(float x, float& out) { out = x; }
DEV void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
DEV void from_float(float x, __half& out) { out = __float2half_rn(x); }
DEV void from_bits(uint32_t bits, int& out) { out = static_cast<int>(bits); }
DEV void from_bits(uint32_t bits, float& out) { out = __uint_as_float(bits); }
DEV void from_bits(uint32_t bits, __nv_bfloat16& out) { out = __ushort_as_bfloat16(static_cast<unsigned short>(bits)); }
DEV void from_bits(uint32_t bits, __half& out) { out = __ushort_as_half(static_cast<unsigned short>(bits)); }

// 16 bytes of a row, kept as raw bits. Element i of a 2-byte type is half i % 2 of word i / 2.
template <class T>
struct Piece {
    static constexpr int kCount = 16 / sizeof(T);  // elements
    uint32_t word[4] = {0, 0, 0, 0};

    DEV uint32_t bits(int i) const {
        return sizeof(T) == 4 ? word[i] : word[i * sizeof(T) / 4] >> (i % 2 * 16) & 0xffffu;
    }
    DEV void set_bits(int i, uint32_t value) {
        if (sizeof(T) == 4) word[i] = value;
        else word[i * sizeof(T) / 4] = i % 2 ? (word[i * sizeof(T) / 4] & 0xffffu) | value << 16
                                             : (word[i * sizeof(T) / 4] & 0xffff0000u) | value;
    }
    DEV float get(int i) const {
        T x;
        from_bits(bits(i), x);
        return to_float(x);
    }
    DEV void set(int i, float value) {
        T x;
        from_float(value, x);
        set_bits(i, raw_bits(x));
    }
};

// The piece at `from`, of which `left` elements exist; the others are 0. `aligned`: addresses of whole pieces are multiples
// of 16. Both paths give the same bits. `load16`: how a whole piece is loaded.
template <class T, class Load>
DEV Piece<T> load_piece(const T* from, int64_t left, bool aligned, Load load16) {
    Piece<T> piece;
    if (aligned && left >= Piece<T>::kCount) {
        const uint4 raw = load16(reinterpret_cast<const uint4*>(from));
        piece.word[0] = raw.x, piece.word[1] = raw.y, piece.word[2] = raw.z, piece.word[3] = raw.w;
    } else {
        UNROLL
        for (int i = 0; i < Piece<T>::kCount; ++i)
            if (i < left) piece.set_bits(i, raw_bits(from[i]));
    }
    return piece;
}

template <class T>
DEV Piece<T> load_piece(const T* from, int64_t left, bool aligned) {
    return load_piece(from, left, aligned, [](const uint4* at) { return *at; });
}

template <class T>
DEV void store_piece(T* to, const Piece<T>& piece, int64_t left, bool aligned) {
    if (aligned && left >= Piece<T>::kCount) {
        // An instruction of its own: the compiler splits a plain store of 16 bytes into four.
        ptx::store_once(reinterpret_cast<uint4*>(to), make_uint4(piece.word[0], piece.word[1], piece.word[2], piece.word[3]));
    } else {
        UNROLL
        for (int i = 0; i < Piece<T>::kCount; ++i)
            if (i < left) from_bits(piece.bits(i), to[i]);
    }
}

// Order-preserving: unsigned comparison of keys = comparison of floats that are no NaN; -0 as +0.
DEV uint32_t order_key(float x) {
    const uint32_t raw = x == 0.0f ? 0u : __float_as_uint(x);
    return raw & 0x80000000u ? ~raw : raw | 0x80000000u;
}

// Sum of `value` over the lanes up to this one.
DEV int warp_scan(int value) {
    const int lane = threadIdx.x % 32;
    UNROLL
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kWarp, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

}  // namespace
}  // namespace crop
