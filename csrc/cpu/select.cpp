// select on the CPU: radix selection on order-preserving integer keys, then one ordered scan.
//
// Classes (priority, filler) are settled before the radix: what is certainly taken gets the key 2^32 - 1, what is certainly
// not taken 0; no float has these keys. The rest competes by value. Digits are taken below the range of the competing keys,
// because attention masses share their leading bits. An image is one work item.
#include <cstdlib>

#include "../common/parallel.h"
#include "../common/simd.h"

namespace crop::CROP_ISA {
namespace {

constexpr uint32_t kAlways = 0xffffffffu, kNever = 0;
constexpr int64_t kGroup = 64;             // tokens whose comparisons fill one machine word
constexpr int64_t kStackTokens = 1 << 14;  // keys of so many tokens live on the stack
constexpr int kMaxDigitBits = 11;          // three rounds at most; few tokens take narrower digits, which clear faster

UVec score_key(Vec x) { return order_key(x == x ? x : splat(-__builtin_inff())); }

int64_t padded(int64_t count) { return (count + kGroup - 1) / kGroup * kGroup; }

// Keys of an image, padded with kNever.
void make_keys(const float* score, const float* weight, int64_t count, uint32_t* key) {
    int64_t n = 0;
    for (; n + kLanes <= count; n += kLanes) {
        const Vec x = load<Vec>(score + n);
        store(key + n, score_key(weight ? x * load<Vec>(weight + n) : x));
    }
    if (n < count) {
        Vec x = Vec{};
        for (int64_t i = n; i < count; ++i) x[i - n] = weight ? score[i] * weight[i] : score[i];
        store(key + n, score_key(x));
    }
    for (n = count; n < padded(count); ++n) key[n] = kNever;
}

struct Threshold {
    uint32_t key;   // larger keys are taken
    int64_t equal;  // and the first so many equal ones
};

// `count` is padded.
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
    const int digit_bits = count < 2048 ? 8 : kMaxDigitBits;
    const int64_t bins = int64_t{1} << digit_bits;
    for (bool narrowed = false;; narrowed = true) {
        const int width = range ? 32 - __builtin_clz(range) : 0;
        const int shift = width > digit_bits ? width - digit_bits : 0;
        // Two halves of the tokens count apart: an increment need not wait for the one just before it. The last bin takes
        // what does not compete.
        uint32_t histogram[2][(1 << kMaxDigitBits) + 1];
        for (auto& half : histogram) __builtin_memset(half, 0, sizeof(uint32_t) * bins);
        for (int64_t n = 0; n < count; n += kLanes) {
            const UVec offset = load<UVec>(key + n) - low;  // wraps beyond the range for both sentinels
            const IVec competes = offset <= range;
            if (narrowed && !any(competes)) continue;
            uint32_t digit[kLanes];
            store(digit, competes ? offset >> shift : UVec{} + static_cast<uint32_t>(bins));
            for (int i = 0; i < kLanes; i += 2) ++histogram[0][digit[i]], ++histogram[1][digit[i + 1]];
        }
        int64_t digit = bins - 1;
        for (int64_t here; (here = int64_t{histogram[0][digit]} + histogram[1][digit]) < need; --digit) need -= here;
        low += static_cast<uint32_t>(digit) << shift;
        if (int64_t{histogram[0][digit]} + histogram[1][digit] == need) return {low - 1, 0};  // no competing key is 0
        if (shift == 0) return {low, need};
        range = (1u << shift) - 1 < high - low ? (1u << shift) - 1 : high - low;  // must not wrap into the sentinels
    }
}

// Tokens beyond the threshold, ascending; how many there are.
int64_t collect(const uint32_t* key, int64_t count, Threshold limit, int64_t* kept) {
    int64_t found = 0;
    for (int64_t n = 0; n < count; n += kGroup) {
        uint64_t taken = 0, same = 0;
        for (int i = 0; i < kGroup; i += kLanes) {
            const UVec k = load<UVec>(key + n + i);
            taken |= lane_bits(k > limit.key) << i;
            if (limit.equal > 0) same |= lane_bits(k == limit.key) << i;
        }
        for (; same && limit.equal > 0; same &= same - 1, --limit.equal) taken |= same & -same;
        for (; taken; taken &= taken - 1) kept[found++] = n + __builtin_ctzll(taken);
    }
    return found;
}

void select_image(const SelectParams& p, int64_t image, uint32_t* key) {
    const int64_t count = p.num_tokens, at = image * count;
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
    int64_t* kept = p.kept + image * p.width;
    int64_t found = collect(key, padded(count), find_threshold(key, padded(count), need), kept);
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
    uint32_t* keys = nullptr;
    if (p.num_tokens > kStackTokens) {
        keys = static_cast<uint32_t*>(std::malloc(sizeof(uint32_t) * p.num_images * padded(p.num_tokens)));
        if (!keys) return fail("select: memory for %lld keys must be available", (long long)(p.num_images * p.num_tokens));
    }
    auto body = [&](int64_t image) {
        uint32_t local[kStackTokens];
        select_image(p, image, keys ? keys + image * padded(p.num_tokens) : local);
    };
    parallel_for(useful_threads(threads, p.num_images * p.num_tokens, 1 << 15), p.num_images, body);
    std::free(keys);
    return 0;
}

}  // namespace crop::CROP_ISA
