// Products of keys and rows for attention_mass on the CPU. Vectors run along the rows, or, where these are few, along head_dim;
// the query is packed for it.
#pragma once
#include "../common/simd.h"

namespace crop::CROP_ISA {
namespace {

constexpr int kTile = 24;                        // keys that every panel of rows is read once for
constexpr int64_t kParts = 4;                    // tiles of a block
constexpr int64_t kBlock = kParts * kTile;       // keys of a work item
constexpr int kSubTile = kLanes == 16 ? 12 : 6;  // keys whose two vectors of rows fit the registers
constexpr int kSingleTile = 12;                  // and keys with one vector
constexpr int kDotRows = 4;                      // up to here vectors run along head_dim instead of along rows
constexpr int kAhead = 12;                       // keys between a prefetch and its use, then

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Query of one KV head, rows r = counted row * group + head in group, times scale.
// Lanes layout: panels of 2 * kLanes rows (the last may have kLanes), each (head_dim, width). Dot layout: (row, padded d).
template <class T>
void pack_query(const AttentionMassParams& p, int64_t b, int64_t kv, const int32_t* row, int64_t rows, float* out) {
    const int64_t group = p.num_heads / p.num_kv_heads, d = p.head_dim, count = rows * group;
    const int64_t lanes = round_up(count, kLanes), padded = round_up(d, kLanes);
    const bool dot = count <= kDotRows;
    __builtin_memset(out, 0, sizeof(float) * lanes * padded);
    for (int64_t r = 0; r < count; ++r) {
        const T* q = static_cast<const T*>(p.query) + b * p.query_stride[0] +
                     (kv * group + r % group) * p.query_stride[1] + row[r / group] * p.query_stride[2];
        const int64_t panel = r / (2 * kLanes) * (2 * kLanes);
        const int64_t width = dot ? 1 : lanes - panel < 2 * kLanes ? kLanes : 2 * kLanes;
        float* to = dot ? out + r * padded : out + panel * d + (r - panel);
        for (int64_t i = 0; i < d; ++i) to[i * width] = load_one(q + i) * p.scale;
    }
}

// Asks for a row of keys early: the hardware follows no stream across pages, and keys are read at the speed of memory.
template <class T>
inline void prefetch_row(const T* row, int64_t d) {
    const char *from = reinterpret_cast<const char*>(row), *end = reinterpret_cast<const char*>(row + d);
    for (; from < end; from += 64) __builtin_prefetch(from);
}

template <int kStride, int kKeys, int kVecs>
inline void multiply(const float* keys, const float* query, int64_t d, Vec (&logit)[kKeys][kVecs]) {
    for (auto& key : logit)
        for (Vec& v : key) v = Vec{};
#pragma GCC unroll 8
    for (int64_t i = 0; i < d; ++i) {
        Vec q[kVecs];
        for (int v = 0; v < kVecs; ++v) q[v] = load<Vec>(query + (i * kVecs + v) * kLanes);
        for (int k = 0; k < kKeys; ++k) {
            const Vec key = splat(keys[k * kStride + i]);
            for (int v = 0; v < kVecs; ++v) logit[k][v] += key * q[v];
        }
    }
}

// Logits of a panel of one or two vectors of rows with a tile of keys, kStride floats apart. The next tile comes in
// meanwhile: every panel asks for its part of it.
template <int kStride, int kKeys, int kVecs, class T>
inline void panel(const float* keys, const float* query, int64_t d, const T* next, int64_t stride, int64_t ahead,
                  Vec (&logit)[kTile][kVecs]) {
    for (int sub = 0; sub < kTile; sub += kKeys) {
        for (int k = 0; k < kKeys; ++k) prefetch_row(next + (sub + k) * stride, ahead);
        Vec product[kKeys][kVecs];
        multiply<kStride>(keys + sub * kStride, query, d, product);
        for (int k = 0; k < kKeys; ++k)
            for (int v = 0; v < kVecs; ++v) logit[sub + k][v] = product[k][v];
    }
}

// Keys that can be read where they are, or nullptr.
inline const float* in_place(const float* key) { return key; }
template <class T>
const float* in_place(const T*) { return nullptr; }

// Logits of `count` keys with all rows: sink(first key, first vector of rows, logits) for every tile and panel, logits
// [keys][vectors]. Keys past the end repeat the last one. head_dim is at most kStride; keys that far apart are not copied.
template <int kStride, class T, class Sink>
void lanes_block(const T* key, int64_t stride, int64_t count, const float* query, int64_t lanes, int64_t d, Sink sink) {
    alignas(64) float tile[kTile * kStride];
    const int64_t panels = (lanes + 2 * kLanes - 1) / (2 * kLanes), ahead = (d + panels - 1) / panels;
    for (int64_t first = 0; first < count; first += kTile) {
        const float* keys = stride == kStride && first + kTile <= count ? in_place(key + first * stride) : nullptr;
        for (int64_t k = 0; !keys && k < kTile; ++k) {
            const T* from = key + (first + k < count ? first + k : count - 1) * stride;
            float* to = tile + k * kStride;
            int64_t i = 0;
            for (; i + kLanes <= d; i += kLanes) store(to + i, load_vec(from + i));
            for (; i < d; ++i) to[i] = load_one(from + i);
        }
        if (!keys) keys = tile;
        const T* next = key + (first + kTile) * stride;
        int64_t lane = 0;
        for (; lane + 2 * kLanes <= lanes; lane += 2 * kLanes, next += ahead) {
            Vec logit[kTile][2];
            panel<kStride, kSubTile>(keys, query + lane * d, d, next, stride, ahead, logit);
            sink(first, lane / kLanes, logit);
        }
        if (lane < lanes) {
            Vec logit[kTile][1];
            panel<kStride, kSingleTile>(keys, query + lane * d, d, next, stride, ahead, logit);
            sink(first, lane / kLanes, logit);
        }
    }
}

// The same for few rows: vectors run along head_dim, which reads each key once at the speed of memory, and the result
// is transposed, logit[row][key], so that what follows can run along the keys.
template <int kRows, class T>
void dot_block(const T* key, int64_t stride, int64_t count, const float* query, int64_t d, float (*logit)[kBlock]) {
    const int64_t padded = round_up(d, kLanes), whole = d / kLanes * kLanes;
    for (int64_t k = 0; k < count; ++k) {
        const T* from = key + k * stride;
        prefetch_row(from + kAhead * stride, d);
        Vec total[kRows], more[kRows];
        for (int r = 0; r < kRows; ++r) total[r] = more[r] = Vec{};
        int64_t i = 0;
        for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
            const Vec a = load_vec(from + i), b = load_vec(from + i + kLanes);
            for (int r = 0; r < kRows; ++r) {
                total[r] += a * load<Vec>(query + r * padded + i);
                more[r] += b * load<Vec>(query + r * padded + i + kLanes);
            }
        }
        for (; i < padded; i += kLanes) {
            Vec a = Vec{};
            if (i < whole) a = load_vec(from + i);
            else
                for (int64_t j = i; j < d; ++j) a[j - i] = load_one(from + j);
            for (int r = 0; r < kRows; ++r) total[r] += a * load<Vec>(query + r * padded + i);
        }
        for (int r = 0; r < kRows; ++r) logit[r][k] = sum(total[r] + more[r]);
    }
}

template <class Logits>
constexpr int kWidth = sizeof(Logits) / (kTile * sizeof(Vec));  // vectors of a panel

}  // namespace
}  // namespace crop::CROP_ISA
