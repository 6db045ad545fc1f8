// select on the CPU: radix selection on order-preserving integer keys, then one ordered scan.
//
// Classes (priority, filler) are settled before the radix: what is certainly taken gets the key 2^32 - 1, what is certainly
// not taken 0; no float has these keys. The rest competes by value. Digits are taken below the range of the competing keys,
// because attention masses share their leading bits; at most three rounds of 11 bits. An image is one work item.
#include "parallel.h"
#include "simd.h"

namespace crop::CROP_ISA {
namespace {

constexpr uint32_t kAlways = 0xffffffffu, kNever = 0;
constexpr int kDigitBits = 11;

// Order-preserving: unsigned comparison of keys = comparison of floats; -0 as +0, NaN as -inf.
UVec order_key(Vec x) {
    x = x == x ? x : splat(-__builtin_inff());
    const IVec raw = bits<IVec>(x + 0.0f);
    return bits<UVec>(raw ^ (raw >> 31 | INT32_MIN));
}

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Keys of an image, padded with kNever.
void make_keys(const float* score, const float* weight, int64_t count, uint32_t* key) {
    int64_t n = 0;
    for (; n + kLanes <= count; n += kLanes) {
        const Vec x = load<Vec>(score + n);
        store(key + n, order_key(weight ? x * load<Vec>(weight + n) : x));
    }
    if (n == count) return;
    Vec x = Vec{};
    for (int64_t i = n; i < count; ++i) x[i - n] = weight ? score[i] * weight[i] : score[i];
    store(key + n, order_key(x));
    for (int64_t i = count; i < n + kLanes; ++i) key[i] = kNever;
}

struct Threshold {
    uint32_t key;   // larger keys are taken
    int64_t equal;  // and the first so many equal ones
};

Threshold find_threshold(const uint32_t* key, int64_t count, int64_t need) {
    if (need <= 0) return {kAlways - 1, 0};
    // Range and number of the competing keys.
    UVec lows = ~UVec{}, highs = UVec{}, numbers = UVec{};
    for (int64_t n = 0; n < count; n += kLanes) {
        const UVec k = load<UVec>(key + n);
        const UVec competes = bits<UVec>((k != kNever) & (k != kAlways));
        const UVec low = k | ~competes, high = k & competes;
        lows = low < lows ? low : lows;
        highs = high > highs ? high : highs;
        numbers -= competes;
    }
    uint32_t low = kAlways, high = 0;
    int64_t competing = 0;
    for (int i = 0; i < kLanes; ++i) {
        low = lows[i] < low ? lows[i] : low;
        high = highs[i] > high ? highs[i] : high;
        competing += numbers[i];
    }
    if (need >= competing) return {kNever, 0};
    uint32_t range = high - low;
    for (;;) {
        const int width = range ? 32 - __builtin_clz(range) : 0;
        const int shift = width > kDigitBits ? width - kDigitBits : 0;
        // Even and odd lanes count apart: an increment need not wait for the one just before it.
        uint32_t histogram[1 << kDigitBits] = {}, odd[1 << kDigitBits] = {};
        for (int64_t n = 0; n < count; n += kLanes) {
            const UVec offset = load<UVec>(key + n) - low;  // wraps beyond the range for both sentinels
            if (!any(offset <= range)) continue;            // the rule, from the second round on
            for (int i = 0; i < kLanes; i += 2) {
                const uint32_t a = key[n + i] - low, b = key[n + i + 1] - low;
                if (a <= range) ++histogram[a >> shift];
                if (b <= range) ++odd[b >> shift];
            }
        }
        for (int digit = 0; digit < 1 << kDigitBits; ++digit) histogram[digit] += odd[digit];
        int digit = (1 << kDigitBits) - 1;
        for (; histogram[digit] < need; --digit) need -= histogram[digit];
        low += static_cast<uint32_t>(digit) << shift;
        if (histogram[digit] == need) return {low - 1, 0};  // no competing key is 0
        if (shift == 0) return {low, need};
        range = (1u << shift) - 1;
    }
}

void select_image(const SelectParams& p, int64_t image) {
    const int64_t count = p.num_tokens, at = image * count;
    uint32_t* key = static_cast<uint32_t*>(p.scratch) + image * padded(count);
    int64_t need = p.budget[image], taken = 0;
    make_keys(p.score + at, p.weight ? p.weight + at : nullptr, count, key);
    if (p.index)
        for (int64_t n = 0; n < count; ++n) key[n] = p.index[at + n] < 0 ? kNever : key[n];
    if (p.priority) {
        const int8_t* priority = p.priority + at;
        uint32_t members[256] = {};
        for (int64_t n = 0; n < count; ++n) members[static_cast<uint8_t>(priority[n])] += key[n] != kNever;
        int boundary = 127;  // the class in which the budget ends
        for (; boundary > 0 && taken + members[boundary] <= need; --boundary) taken += members[boundary];
        need -= taken;
        for (int64_t n = 0; n < count; ++n) {
            const uint32_t k = priority[n] < boundary ? kNever : key[n];
            key[n] = priority[n] > boundary && k != kNever ? kAlways : k;
        }
    }
    const Threshold limit = find_threshold(key, count, need);

    int64_t* kept = p.kept + image * p.width;
    int64_t found = 0, equal = limit.equal;
    const int64_t budget = p.budget[image];
    // The slot is written before it is known to be taken, which spares a branch; the next token overwrites it.
    int64_t n = 0;
    if (equal == 0)
        for (; n < count && found < budget; ++n) kept[found] = n, found += key[n] > limit.key;
    else
        for (; n < count && found < budget; ++n) {
            const bool same = (key[n] == limit.key) & (equal > 0);
            kept[found] = n, found += (key[n] > limit.key) | same;
            equal -= same;
        }
    if (p.index)
        for (int64_t i = 0; i < found; ++i) kept[i] = p.index[at + kept[i]];
    for (; found < p.width; ++found) kept[found] = -1;
}

}  // namespace

int select(const SelectParams& p, int threads) {
    for (int64_t i = 0; i < p.num_images; ++i)
        if (p.budget[i] < 0 || p.budget[i] > p.num_tokens || p.budget[i] > p.width)
            return fail("select: num_keep[%lld] must be in [0, num_vision=%lld], got %lld", (long long)i,
                        (long long)p.num_tokens, (long long)p.budget[i]);
    auto body = [&](int64_t image) { select_image(p, image); };
    parallel_for(useful_threads(threads, p.num_images * p.num_tokens, 1 << 15), p.num_images, body);
    return 0;
}

}  // namespace crop::CROP_ISA
