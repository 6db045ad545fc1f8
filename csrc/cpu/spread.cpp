// spread on the CPU: one thread, rounds of minima over integer keys, which compare as the floats do.
#include <cstdlib>

#include "../common/simd.h"

namespace crop::CROP_ISA {
namespace {

constexpr uint32_t kTaken = 0xffffffffu, kUnknown = kTaken - 1;  // keys beyond those of all numbers: chosen before; NaN
constexpr int64_t kStackTokens = 1 << 14;                        // keys of so many tokens live on the stack

UVec near_key(Vec x) { return x == x ? order_key(x) : UVec{} + kUnknown; }

// f(n, values) for every vector of a row; behind its end stands NaN.
template <class F>
void each(const float* row, int64_t count, F f) {
    int64_t n = 0;
    for (; n + kLanes <= count; n += kLanes) f(n, load<Vec>(row + n));
    if (n == count) return;
    Vec x = splat(__builtin_nanf(""));
    for (int64_t i = n; i < count; ++i) x[i - n] = row[i];
    f(n, x);
}

// The first of the smallest keys; `count` is padded.
int64_t smallest(const uint32_t* key, int64_t count) {
    UVec lows = ~UVec{};
    for (int64_t n = 0; n < count; n += kLanes) {
        const UVec k = load<UVec>(key + n);
        lows = k < lows ? k : lows;
    }
    uint32_t low = kTaken;
    for (int i = 0; i < kLanes; ++i) low = lows[i] < low ? lows[i] : low;
    int64_t n = 0;
    while (!any(load<UVec>(key + n) == low)) n += kLanes;
    while (key[n] != low) ++n;
    return n;
}

void choose(const SpreadParams& p, uint32_t* key) {
    const int64_t tokens = p.num_tokens, padded = (tokens + kLanes - 1) / kLanes * kLanes;
    each(p.near, tokens, [&](int64_t n, Vec x) { store(key + n, near_key(x)); });
    for (int64_t n = tokens; n < padded; ++n) key[n] = kTaken;
    for (int64_t first = 0; first < p.count; first += p.at_once) {
        const int64_t last = p.count - first < p.at_once ? p.count : first + p.at_once;
        for (int64_t k = first; k < last; ++k) {
            p.chosen[k] = smallest(key, padded);
            key[p.chosen[k]] = kTaken;
        }
        if (last == p.count) return;
        if (p.fresh && first == 0)
            for (int64_t n = 0; n < tokens; ++n) key[n] = key[n] == kTaken ? kTaken : 0;
        for (int64_t k = first; k < last; ++k)
            each(p.alike + p.chosen[k] * p.row_stride, tokens, [&](int64_t n, Vec x) {
                const UVec before = load<UVec>(key + n), now = near_key(x);
                store(key + n, now > before ? now : before);
            });
    }
}

}  // namespace

int spread(const SpreadParams& p, int) {
    if (p.num_tokens <= kStackTokens) {
        uint32_t key[kStackTokens];
        return choose(p, key), 0;
    }
    uint32_t* key = static_cast<uint32_t*>(std::malloc(sizeof(uint32_t) * (p.num_tokens + kLanes)));
    if (!key) return fail("spread: memory for %lld keys must be available", (long long)p.num_tokens);
    choose(p, key);
    std::free(key);
    return 0;
}

}  // namespace crop::CROP_ISA
