// adaptive_pool on the CPU. Forward: a work item is a run of cells; kChunk vectors of channels stay in registers while the
// members of a cell pass by in stored order. Backward: a work item is a run of tokens, each reads the gradient of its cell
// (a pure gather, every result is written once). True division: a rounded reciprocal is off by one ulp for some counts.
#include "../common/parallel.h"
#include "../common/simd.h"

namespace crop::CROP_ISA {
namespace {

constexpr int kChunk = 4;                  // vectors of channels per pass
constexpr int64_t kItemElements = 1 << 15;  // elements read by a work item

int64_t rows_per_item(int64_t dim) { return kItemElements / dim > 1 ? kItemElements / dim : 1; }

// One channel at a time or kLanes at a time with the same arithmetic, so the tail path gives the same bits.
struct Scalar {
    using Value = float;
    using Number = int32_t;
    template <class T> static float get(const T* p) { return load_one(p); }
    template <class T> static void put(T* p, float x) { store_one(p, x); }
    static float all(float x) { return x; }
    static constexpr int kWidth = 1;
};
struct Wide {
    using Value = Vec;
    using Number = IVec;
    template <class T> static Vec get(const T* p) { return load_vec(p); }
    template <class T> static void put(T* p, Vec x) { store_vec(p, x); }
    static Vec all(float x) { return splat(x); }
    static constexpr int kWidth = kLanes;
};

template <class T>
struct Cell {
    const T* tokens;
    const int32_t* member;
    const float* weight;
    int64_t count, stride;
    const T* row(int64_t i) const { return tokens + member[i] * stride; }
};

template <class S, int kVecs, class T>
void mean(const Cell<T>& cell, int64_t at, T* out) {
    typename S::Value total[kVecs];
    for (int v = 0; v < kVecs; ++v) total[v] = S::get(cell.row(0) + at + v * S::kWidth);
    for (int64_t i = 1; i < cell.count; ++i)
        for (int v = 0; v < kVecs; ++v) total[v] += S::get(cell.row(i) + at + v * S::kWidth);
    const float count = static_cast<float>(cell.count);
    for (int v = 0; v < kVecs; ++v) S::put(out + at + v * S::kWidth, total[v] / count);
}

template <class S, int kVecs, class T>
void weighted(const Cell<T>& cell, float sum, int64_t at, T* out) {
    typename S::Value total[kVecs];
    for (int v = 0; v < kVecs; ++v) total[v] = S::get(cell.row(0) + at + v * S::kWidth) * cell.weight[cell.member[0]];
    for (int64_t i = 1; i < cell.count; ++i) {
        const float w = cell.weight[cell.member[i]];
        for (int v = 0; v < kVecs; ++v) total[v] += S::get(cell.row(i) + at + v * S::kWidth) * w;
    }
    for (int v = 0; v < kVecs; ++v) S::put(out + at + v * S::kWidth, total[v] / sum);
}

template <class S, int kVecs, class T>
void maximum(const Cell<T>& cell, int32_t* winner, int64_t at, T* out) {
    typename S::Value best[kVecs];
    typename S::Number who[kVecs];
    for (int v = 0; v < kVecs; ++v) {
        best[v] = S::get(cell.row(0) + at + v * S::kWidth);
        who[v] = cell.member[0] - typename S::Number{};
    }
    for (int64_t i = 1; i < cell.count; ++i)
        for (int v = 0; v < kVecs; ++v) {
            const auto x = S::get(cell.row(i) + at + v * S::kWidth);
            // Larger wins; a NaN wins against a number; the first of equals stays.
            const auto wins = (x > best[v]) | ((x != x) & (best[v] == best[v]));
            best[v] = wins ? x : best[v];
            who[v] = wins ? cell.member[i] - typename S::Number{} : who[v];
        }
    for (int v = 0; v < kVecs; ++v) {
        S::put(out + at + v * S::kWidth, best[v]);
        if (winner) store(winner + at + v * S::kWidth, who[v]);
    }
}

// Calls f(S{}, integral constant vectors, first channel) over all channels, widest pieces first.
template <int n> struct Count { static constexpr int value = n; };
template <class F>
inline void over_channels(int64_t dim, F f) {
    int64_t at = 0;
    for (; at + kChunk * kLanes <= dim; at += kChunk * kLanes) f(Wide{}, Count<kChunk>{}, at);
    for (; at + kLanes <= dim; at += kLanes) f(Wide{}, Count<1>{}, at);
    for (; at < dim; ++at) f(Scalar{}, Count<1>{}, at);
}

template <class F>
inline void over_vectors(int64_t dim, F f) {
    over_channels(dim, [&](auto s, auto n, int64_t at) {
        for (int v = 0; v < n.value; ++v) f(s, at + v * s.kWidth);
    });
}

template <class T>
void pool_cell(const PoolParams& p, int64_t c) {
    T* out = static_cast<T*>(p.out) + c * p.dim;
    const int64_t first = p.offsets[c];
    const Cell<T> cell{static_cast<const T*>(p.tokens), p.members + first, p.weight, p.offsets[c + 1] - first,
                       p.token_stride};
    float* sums = p.mode == kWeighted ? static_cast<float*>(p.saved) : nullptr;
    int32_t* winners = p.mode == kMax ? static_cast<int32_t*>(p.saved) : nullptr;
    if (winners) winners += c * p.dim;
    if (cell.count == 0) {
        __builtin_memset(out, 0, sizeof(T) * p.dim);
        if (sums) sums[c] = 0;
        for (int64_t i = 0; winners && i < p.dim; ++i) winners[i] = -1;
        return;
    }
    float sum = 0;
    if (p.mode == kWeighted) {
        sum = p.weight[cell.member[0]];
        for (int64_t i = 1; i < cell.count; ++i) sum += p.weight[cell.member[i]];
        if (sums) sums[c] = sum;
    }
    if (cell.count == 1) {
        __builtin_memcpy(out, cell.row(0), sizeof(T) * p.dim);
        for (int64_t i = 0; winners && i < p.dim; ++i) winners[i] = cell.member[0];
    } else if (p.mode == kMax) {
        over_channels(p.dim, [&](auto s, auto n, int64_t at) { maximum<decltype(s), n.value>(cell, winners, at, out); });
    } else if (p.mode == kWeighted && sum != 0) {
        over_channels(p.dim, [&](auto s, auto n, int64_t at) { weighted<decltype(s), n.value>(cell, sum, at, out); });
    } else {
        over_channels(p.dim, [&](auto s, auto n, int64_t at) { mean<decltype(s), n.value>(cell, at, out); });
    }
}

template <class T>
void pool_token_backward(const PoolBackwardParams& p, int64_t token) {
    T* gx = static_cast<T*>(p.grad_tokens) + token * p.dim;
    const int64_t c = p.inverse[token];
    if (p.mode == kWeighted) p.grad_weight[token] = 0;
    if (c < 0) {
        __builtin_memset(gx, 0, sizeof(T) * p.dim);
        return;
    }
    const T* gy = static_cast<const T*>(p.grad) + c * p.dim;
    const float count = static_cast<float>(p.offsets[c + 1] - p.offsets[c]);
    if (p.mode == kMax) {
        const int32_t* winner = static_cast<const int32_t*>(p.saved) + c * p.dim;
        over_vectors(p.dim, [&](auto s, int64_t at) {
            using S = decltype(s);
            const auto mine = load<typename S::Number>(winner + at) == static_cast<int32_t>(token);
            S::put(gx + at, mine ? S::get(gy + at) : S::all(0));
        });
        return;
    }
    const float sum = p.mode == kWeighted ? static_cast<const float*>(p.saved)[c] : 0;
    if (count == 1 || sum == 0) {  // mean rule
        over_vectors(p.dim, [&](auto s, int64_t at) {
            using S = decltype(s);
            S::put(gx + at, S::get(gy + at) / count);
        });
        return;
    }
    const float w = p.weight[token];
    const T* x = static_cast<const T*>(p.tokens) + token * p.token_stride;
    const T* y = static_cast<const T*>(p.out) + c * p.dim;
    Vec dot = Vec{};
    float rest = 0;
    over_vectors(p.dim, [&](auto s, int64_t at) {
        using S = decltype(s);
        const auto g = S::get(gy + at);
        S::put(gx + at, g * w / sum);
        const auto term = g * (S::get(x + at) - S::get(y + at));
        if constexpr (S::kWidth == 1) rest += term;
        else dot += term;
    });
    p.grad_weight[token] = (crop::CROP_ISA::sum(dot) + rest) / sum;
}

}  // namespace

int adaptive_pool(const PoolParams& p, int threads) {
    for (int64_t i = 0; i < p.num_members; ++i)
        if (p.members[i] < 0 || p.members[i] >= p.num_tokens)
            return fail("adaptive_pool: plan members must be in [0, num_tokens=%lld), got %d", (long long)p.num_tokens,
                        p.members[i]);
    for (int64_t c = 0; c < p.num_out; ++c)
        if (p.offsets[c] < 0 || p.offsets[c + 1] < p.offsets[c] || p.offsets[c + 1] > p.num_members)
            return fail("adaptive_pool: plan offsets must ascend in [0, num_members=%lld], got %d, %d",
                        (long long)p.num_members, p.offsets[c], p.offsets[c + 1]);
    const int64_t rows = rows_per_item(p.dim);
    return dispatch_dtype("adaptive_pool", p.dtype, [&](auto type) {
        auto body = [&](int64_t item) {
            for (int64_t c = item * rows; c < (item + 1) * rows && c < p.num_out; ++c) pool_cell<decltype(type)>(p, c);
        };
        const int used = useful_threads(threads, p.num_members * p.dim, 2 * kItemElements);
        parallel_for(used, (p.num_out + rows - 1) / rows, body);
        return 0;
    });
}

int adaptive_pool_backward(const PoolBackwardParams& p, int threads) {
    for (int64_t i = 0; i < p.num_tokens; ++i)
        if (p.inverse[i] >= p.num_out)
            return fail("adaptive_pool: plan inverse must be less than num_out=%lld, got %d", (long long)p.num_out,
                        p.inverse[i]);
    const int64_t rows = rows_per_item(p.dim);
    return dispatch_dtype("adaptive_pool", p.dtype, [&](auto type) {
        auto body = [&](int64_t item) {
            for (int64_t i = item * rows; i < (item + 1) * rows && i < p.num_tokens; ++i)
                pool_token_backward<decltype(type)>(p, i);
        };
        const int used = useful_threads(threads, p.num_tokens * p.dim, 2 * kItemElements);
        parallel_for(used, (p.num_tokens + rows - 1) / rows, body);
        return 0;
    });
}

}  // namespace crop::CROP_ISA
