// attention_mass for bfloat16 and float16 keys, on the tensor cores: products as in attention_mass_fragments.cuh.
//
// K is read from memory once per head. The columns are cut into units. The mass of a key is the sum over slots, in ascending
// order, of the sums over their units, in ascending order; who computes a unit is a matter of speed alone.
#pragma once
#include "attention_mass_fragments.cuh"

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

// Staged queries: columns of a block at a time, and the bytes of a row, an odd number of 64 so that neighbours lie in
// different banks.
template <int kDim>
constexpr int kStage = kDim > 128 ? 16 : 32;
template <int kDim>
constexpr int kStagedBytes = ((kDim + 31) / 32 | 1) * 64;

// How `count` units are spread: over slots, and over the warps and blocks that share a tile. `ways` of them, a power of two up
// to kSlots, take neighbouring slots each; with fewer units than slots every unit has a slot of its own.
struct Units {
    int count;

    DEV int slots() const { return min(count, kSlots); }
    DEV int slot_of(int unit) const { return count <= kSlots ? unit : unit * kSlots / count; }
    DEV int first_of(int way, int ways) const { return (way * (kSlots / ways) * count + kSlots - 1) / kSlots; }
    DEV int way_of_slot(int slot, int ways) const { return slot * ways / slots(); }
};

// Sums of a warp over the columns of a unit. A lane has part of those of the keys g and g + 8 of each tile.
template <int kTiles>
struct UnitSums {
    float sum[kTiles][2], high[kTiles][2];

    DEV void clear() {
        UNROLL
        for (int m = 0; m < kTiles; ++m) sum[m][0] = sum[m][1] = 0, high[m][0] = high[m][1] = -kInf;
    }
    DEV void add(const float (&logit)[kTiles][4], const int (&at)[kTiles][2], const Column* pair, float scale) {
        UNROLL
        for (int i = 0; i < 2; ++i) {
            const float shift = pair[i].shift;
            const int end = pair[i].end;
            UNROLL
            for (int m = 0; m < kTiles; ++m) {
                UNROLL
                for (int h = 0; h < 2; ++h) {
                    const float x = __fmul_rn(logit[m][2 * h + i], scale) - shift;
                    const float y = at[m][h] < end ? x : -kInf;
                    high[m][h] = fmaxf(high[m][h], y);
                    sum[m][h] += ptx::ex2(y);
                }
            }
        }
    }
    // Adds the unit to the slot of the warp's first key, or begins it.
    DEV void put(float* slot, bool begins) const {
        const int lane = threadIdx.x % 32;
        UNROLL
        for (int m = 0; m < kTiles; ++m) {
            UNROLL
            for (int h = 0; h < 2; ++h) {
                float part = high[m][h] == kInf ? high[m][h] - high[m][h] : sum[m][h];  // a +inf logit gives NaN
                part += __shfl_xor_sync(kWarp, part, 1);
                part += __shfl_xor_sync(kWarp, part, 2);
                float* place = slot + 16 * m + 8 * h + lane / 4;
                if (lane % 4 == 0) *place = begins ? part : *place + part;
            }
        }
    }
};

// mass[i, n] = sum over KV heads, rows, heads of [visible] exp(scale <q, k> - lse), divided by counted rows * num_heads.
//
// A cluster of blocks (often of one) owns a tile of candidates of one image, and nobody else writes them. The warps of a block
// stand on a grid: `subtiles` of them along the candidates, kTiles * 16 each, and the others along the units; the blocks of a
// cluster share the units too. A warp keeps the keys of a head in registers and lets the columns pass, 8 at a time.
// Their queries come from memory straight into fragments; or, kStaged, where warps along the candidates have the same
// columns, the block copies them to shared memory, kStage at a time, the next ones while these are used.
// Bytes read: the tile's keys once per head (once per warp that has units of the head), the queries of the sample once per
// tile (not staged: once per warp along its candidates, then from L1).
// Deterministic: one writer per result; the order of the sum depends on the number of units and on nothing else.
template <int kDim, int kTiles, bool kChecked, bool kStaged>
GLOBAL((32 * kMmaWarps<kDim, kTiles>), (kChecked ? 1 : kMmaWarps<kDim, kTiles> == 8 ? 2 : 3))
mass_mma_kernel(AttentionMassParams p, int subtiles, int cluster, float lse_unit) {
    constexpr int kWarpKeys = 16 * kTiles, kWarps = kMmaWarps<kDim, kTiles>;
    static_assert(kWarps * kWarpKeys <= kMaxKeys, "shared memory is cut for kMaxKeys");
    static_assert(!(kChecked && kStaged), "copies to shared memory are of 16 bytes");
    SHARED(Column, columns, [kStaged ? 2 * kStage<kDim> : kWarps * kUnitColumns]);
    SHARED(uint4, staged, [kStaged ? 2 * kStage<kDim> * kStagedBytes<kDim> / 16 : 1]);
    SHARED(float, slots, [kSlots * kMaxKeys]);
    SHARED(int, found, [4]);

    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const unsigned rank = blockIdx.x % static_cast<unsigned>(cluster), tile = blockIdx.x / static_cast<unsigned>(cluster);
    const int block_ways = kWarps / subtiles, ways = block_ways * cluster, way = rank * block_ways + warp / subtiles;
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
    const int first_unit = units.first_of(way, ways), end_unit = units.first_of(way + 1, ways);
    UnitSums<kTiles> sums;
    int slot = -1;
    auto put = [&](int unit) {
        const bool begins = units.slot_of(unit) != slot;
        slot = units.slot_of(unit);
        sums.put(slots + slot * kMaxKeys + key0, begins);
    };
    auto load_keys = [&](KeyFragment<kDim, kChecked> (&key)[kTiles], int kv) {
        UNROLL
        for (int m = 0; m < kTiles; ++m) key[m].load(keys + kv * p.key_stride[1], p.key_stride[2], at[m], dim);
        if ((kv + 1) * parts < end_unit) prefetch(kv + 1);
    };
    if constexpr (kStaged) {
        constexpr int kCopiers = 32 * kWarps / kStage<kDim>, kPieces = (kDim + 31) / 32 * 4;  // threads of a column; of a row
        constexpr int kRow = kStagedBytes<kDim> / 16;
        const int stage = kStage<kDim> / block_ways, stages = kUnitColumns / stage;  // columns of a way, and of a unit
        const int place = threadIdx.x / kCopiers;  // of the column that this thread copies, one of its own way
        auto column_of = [&](int s) { return (first_unit + s / stages) % parts * kUnitColumns + s % stages * stage; };
        auto fetch = [&](int s) {  // starts the copies of stage s
            Column column = {};
            const int unit = first_unit + s / stages;
            if (unit < end_unit) {
                const int number = column_of(s) + place % stage;
                column = column_at(p, rows, b, unit / parts, number, group, lse_unit);
                uint4* to = staged + (s % 2 * kStage<kDim> + place) * kRow;
                const uint16_t* from = queries - 8 * t + column.query;
                UNROLL
                for (int i = threadIdx.x % kCopiers; i < kPieces; i += kCopiers)
                    if (8 * i < dim) ptx::cp_async16(to + i, from + 8 * i, number < count ? 16 : 0);
            }
            ptx::cp_commit();
            return column;
        };
        int longest = 0;  // units of a way of the block: all threads meet at every barrier
        for (int w = way - warp / subtiles; w < way - warp / subtiles + block_ways; ++w)
            longest = max(longest, units.first_of(w + 1, ways) - units.first_of(w, ways));
        Column next = fetch(0);
        KeyFragment<kDim, kChecked> key[kTiles];
        int kv = -1;
        ROLLED
        for (int s = 0; s < longest * stages; ++s) {
            if (threadIdx.x % kCopiers == 0) columns[s % 2 * kStage<kDim> + place] = next;
            ptx::cp_wait<0>();
            __syncthreads();  // the stage is complete, and nobody reads the one before
            next = fetch(s + 1);
            const int unit = first_unit + s / stages;
            if (unit >= end_unit) continue;
            if (unit / parts != kv) kv = unit / parts, load_keys(key, kv);
            if (s % stages == 0) sums.clear();
            const int existing = min(stage, count - column_of(s)), own0 = s % 2 * kStage<kDim> + warp / subtiles * stage;
            auto query_of = [&](int c) { return reinterpret_cast<const uint16_t*>(staged + (own0 + c + g) * kRow) + 8 * t; };
            auto load = [](const uint4* at) { return *at; };
            RowFragment<kDim, kChecked> query;
            query.load(query_of(0), dim, load);
            for_half_type(p.dtype, [&](auto type) {
                ROLLED
                for (int c = 0; c < existing; c += 8) {
                    float logit[kTiles][4];
                    multiply(logit, key, query, query_of(min(c + 8, stage - 8)), dim, load, type);
                    sums.add(logit, at, columns + own0 + c + 2 * t, p.scale);
                }
            });
            if (s % stages == stages - 1) put(unit);
        }
    } else {
        Column* column = columns + warp * kUnitColumns;
        int unit = first_unit;
        ROLLED
        while (unit < end_unit) {
            const int kv = unit / parts;
            KeyFragment<kDim, kChecked> key[kTiles];
            load_keys(key, kv);
            ROLLED
            for (; unit < end_unit && unit / parts == kv; ++unit) {
                const int column0 = unit % parts * kUnitColumns, existing = min(kUnitColumns, count - column0);
                __syncwarp();  // the columns of the last unit have been read
                ROLLED
                for (int c = lane; c < kUnitColumns; c += 32) column[c] = column_at(p, rows, b, kv, column0 + c, group, lse_unit);
                __syncwarp();
                auto query_of = [&](int c) { return queries + column[c + g].query; };
                sums.clear();
                RowFragment<kDim, kChecked> query;
                query.load(query_of(0), dim, ptx::load_again);
                for_half_type(p.dtype, [&](auto type) {
                    ROLLED
                    for (int c = 0; c < existing; c += 8) {
                        float logit[kTiles][4];
                        multiply(logit, key, query, query_of(min(c + 8, kUnitColumns - 8)), dim, ptx::load_again, type);
                        sums.add(logit, at, column + c + 2 * t, p.scale);
                    }
                });
                put(unit);
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
                multiply(logit, key, query, query_of(min(c + 8, kUnitColumns - 8)), dim, ptx::load_again, type);
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
