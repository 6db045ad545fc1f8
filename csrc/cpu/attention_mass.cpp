// attention_mass on the CPU. For one sample and KV head the logits are a matrix keys x rows, where rows are the counted
// scoring rows times the query heads of the group: K is read in its own layout and never repeated, and everything that
// runs along rows (maximum, exp, sum) is elementwise.
//
//   lse given:  one pass over the key blocks that hold a vision token; logits live for one tile of keys.
//   lse absent: pass 1 stores exp(logit - tile maximum) of every visible key with maximum and sum per tile and row;
//               pass 2 combines the tiles in index order into one factor per tile and row; pass 3 sums factor * stored.
//
// A work item owns a block of keys, blocks start at the sample's first visible key, and the variant follows the sample's
// own number of rows: the result depends neither on the threads nor on the other samples.
#include "attention_logits.h"
#include "../common/parallel.h"

namespace crop::CROP_ISA {
namespace {

constexpr int kTogether = 4;              // exponentials computed side by side
constexpr int64_t kStoreBytes = 1 << 20;  // budget for stored exponentials: as many heads at once as fit, or one
constexpr float kInf = __builtin_inff(), kHuge = 3.402823466e38f;

int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Scratch arrays; built on a null base it measures their size.
struct Scratch {
    int32_t *row, *end;   // (num_rows,) counted rows; (lanes,) end of the keys a row sees
    float *query, *lse;   // (num_kv_heads, lanes * padded head_dim); (num_kv_heads, lanes)
    float *column;        // (num_keys,) sum of the shares
    uint8_t* needed;      // (blocks,) holds a vision token
    float *factor, *sum;  // (heads, tiles, lanes) maximum of a tile, later factor; its sum
    float* stored;        // (tiles, heads, panels of lanes, keys of a tile, lanes of a panel)
    size_t bytes;

    Scratch(char* base, const AttentionMassParams& p) {
        size_t used = 0;
        auto take = [&](auto*& array, int64_t count) {
            array = reinterpret_cast<decltype(+array)>(base + used);
            used += round_up(count * sizeof(*array), 64);
        };
        const int64_t lanes = round_up(p.num_rows * (p.num_heads / p.num_kv_heads), kLanes);
        const int64_t blocks = (p.num_keys + kBlock - 1) / kBlock;
        take(row, p.num_rows);
        take(end, lanes);
        take(query, p.num_kv_heads * lanes * round_up(p.head_dim, kLanes));
        take(lse, p.num_kv_heads * lanes);
        take(column, p.num_keys);
        take(needed, blocks);
        if (!p.lse) {
            const int64_t head = blocks * kBlock * lanes;
            const int64_t all = head * p.num_kv_heads, budget = kStoreBytes / 4;
            take(stored, all < budget ? all : larger(head, budget));
            take(factor, p.num_kv_heads * blocks * kParts * lanes);
            take(sum, p.num_kv_heads * blocks * kParts * lanes);
        }
        bytes = used;
    }
};

struct Sample {
    int64_t b, rows, group, start, stop, full;  // keys [start, stop) are seen by some row, [start, full) by all
    int64_t count, lanes, blocks;               // rows * group, padded; blocks of keys
    int64_t parts;                              // pieces with a maximum of their own: tiles, blocks for few rows
    int64_t heads;                              // KV heads whose exponentials are stored together
};

template <class T>
struct Kernel {
    const AttentionMassParams& p;
    const Sample& s;
    Scratch& at;

    const T* key(int64_t kv, int64_t first) const {
        return static_cast<const T*>(p.key) + s.b * p.key_stride[0] + kv * p.key_stride[1] + first * p.key_stride[2];
    }
    const float* query(int64_t kv) const { return at.query + kv * s.lanes * round_up(p.head_dim, kLanes); }
    // Heads side by side: pass 3 reads all of a part in one go.
    float* stored(int64_t slot, int64_t part) const {
        return at.stored + (part * s.heads + slot) * (few() ? kBlock : kTile) * s.lanes;
    }
    float* top(int64_t slot, int64_t part) const { return at.factor + (slot * s.parts + part) * s.lanes; }
    float* total(int64_t slot, int64_t part) const { return at.sum + (slot * s.parts + part) * s.lanes; }
    bool few() const { return s.count <= kDotRows; }

    template <class Sink>
    void logits(int64_t kv, int64_t first, int64_t count, Sink sink) const {
        const auto block = p.head_dim <= 64    ? lanes_block<64, T, Sink>
                           : p.head_dim <= 128 ? lanes_block<128, T, Sink>
                                               : lanes_block<256, T, Sink>;
        block(key(kv, first), p.key_stride[2], count, query(kv), s.lanes, p.head_dim, sink);
    }

    // logit[row][key] of a block for few rows; -inf where the row does not see the key, and past the end.
    void few_logits(int64_t kv, int64_t block, float (*logit)[kBlock]) const {
        const int64_t first = first_key(block), count = num_keys(block);
        const T* from = key(kv, first);
        switch (s.count) {
            case 1: dot_block<1>(from, p.key_stride[2], count, query(kv), p.head_dim, logit); break;
            case 2: dot_block<2>(from, p.key_stride[2], count, query(kv), p.head_dim, logit); break;
            case 3: dot_block<3>(from, p.key_stride[2], count, query(kv), p.head_dim, logit); break;
            case 4: dot_block<4>(from, p.key_stride[2], count, query(kv), p.head_dim, logit); break;
        }
        for (int64_t r = 0; r < s.count; ++r)
            for (int64_t k = clamp(at.end[r] - first, 0, count); k < kBlock; ++k) logit[r][k] = -kInf;
    }

    int64_t first_key(int64_t block) const { return s.start + block * kBlock; }
    int64_t num_keys(int64_t block) const {
        const int64_t left = s.stop - first_key(block);
        return left < kBlock ? left : kBlock;
    }
    bool all_visible(int64_t block) const { return first_key(block) + num_keys(block) <= s.full; }
    IVec visible(int64_t key, int64_t v) const { return load<IVec>(at.end + v * kLanes) > static_cast<int32_t>(key); }

    // lse given: column[key] of a block, heads in order.
    void shares(int64_t block) const {
        const int64_t first = first_key(block), count = num_keys(block), vecs = s.lanes / kLanes;
        const bool masked = !all_visible(block);
        if (few()) return few_shares(block);
        Vec share[kBlock];
        for (Vec& v : share) v = Vec{};
        for (int64_t kv = 0; kv < p.num_kv_heads; ++kv) {
            logits(kv, first, count, [&, lse = at.lse + kv * s.lanes](int64_t k, int64_t v, auto& logit) {
                for (int j = 0; j < kWidth<decltype(logit)>; ++j) {
                    const Vec shift = load<Vec>(lse + (v + j) * kLanes);
                    // Lanes past the last row end at key 0 and are never visible.
                    const bool hidden = masked || v + j == vecs - 1;
                    for (int i = 0; i < kTile; i += kTogether) {
                        Vec e[kTogether];
                        for (int t = 0; t < kTogether; ++t) e[t] = logit[i + t][j] - shift;
                        exp(e);
                        for (int t = 0; t < kTogether; ++t) {
                            e[t] = bits<Vec>(bits<IVec>(e[t]) | (logit[i + t][j] == kInf));  // a +inf logit gives NaN
                            share[k + i + t] += hidden ? keep_where(visible(first + k + i + t, v + j), e[t]) : e[t];
                        }
                    }
                }
            });
        }
        for (int64_t k = 0; k < count; ++k) at.column[first + k] = sum(share[k]);
    }

    // Pass 1: exponentials of one head and block, stored relative to the maximum of their tile.
    void exponentials(int64_t kv, int64_t slot, int64_t block) const {
        const int64_t first = first_key(block), count = num_keys(block);
        const bool masked = !all_visible(block);
        if (few()) return few_exponentials(kv, slot, block);
        logits(kv, first, count, [&](int64_t k, int64_t v, auto& logit) {
            constexpr int kVecs = kWidth<decltype(logit)>;
            const int64_t part = block * kParts + k / kTile, keys = count - k < kTile ? count - k : kTile;
            float* stored = this->stored(slot, part) + v * kTile * kLanes;
            for (int j = 0; j < kVecs; ++j) {
                Vec high = splat(-kInf), add = Vec{};
                for (int i = 0; i < kTile; ++i) {
                    Vec& x = logit[i][j];
                    if (masked) x = visible(first + k + i, v + j) ? x : splat(-kInf);
                    if (i >= keys) x = splat(-kInf);
                    high = max(high, x);
                }
                const Vec shift = finite(high);
                for (int i = 0; i < kTile; i += kTogether) {
                    Vec e[kTogether];
                    for (int t = 0; t < kTogether; ++t) e[t] = logit[i + t][j] - shift;
                    exp(e);
                    for (int t = 0; t < kTogether; ++t) {
                        store(stored + ((i + t) * kVecs + j) * kLanes, e[t]);
                        add += e[t];
                    }
                }
                store(top(slot, part) + (v + j) * kLanes, high);
                store(total(slot, part) + (v + j) * kLanes, add);
            }
        });
    }

    // -inf (nothing visible yet) and +inf would turn differences into NaN.
    static Vec finite(Vec x) {
        x = x == -kInf ? Vec{} : x;
        return x == kInf ? splat(kHuge) : x;
    }

    // Pass 2: factor = exp(maximum - lse) of every tile; 0 for a row whose lse is infinite.
    void factors(int64_t slot) const {
        for (int64_t v = 0; v < s.lanes / kLanes; ++v) {
            float *top = this->top(slot, 0) + v * kLanes, *sums = total(slot, 0) + v * kLanes;
            Vec high = splat(-kInf), total = Vec{};
            for (int64_t j = 0; j < s.parts; ++j) high = max(load<Vec>(top + j * s.lanes), high);
            high = finite(high);
            for (int64_t j = 0; j < s.parts; ++j) {
                const Vec here = load<Vec>(top + j * s.lanes);
                const Vec factor = here == -kInf ? Vec{} : exp(here - high);
                store(top + j * s.lanes, factor);
                total += factor * load<Vec>(sums + j * s.lanes);
            }
            const IVec dead = (total == 0) | (total == kInf);
            for (int64_t j = 0; j < s.parts; ++j) {
                float* factor = top + j * s.lanes;
                store(factor, dead ? Vec{} : load<Vec>(factor) / total);
            }
        }
    }

    // Pass 3: column[key] of a block gains the heads of the group.
    void gather(int64_t block) const {
        const int64_t first = first_key(block), count = num_keys(block), vecs = s.lanes / kLanes;
        if (few()) return few_gather(block);
        const IVec last = visible(0, vecs - 1);  // drops the lanes past the last row
        for (int64_t k = 0; k < count; k += kTile) {
            const int64_t keys = count - k < kTile ? count - k : kTile;
            const int64_t part = block * kParts + k / kTile;
            Vec share[kTile] = {};
            for (int64_t slot = 0; slot < s.heads; ++slot) {
                const float *stored = this->stored(slot, part), *factor = top(slot, part);
                for (int64_t v = 0; v < vecs; v += 2) {
                    const int width = v + 1 < vecs ? 2 : 1;
                    for (int j = 0; j < width; ++j) {
                        const Vec f = load<Vec>(factor + (v + j) * kLanes);
                        for (int64_t i = 0; i < keys; ++i) {
                            const Vec e = load<Vec>(stored + (i * width + j) * kLanes) * f;
                            share[i] += v + j == vecs - 1 ? keep_where(last, e) : e;
                        }
                    }
                    stored += width * kTile * kLanes;
                }
            }
            for (int64_t i = 0; i < keys; ++i) at.column[first + k + i] += sum(share[i]);
        }
    }

    // The three steps above for few rows, along the keys of a block.
    void few_shares(int64_t block) const {
        float logit[kDotRows][kBlock];
        Vec share[kBlock / kLanes] = {};
        for (int64_t kv = 0; kv < p.num_kv_heads; ++kv) {
            few_logits(kv, block, logit);
            for (int64_t r = 0; r < s.count; ++r)
                for (int64_t v = 0; v < kBlock / kLanes; ++v) {
                    const Vec x = load<Vec>(logit[r] + v * kLanes);
                    const Vec e = exp(x - at.lse[kv * s.lanes + r]);
                    share[v] += bits<Vec>(bits<IVec>(e) | (x == kInf));
                }
        }
        __builtin_memcpy(at.column + first_key(block), share, sizeof(float) * num_keys(block));
    }
    void few_exponentials(int64_t kv, int64_t slot, int64_t block) const {
        float(*e)[kBlock] = reinterpret_cast<float(*)[kBlock]>(stored(slot, block));
        float *top = this->top(slot, block), *total = this->total(slot, block);
        few_logits(kv, block, e);
        for (int64_t r = 0; r < s.lanes; ++r) top[r] = -kInf, total[r] = 0;
        for (int64_t r = 0; r < s.count; ++r) {
            for (int64_t k = 0; k < kBlock; ++k) top[r] = e[r][k] > top[r] ? e[r][k] : top[r];
            const Vec shift = finite(splat(top[r]));
            Vec add = Vec{};
            for (int64_t k = 0; k < kBlock; k += kLanes) {
                const Vec x = exp(load<Vec>(e[r] + k) - shift);
                store(e[r] + k, x);
                add += x;
            }
            total[r] = sum(add);
        }
    }
    void few_gather(int64_t block) const {
        Vec share[kBlock / kLanes] = {};
        for (int64_t slot = 0; slot < s.heads; ++slot)
            for (int64_t r = 0; r < s.count; ++r)
                for (int64_t v = 0; v < kBlock / kLanes; ++v)
                    share[v] += load<Vec>(stored(slot, block) + r * kBlock + v * kLanes) * top(slot, block)[r];
        const float* sum = reinterpret_cast<const float*>(share);
        for (int64_t k = 0; k < num_keys(block); ++k) at.column[first_key(block) + k] += sum[k];
    }
};

template <class T>
void sample_mass(const AttentionMassParams& p, int64_t b, Scratch& at, int threads) {
    const int64_t group = p.num_heads / p.num_kv_heads;
    Sample s{};
    s.b = b, s.group = group;
    s.start = p.visible_start ? clamp(p.visible_start[b], 0, p.num_keys) : 0;
    s.stop = s.start, s.full = p.num_keys;
    for (int64_t m = 0; m < p.num_rows; ++m) {
        const int64_t end = p.visible_len ? clamp(p.visible_len[b * p.num_rows + m], 0, p.num_keys) : p.num_keys;
        if (end <= s.start) continue;
        for (int64_t h = 0; h < group; ++h) at.end[s.rows * group + h] = static_cast<int32_t>(end);
        at.row[s.rows++] = static_cast<int32_t>(m);
        if (end > s.stop) s.stop = end;
        if (end < s.full) s.full = end;
    }
    s.count = s.rows * group, s.lanes = round_up(s.count, kLanes), s.blocks = (s.stop - s.start + kBlock - 1) / kBlock;
    s.parts = s.count <= kDotRows ? s.blocks : (s.stop - s.start + kTile - 1) / kTile;
    __builtin_memset(at.column, 0, sizeof(float) * p.num_keys);
    __builtin_memset(at.needed, 0, (p.num_keys + kBlock - 1) / kBlock);
    for (int64_t r = s.count; r < s.lanes; ++r) at.end[r] = 0;

    const Kernel<T> kernel{p, s, at};
    const int64_t work = (s.stop - s.start) * p.num_kv_heads * larger(s.lanes, 8) * p.head_dim;
    threads = useful_threads(threads, work, 1 << 20);
    auto pack = [&](int64_t kv) {
        pack_query<T>(p, b, kv, at.row, s.rows, at.query + kv * s.lanes * round_up(p.head_dim, kLanes));
        if (!p.lse) return;
        for (int64_t r = 0; r < s.count; ++r) {
            const float lse = p.lse[(b * p.num_heads + kv * group + r % group) * p.num_rows + at.row[r / group]];
            at.lse[kv * s.lanes + r] = lse == -kInf ? kInf : lse;
        }
    };
    parallel_for(useful_threads(threads, s.count * p.num_kv_heads * p.head_dim, 1 << 16), p.num_kv_heads, pack);

    if (p.lse) {
        for (int64_t i = 0; i < p.num_images; ++i)
            if ((p.sample ? p.sample[i] : i) == b)
                for (int64_t n = 0; n < p.num_tokens; ++n) {
                    const int64_t j = p.vision_index[i * p.num_tokens + n];
                    if (j >= s.start && j < s.stop) at.needed[(j - s.start) / kBlock] = 1;
                }
        auto body = [&](int64_t block) {
            if (at.needed[block]) kernel.shares(block);
        };
        parallel_for(threads, s.blocks, body);
    } else {
        const int64_t head = larger(1, s.blocks * kBlock * s.lanes);
        const int64_t width = clamp(kStoreBytes / 4 / head, 1, p.num_kv_heads);
        for (int64_t kv = 0; kv < p.num_kv_heads; kv += width) {
            s.heads = p.num_kv_heads - kv < width ? p.num_kv_heads - kv : width;
            auto first = [&](int64_t item) { kernel.exponentials(kv + item / s.blocks, item / s.blocks, item % s.blocks); };
            auto second = [&](int64_t slot) { kernel.factors(slot); };
            auto third = [&](int64_t block) { kernel.gather(block); };
            parallel_for(threads, s.heads * s.blocks, first);
            parallel_for(threads, s.heads, second);
            parallel_for(threads, s.blocks, third);
        }
    }

    const float divisor = static_cast<float>(larger(1, s.rows * p.num_heads));
    for (int64_t j = s.start; j < s.stop; ++j) at.column[j] /= divisor;
    for (int64_t i = 0; i < p.num_images; ++i)
        if ((p.sample ? p.sample[i] : i) == b)
            for (int64_t n = 0; n < p.num_tokens; ++n) {
                const int64_t j = p.vision_index[i * p.num_tokens + n];
                p.mass[i * p.num_tokens + n] = j < 0 ? 0.0f : at.column[j];
            }
}

}  // namespace

size_t attention_mass_scratch(const AttentionMassParams& p) { return Scratch(nullptr, p).bytes; }

int attention_mass(const AttentionMassParams& p, int threads) {
    for (int64_t i = 0; i < p.num_images; ++i) {
        const int64_t b = p.sample ? p.sample[i] : i;
        if (b < 0 || b >= p.batch)
            return fail("attention_mass: sample must be at least 0 and less than %lld, got %lld", (long long)p.batch,
                        (long long)b);
        int64_t low = 0, high = -1;
        for (int64_t n = 0; n < p.num_tokens; ++n) {
            const int64_t j = p.vision_index[i * p.num_tokens + n];
            low = j < low ? j : low, high = j > high ? j : high;
        }
        if (low < -1 || high >= p.num_keys)
            return fail("attention_mass: vision_index must be at least -1 and less than %lld, got %lld",
                        (long long)p.num_keys, (long long)(low < -1 ? low : high));
    }
    return dispatch_dtype("attention_mass", p.dtype, [&](auto type) {
        Scratch at(static_cast<char*>(p.scratch), p);
        for (int64_t b = 0; b < p.batch; ++b) {
            bool used = !p.sample;
            for (int64_t i = 0; i < p.num_images && !used; ++i) used = p.sample[i] == b;
            if (used) sample_mass<decltype(type)>(p, b, at, threads);
        }
        return 0;
    });
}

}  // namespace crop::CROP_ISA
