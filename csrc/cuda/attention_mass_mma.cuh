// attention_mass for bfloat16 and float16 keys, on the tensor cores.
//
// Keys lie on the M side of mma.m16n8k16 and columns on the N side, so the sum over columns is a sum within a thread and its
// quad. A product of matrices does not care for the order of the channels as long as both sides agree: lane t of a quad
// takes channels 8t..8t+7 of every 32 and feeds them as two steps of 16. Rows of K and Q therefore go from memory straight
// into fragments, 16 bytes a lane, without shared memory; K is read once per head, Q mostly from L1 and L2. Nothing but
// the instruction depends on the type of the elements.
//
// The columns are cut into units. The mass of a key is the sum over slots, in ascending order, of the sums over their units, in
// ascending order; who computes a unit is a matter of speed alone.
#pragma once
#include "attention_mass.cuh"

namespace crop {
namespace {

// Warps of a block: fewer where a warp holds many keys or channels in registers.
template <int kDim, int kTiles>
constexpr int kMmaWarps = kTiles > 1 || kDim > 128 ? 4 : 8;
template <int kDim>
constexpr int kLseWarps = kDim > 128 ? 8 : 16;  // a warp per 16 keys of a split
constexpr int kUnitColumns = 64;  // columns of a unit of work: (KV head, so many of its columns)
constexpr int kSlots = 32;        // units are spread over so many slots, neighbours in the same
constexpr int kMaxKeys = 128;     // candidates of a block
constexpr int kNowhere = 0x7fffffff;  // position of a key that no column sees

// The channels that one lane of a quad holds of a row: words 2s and 2s + 1 belong to step s of 16 channels. `place` is the
// lane's first channel, 8 * (lane % 4) of the row. kChecked: any alignment and any number of channels up to kDim, element by
// element, with the same bits; those behind `dim` are 0.
template <int kDim, bool kChecked>
struct RowFragment {
    static constexpr int kSteps = (kDim + 31) / 32 * 2;
    uint32_t word[2 * kSteps];

    template <class Load>
    DEV void load(const uint16_t* place, int dim, Load load16) {
        UNROLL
        for (int i = 0; i < kSteps / 2; ++i) load_piece(i, place, dim, load16);
    }
    template <class Load>
    DEV void load_piece(int i, const uint16_t* place, int dim, Load load16) {  // 32 channels of the quad
        const int left = dim - 32 * i - threadIdx.x % 4 * 8;
        if (kChecked) {
            UNROLL
            for (int j = 0; j < 4; ++j) {
                const uint32_t low = 2 * j < left ? place[32 * i + 2 * j] : 0, high = 2 * j + 1 < left ? place[32 * i + 2 * j + 1] : 0;
                word[4 * i + j] = low | high << 16;
            }
        } else {
            uint4 raw = make_uint4(0, 0, 0, 0);
            if (32 * i + 32 <= kDim || left > 0) raw = load16(reinterpret_cast<const uint4*>(place + 32 * i));
            word[4 * i] = raw.x, word[4 * i + 1] = raw.y, word[4 * i + 2] = raw.z, word[4 * i + 3] = raw.w;
        }
    }
};

// 16 keys as the left operand: the rows g and g + 8 of the tile woven together, a step in four neighbouring registers.
template <int kDim, bool kChecked>
struct KeyFragment {
    using Row = RowFragment<kDim, kChecked>;
    uint32_t step[Row::kSteps][4];

    // Keys at positions `at` of a head whose first one has its place at `from`; those that nobody sees are 0. The selection is
    // what moves the words, once, to where every product wants them.
    DEV void load(const uint16_t* from, int64_t stride, const int (&at)[2], int dim) {
        Row row[2];
        UNROLL
        for (int i = 0; i < Row::kSteps / 2; ++i) {
            UNROLL
            for (int h = 0; h < 2; ++h) row[h].load_piece(i, from + (at[h] == kNowhere ? 0 : at[h] * stride), dim, ptx::load_once);
        }
        UNROLL
        for (int s = 0; s < Row::kSteps; ++s) {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                step[s][i] = at[i % 2] == kNowhere ? 0u : row[i % 2].word[2 * s + i / 2];
                if (!kChecked) ptx::settle(step[s][i]);
            }
        }
    }
};

// Column of the unit a warp works on. A column that does not exist has the address of one that does, and end = 0.
struct Column {
    int64_t query;  // offset of its row of Q
    float shift;    // its log-sum-exp
    int end;        // of the keys it sees
};

DEV Column column_at(const AttentionMassParams& p, const Rows& rows, int64_t b, int kv, int column, int group, float lse_unit) {
    const bool exists = column < rows.count * group;
    const int64_t row = rows.first + (exists ? column / group : 0), head = kv * group + (exists ? column % group : 0);
    return {b * p.query_stride[0] + head * p.query_stride[1] + row * p.query_stride[2],
            p.lse ? shift_of(p.lse[(b * p.num_heads + head) * p.num_rows + row], lse_unit) : 0.0f,
            exists ? row_end(p, b, row, rows.start) : 0};
}

// Calls f with a value of the type of the elements; one branch ahead of a loop, not in it.
template <class F>
DEV void for_half_type(int dtype, F f) {
    if (dtype == kBFloat16) f(__nv_bfloat16{});
    else f(__half{});
}

// logit[m] = products of 16 keys each with 8 columns. Lane (g, t) of keys g, g + 8 holds columns 2t, 2t + 1. A piece of `query`
// that has been used makes room for that of `next`, which has the time of all other products to come. Even and odd steps are
// summed apart, so that no product waits for the one just before it.
template <int kDim, int kTiles, bool kChecked, class T>
DEV void multiply(float (&logit)[kTiles][4], const KeyFragment<kDim, kChecked> (&key)[kTiles],
                  RowFragment<kDim, kChecked>& query, const uint16_t* next, int dim, T type) {
    float odd[kTiles][4];
    UNROLL
    for (int m = 0; m < kTiles; ++m) {
        UNROLL
        for (int i = 0; i < 4; ++i) logit[m][i] = odd[m][i] = 0;
    }
    UNROLL
    for (int s = 0; s < query.kSteps; ++s) {
        const uint32_t b[2] = {query.word[2 * s], query.word[2 * s + 1]};
        UNROLL
        for (int m = 0; m < kTiles; ++m) ptx::mma(s % 2 ? odd[m] : logit[m], key[m].step[s], b, type);
        if (s % 2) query.load_piece(s / 2, next, dim, ptx::load_again);
    }
    UNROLL
    for (int m = 0; m < kTiles; ++m) {
        UNROLL
        for (int i = 0; i < 4; ++i) logit[m][i] = __fadd_rn(logit[m][i], odd[m][i]);
    }
}

// How `count` units are spread: over slots, and over the warps and blocks that share a tile. `ways` of them, a power of two up
// to kSlots, take neighbouring slots each; with fewer units than slots every unit has a slot of its own.
struct Units {
    int count;

    DEV int slots() const { return min(count, kSlots); }
    DEV int slot_of(int unit) const { return count <= kSlots ? unit : unit * kSlots / count; }
    DEV int first_of(int way, int ways) const { return (way * (kSlots / ways) * count + kSlots - 1) / kSlots; }
    DEV int way_of_slot(int slot, int ways) const { return slot * ways / slots(); }
};

// mass[i, n] = sum over KV heads, rows, heads of [visible] exp(scale <q, k> - lse), divided by counted rows * num_heads.
//
// A cluster of blocks (often of one) owns a tile of candidates of one image, and nobody else writes them. The warps of a block
// stand on a grid: `subtiles` of them along the candidates, kTiles * 16 each, and the others along the units; the blocks of a
// cluster share the units too. A warp keeps the keys of a head in registers and lets the columns pass, 8 at a time.
// Bytes read: the tile's keys once per head (once per warp that has units of the head), the queries of the sample once per
// tile.
// Deterministic: one writer per result; the order of the sum depends on the number of units and on nothing else.
template <int kDim, int kTiles, bool kChecked>
GLOBAL((32 * kMmaWarps<kDim, kTiles>), (kChecked ? 1 : kMmaWarps<kDim, kTiles> == 8 ? 2 : 3))
mass_mma_kernel(AttentionMassParams p, int subtiles, int cluster, float lse_unit) {
    constexpr int kWarpKeys = 16 * kTiles, kWarps = kMmaWarps<kDim, kTiles>;
    static_assert(kWarps * kWarpKeys <= kMaxKeys, "shared memory is cut for kMaxKeys");
    SHARED(Column, columns, [kWarps * kUnitColumns]);
    SHARED(float, slots, [kSlots * kMaxKeys]);
    SHARED(int, found, [4]);

    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const unsigned rank = blockIdx.x % static_cast<unsigned>(cluster), tile = blockIdx.x / static_cast<unsigned>(cluster);
    const int ways = kWarps / subtiles * cluster, way = rank * (kWarps / subtiles) + warp / subtiles;
    const int key0 = warp % subtiles * kWarpKeys;
    const unsigned tile_keys = static_cast<unsigned>(subtiles) * kWarpKeys;
    const unsigned tiles = static_cast<unsigned>((p.num_tokens + tile_keys - 1) / tile_keys);
    const unsigned image = tile / tiles, share = tile_keys / cluster, own = rank * share + threadIdx.x;
    const unsigned candidate = tile % tiles * tile_keys + own;  // whose slots this thread adds
    const int64_t sample = p.sample ? p.sample[image] : image;
    const bool mine = threadIdx.x < share && candidate < p.num_tokens;
    float* result = p.mass + image * p.num_tokens + candidate;
    if (sample < 0 || sample >= p.batch) {
        if (mine) *result = 0;
        return;
    }
    const int b = static_cast<int>(sample);

    int at[kTiles][2];  // keys of this lane's candidates
    UNROLL
    for (int m = 0; m < kTiles; ++m) {
        UNROLL
        for (int h = 0; h < 2; ++h) {
            const unsigned n = tile % tiles * tile_keys + key0 + 16 * m + 8 * h + g;
            const int64_t j = n < p.num_tokens ? p.vision_index[image * p.num_tokens + n] : -1;
            at[m][h] = j >= 0 && j < p.num_keys ? static_cast<int>(j) : kNowhere;
        }
    }
    const int dim = static_cast<int>(p.head_dim), heads = static_cast<int>(p.num_kv_heads);
    const int group = static_cast<int>(p.num_heads) / heads;
    const uint16_t* queries = static_cast<const uint16_t*>(p.query) + 8 * t;  // this lane's place
    const uint16_t* keys = static_cast<const uint16_t*>(p.key) + b * p.key_stride[0] + 8 * t;
    auto prefetch = [&](int kv) {  // a quarter of each row per lane
        UNROLL
        for (int m = 0; m < kTiles; ++m) {
            UNROLL
            for (int h = 0; h < 2; ++h)
                if (at[m][h] != kNowhere)
                    ptx::prefetch(keys - 8 * t + dim * t / 4 + kv * p.key_stride[1] + at[m][h] * p.key_stride[2]);
        }
    };
    {  // the first keys come while the rows are counted, if all rows count
        const int parts = static_cast<int>((p.num_rows * group + kUnitColumns - 1) / kUnitColumns);
        const Units units{heads * parts};
        if (units.first_of(way, ways) < units.first_of(way + 1, ways)) prefetch(units.first_of(way, ways) / parts);
    }
    const Rows rows = find_rows<32 * kWarps>(p, b, found);
    UNROLL
    for (int m = 0; m < kTiles; ++m) {
        UNROLL
        for (int h = 0; h < 2; ++h)
            if (at[m][h] < rows.start) at[m][h] = kNowhere;
    }

    const int count = rows.count * group, parts = (count + kUnitColumns - 1) / kUnitColumns;
    const Units units{heads * parts};
    Column* column = columns + warp * kUnitColumns;
    int unit = units.first_of(way, ways), slot = -1;
    const int end_unit = units.first_of(way + 1, ways);
    ROLLED
    while (unit < end_unit) {
        const int kv = unit / parts;
        KeyFragment<kDim, kChecked> key[kTiles];
        UNROLL
        for (int m = 0; m < kTiles; ++m) key[m].load(keys + kv * p.key_stride[1], p.key_stride[2], at[m], dim);
        if ((kv + 1) * parts < end_unit) prefetch(kv + 1);
        ROLLED
        for (; unit < end_unit && unit / parts == kv; ++unit) {
            const int column0 = unit % parts * kUnitColumns, existing = min(kUnitColumns, count - column0);
            __syncwarp();  // the columns of the last unit have been read
            ROLLED
            for (int c = lane; c < kUnitColumns; c += 32) column[c] = column_at(p, rows, b, kv, column0 + c, group, lse_unit);
            __syncwarp();
            auto query_of = [&](int c) { return queries + column[c + g].query; };
            float sum[kTiles][2] = {}, high[kTiles][2];
            UNROLL
            for (int m = 0; m < kTiles; ++m) high[m][0] = high[m][1] = -kInf;
            RowFragment<kDim, kChecked> query;
            query.load(query_of(0), dim, ptx::load_again);
            for_half_type(p.dtype, [&](auto type) {
                ROLLED
                for (int c = 0; c < existing; c += 8) {
                    float logit[kTiles][4];
                    multiply(logit, key, query, query_of(min(c + 8, kUnitColumns - 8)), dim, type);
                    UNROLL
                    for (int i = 0; i < 2; ++i) {
                        const float shift = column[c + 2 * t + i].shift;
                        const int end = column[c + 2 * t + i].end;
                        UNROLL
                        for (int m = 0; m < kTiles; ++m) {
                            UNROLL
                            for (int h = 0; h < 2; ++h) {
                                const float x = __fmul_rn(logit[m][2 * h + i], p.scale) - shift;
                                const float y = at[m][h] < end ? x : -kInf;
                                high[m][h] = fmaxf(high[m][h], y);
                                sum[m][h] += ptx::ex2(y);
                            }
                        }
                    }
                }
            });
            const bool begins = units.slot_of(unit) != slot;
            slot = units.slot_of(unit);
            UNROLL
            for (int m = 0; m < kTiles; ++m) {
                UNROLL
                for (int h = 0; h < 2; ++h) {
                    float part = high[m][h] == kInf ? high[m][h] - high[m][h] : sum[m][h];  // a +inf logit gives NaN
                    part += __shfl_xor_sync(kWarp, part, 1);
                    part += __shfl_xor_sync(kWarp, part, 2);
                    float* place = slots + slot * kMaxKeys + key0 + 16 * m + 8 * h + g;
                    if (t == 0) *place = begins ? part : *place + part;
                }
            }
        }
    }
    if (cluster > 1) ptx::cluster_sync();
    else __syncthreads();
    if (mine) {
        float total = 0;
        ROLLED
        for (int first = 0; first < units.slots(); first += 8) {
            float value[8];  // all on their way at once: another block's memory is far
            UNROLL
            for (int i = 0; i < 8; ++i) {
                const float* place = slots + (first + i) * kMaxKeys + own;
                if (first + i >= units.slots()) value[i] = 0;
                else value[i] = cluster == 1 ? *place : *ptx::cluster_at(place, units.way_of_slot(first + i, cluster));
            }
            UNROLL
            for (int i = 0; i < 8; ++i) total += value[i];
        }
        *result = mean_of(total, rows, p.num_heads);
    }
    if (cluster > 1) ptx::cluster_sync_relaxed();  // a block must not end while others read what it holds
}

// Partial log-sum-exp of a split of 256 keys, 128 if they are long.
//
// A warp owns 16 keys of the split and keeps them in registers while the columns of the KV head pass, 8 at a time; the
// partials of a column meet in shared memory and are merged in the order of the warps.
// Bytes read: the split's keys of one head once, the queries of the head.
// Deterministic: one writer per partial, and an order that depends on the position in the split alone.
template <int kDim, bool kChecked>
GLOBAL(32 * kLseWarps<kDim>, 1)
lse_mma_kernel(AttentionMassParams p, Partial* partial, int splits) {
    SHARED(Column, column, [kUnitColumns]);
    constexpr int kWarps = kLseWarps<kDim>;
    SHARED(Partial, part, [kWarps * kUnitColumns]);
    SHARED(int, found, [4]);

    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const Split split = split_of(p, splits);
    const Rows rows = find_rows<32 * kLseWarps<kDim>>(p, split.b, found);
    const unsigned stop = rows.stop, first = static_cast<unsigned>(rows.start) + split.number * kWarps * 16;  // no wrap
    if (first >= stop) return;

    const int dim = static_cast<int>(p.head_dim), group = static_cast<int>(p.num_heads / p.num_kv_heads);
    int at[2];
    UNROLL
    for (int h = 0; h < 2; ++h) {
        const unsigned j = first + 16 * warp + 8 * h + g;
        at[h] = j < stop ? static_cast<int>(j) : kNowhere;
    }
    KeyFragment<kDim, kChecked> key[1];
    key[0].load(static_cast<const uint16_t*>(p.key) + split.b * p.key_stride[0] + split.kv * p.key_stride[1] + 8 * t,
                p.key_stride[2], at, dim);
    const uint16_t* queries = static_cast<const uint16_t*>(p.query) + 8 * t;  // this lane's place

    const int count = rows.count * group;
    for (int column0 = 0; column0 < count; column0 += kUnitColumns) {
        const int existing = min(kUnitColumns, count - column0);
        if (threadIdx.x < kUnitColumns)
            column[threadIdx.x] = column_at(p, rows, split.b, split.kv, column0 + threadIdx.x, group, 1.0f);
        __syncthreads();
        auto query_of = [&](int c) { return queries + column[c + g].query; };
        RowFragment<kDim, kChecked> query;
        query.load(query_of(0), dim, ptx::load_again);
        for_half_type(p.dtype, [&](auto type) {
            ROLLED
            for (int c = 0; c < existing; c += 8) {
                float logit[1][4];
                multiply(logit, key, query, query_of(min(c + 8, kUnitColumns - 8)), dim, type);
                UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int end = column[c + 2 * t + i].end;
                    float x[2], high, sum;
                    UNROLL
                    for (int h = 0; h < 2; ++h) x[h] = at[h] < end ? __fmul_rn(logit[0][2 * h + i], p.scale) : -kInf;
                    high = fmaxf(x[0], x[1]);  // skips NaN, the sum does not
                    UNROLL
                    for (int step = 4; step < 32; step *= 2) high = fmaxf(high, __shfl_xor_sync(kWarp, high, step));
                    sum = ptx::ex2(x[0] - finite(high)) + ptx::ex2(x[1] - finite(high));
                    UNROLL
                    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(kWarp, sum, step);
                    if (g == 0) part[warp * kUnitColumns + c + 2 * t + i] = {high, sum};
                }
            }
        });
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < existing) {
            Partial all = part[threadIdx.x];
            for (int other = 1; other < kWarps; ++other) all = merge(all, part[other * kUnitColumns + threadIdx.x]);
            partials_of(p, partial, split, splits)[rows.first * group + column0 + threadIdx.x] = all;
        }
    }
}

}  // namespace
}  // namespace crop
