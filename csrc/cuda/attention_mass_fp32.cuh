// attention_mass for float32 keys: logits by fused multiply-adds, channels in ascending order, from tiles in shared memory.
#pragma once
#include "attention_mass.cuh"

namespace crop {
namespace {

constexpr int kTileThreads = 128;
constexpr int kTileKeys = 32;
// The log-sum-exp pass sums keys in this order, whatever the shape of the tiles: within a split chain j takes the keys
// j, j + 8, ... of each tile of 32, tile by tile; then come the chains and then the splits in ascending order.
constexpr int kChains = 8, kChainKeys = kTileKeys / kChains;

// How the threads share a tile of 32 keys and kColumns columns: kX threads along columns and kY along keys, each with every
// kX-th column and every kY-th key; kLaneX of a warp's lanes lie along columns. kChunkBytes of a row are staged at a time.
struct ManyColumns {
    static constexpr int kX = 16, kY = 8, kLaneX = 8, kColumns = 64, kChunkBytes = 128;
};
struct FewColumns {  // a warp shares its columns, a lane owns a key: bound by reading K
    static constexpr int kX = 4, kY = 32, kLaneX = 1, kColumns = 8, kChunkBytes = 256;
};

// Logits of 32 keys x kColumns columns of KV head `kv`, made chunk by chunk of the channels.
template <class Shape>
struct Tile {
    static constexpr int kColumns = Shape::kColumns;
    static constexpr int kKeysPer = kTileKeys / Shape::kY, kColumnsPer = kColumns / Shape::kX;  // of a thread
    static constexpr int kChunk = Shape::kChunkBytes / sizeof(float);                               // channels
    static constexpr int kStride = kChunk + 4;  // floats of a staged row: 8 rows in 8 different groups of 4 banks
    static constexpr int kPieces = Shape::kChunkBytes / 16;
    static constexpr int kKeyLoads = kTileKeys * kPieces / kTileThreads;
    static constexpr int kColumnLoads = kColumns * kPieces / kTileThreads;
    static constexpr int kKeyFloats = kTileKeys * kStride, kColumnFloats = kColumns * kStride;

    const AttentionMassParams& p;
    const Rows& rows;
    int64_t b;
    bool aligned;
    float lse_unit;  // of the log-sum-exp given, in log 2
    int group, columns;  // columns = rows.count * group
    float *keys, *queries, *lse;  // shared: kKeyFloats, kColumnFloats, kColumns
    int* end;                     // shared: kColumns

    Piece<float> next_key[kKeyLoads], next_query[kColumnLoads];  // the next chunk, on its way
    float next_lse;
    int next_end;
    float logit[kKeysPer][kColumnsPer];

    DEV Tile(const AttentionMassParams& params, const Rows& found, int64_t sample, bool aligned_, float unit, float* keys_,
             float* queries_, int* end_, float* lse_)
        : p(params), rows(found), b(sample), aligned(aligned_), lse_unit(unit), group(static_cast<int>(params.num_heads / params.num_kv_heads)),
          columns(found.count * group), keys(keys_), queries(queries_), lse(lse_), end(end_), next_lse(0), next_end(0) {}

    DEV int x() const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        return lane % Shape::kLaneX + warp % (Shape::kX / Shape::kLaneX) * Shape::kLaneX;
    }
    DEV int y() const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        return lane / Shape::kLaneX + warp / (Shape::kX / Shape::kLaneX) * (32 / Shape::kLaneX);
    }
    DEV int key_of(int k) const { return y() + k * Shape::kY; }
    DEV int column_of(int c) const { return x() + c * Shape::kX; }

    // Starts the loads of one chunk. position(k): key held by row k of the tile, negative for none.
    template <class Position>
    DEV void fetch(int kv, int column0, int channel, Position position) {
        const float* key = static_cast<const float*>(p.key) + b * p.key_stride[0] + kv * p.key_stride[1];
        UNROLL
        for (int i = 0; i < kKeyLoads; ++i) {
            const int at = i * kTileThreads + threadIdx.x;
            const int from = position(at / kPieces), c = channel + at % kPieces * Piece<float>::kCount;
            const int64_t left = from < 0 ? 0 : p.head_dim - c;
            next_key[i] = load_piece(key + (from < 0 ? 0 : from * p.key_stride[2] + c), left, aligned);
        }
        const float* query = static_cast<const float*>(p.query) + b * p.query_stride[0];
        UNROLL
        for (int i = 0; i < kColumnLoads; ++i) {
            const int at = i * kTileThreads + threadIdx.x;
            const int column = column0 + at / kPieces, c = channel + at % kPieces * Piece<float>::kCount;
            const bool exists = column < columns;
            const int row = exists ? rows.first + column / group : 0, head = exists ? kv * group + column % group : 0;
            const int64_t offset = head * p.query_stride[1] + row * p.query_stride[2] + c;
            next_query[i] = load_piece(query + (exists ? offset : 0), exists ? p.head_dim - c : 0, aligned);
        }
        if (channel == 0 && threadIdx.x < kColumns) {
            const int column = column0 + threadIdx.x;
            const bool exists = column < columns;
            const int64_t row = rows.first + column / group, head = kv * group + column % group;
            next_end = exists ? row_end(p, b, row, rows.start) : 0;
            if (p.lse) next_lse = exists ? shift_of(p.lse[(b * p.num_heads + head) * p.num_rows + row], lse_unit) : 0.0f;
        }
    }

    // Fetched chunk -> shared memory, queries times scale (of logits in log 2). A barrier must follow.
    DEV void stage(int channel) {
        UNROLL
        for (int i = 0; i < kKeyLoads; ++i) put(keys, i * kTileThreads + threadIdx.x, next_key[i], 1.0f);
        UNROLL
        for (int i = 0; i < kColumnLoads; ++i) put(queries, i * kTileThreads + threadIdx.x, next_query[i], p.scale);
        if (channel == 0 && threadIdx.x < kColumns) end[threadIdx.x] = next_end, lse[threadIdx.x] = next_lse;
    }

    DEV static void put(float* to, int at, const Piece<float>& piece, float scale) {
        float4* target = reinterpret_cast<float4*>(to + at / kPieces * kStride + at % kPieces * Piece<float>::kCount);
        UNROLL
        for (int i = 0; i < Piece<float>::kCount; i += 4)
            target[i / 4] = make_float4(piece.get(i) * scale, piece.get(i + 1) * scale, piece.get(i + 2) * scale,
                                        piece.get(i + 3) * scale);
    }

    // Logit of key chain + k * kChains of the tile. Where a lane owns one key, lanes with equal y % kChains share the work.
    DEV float chain_logit(int chain, int k, int c) const {
        if constexpr (Shape::kY == kChains) return logit[k][c];
        else return __shfl_sync(kWarp, logit[0][c], chain + k * kChains);
    }

    DEV void clear() {
        UNROLL
        for (int k = 0; k < kKeysPer; ++k) {
            UNROLL
            for (int c = 0; c < kColumnsPer; ++c) logit[k][c] = 0;
        }
    }

    // Adds the staged chunk to the logits of the columns from column0 on; threads without a column skip it.
    DEV void multiply(int column0, int channel) {
        const int left = columns - column0, channels = static_cast<int>(p.head_dim) - channel;
        const int used = channels < kChunk ? (channels + 3) / 4 * 4 : kChunk;
        if (x() / Shape::kLaneX * Shape::kLaneX < left) accumulate<kColumnsPer>((left + Shape::kX - 1) / Shape::kX, used);
    }

    template <int kActive>
    DEV void accumulate(int active, int used) {
        if constexpr (kActive > 1)
            if (active < kActive) return accumulate<kActive - 1>(active, used);
        const float *key = keys + y() * kStride, *query = queries + x() * kStride;
        for (int i = 0; i < used; i += 4) {
            float4 q[kActive];
            UNROLL
            for (int c = 0; c < kActive; ++c) q[c] = *reinterpret_cast<const float4*>(query + c * Shape::kX * kStride + i);
            UNROLL
            for (int k = 0; k < kKeysPer; ++k) {
                const float4 v = *reinterpret_cast<const float4*>(key + k * Shape::kY * kStride + i);
                UNROLL
                for (int c = 0; c < kActive; ++c) {
                    float sum = fmaf(v.x, q[c].x, logit[k][c]);
                    sum = fmaf(v.y, q[c].y, sum);
                    sum = fmaf(v.z, q[c].z, sum);
                    logit[k][c] = fmaf(v.w, q[c].w, sum);
                }
            }
        }
    }
};

// mass[i, n] = sum over KV heads, rows, heads of [visible] exp(scale <q, k> - lse), divided by counted rows * num_heads.
//
// A block owns 32 candidates of one image, and nobody else writes them. For each KV head and tile of columns it stages
// channel chunks of its keys and of the queries in shared memory (the next chunk is loaded meanwhile), forms the logits
// in registers and the shares in shared memory; then thread k sums the shares of key k, column after column.
// Bytes read: the block's keys once per 8 or 64 columns (again from cache), the queries of the sample (from L2).
// Deterministic: one writer per result and a fixed order of every sum.
template <class Shape>
GLOBAL(kTileThreads, 3)
mass_fp32_kernel(AttentionMassParams p, bool aligned, float lse_unit) {
    using Tile = Tile<Shape>;
    constexpr int kShareStride = Tile::kColumns + 1;
    SHARED(float, keys, [Tile::kKeyFloats]);
    SHARED(float, queries, [Tile::kColumnFloats]);
    SHARED(float, share, [kTileKeys * kShareStride]);
    SHARED(float, lse, [Tile::kColumns]);
    SHARED(int, end, [Tile::kColumns]);
    SHARED(int, position, [kTileKeys]);  // key of each candidate; -1 = none
    SHARED(int, found, [4]);

    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const unsigned tiles = static_cast<unsigned>((p.num_tokens + kTileKeys - 1) / kTileKeys);
    const int64_t image = blockIdx.x / tiles, candidate = static_cast<int64_t>(blockIdx.x % tiles) * kTileKeys + threadIdx.x;
    const int64_t b = p.sample ? p.sample[image] : image;
    const bool mine = threadIdx.x < kTileKeys && candidate < p.num_tokens;
    float* result = p.mass + image * p.num_tokens + candidate;
    if (b < 0 || b >= p.batch) {
        if (mine) *result = 0;
        return;
    }
    const Rows rows = find_rows<kTileThreads>(p, b, found);
    if (threadIdx.x < kTileKeys) {
        const int64_t j = mine ? p.vision_index[image * p.num_tokens + candidate] : -1;
        position[threadIdx.x] = j >= rows.start && j < rows.stop ? static_cast<int>(j) : -1;
    }
    __syncthreads();

    Tile tile(p, rows, b, aligned, lse_unit, keys, queries, end, lse);
    auto key_at = [&](int k) { return position[k]; };
    float total = 0;
    int kv = rows.count ? 0 : static_cast<int>(p.num_kv_heads), column0 = 0, channel = 0;
    if (kv < p.num_kv_heads) tile.fetch(kv, column0, channel, key_at);
    while (kv < p.num_kv_heads) {
        tile.stage(channel);
        __syncthreads();
        const int column0_now = column0, channel_now = channel;
        channel += Tile::kChunk;
        const bool complete = channel >= p.head_dim;
        if (complete) channel = 0, column0 += Tile::kColumns;
        if (column0 >= tile.columns) column0 = 0, kv += 1;
        if (kv < p.num_kv_heads) tile.fetch(kv, column0, channel, key_at);

        if (channel_now == 0) tile.clear();
        tile.multiply(column0_now, channel_now);
        if (complete) {
            UNROLL
            for (int k = 0; k < Tile::kKeysPer; ++k) {
                const int key = tile.key_of(k), at = position[key];
                UNROLL
                for (int c = 0; c < Tile::kColumnsPer; ++c) {
                    const int column = tile.column_of(c);
                    const float x = tile.logit[k][c], l = lse[column];
                    const float e = x == kInf ? x - x : ptx::ex2(x - l);
                    share[key * kShareStride + column] = at >= 0 && at < end[column] ? e : 0.0f;
                }
            }
        }
        __syncthreads();  // shares are complete, and the staged chunk may be replaced
        if (complete && threadIdx.x < kTileKeys) {
            const int count = min(Tile::kColumns, tile.columns - column0_now);
            for (int c = 0; c < count; ++c) total += share[threadIdx.x * kShareStride + c];
        }
    }
    if (mine) *result = mean_of(total, rows, p.num_heads);
}

// Partial log-sum-exp of a split.
//
// For each tile of columns a block walks the keys of its split 32 at a time with the tiles above. A
// thread keeps the running partials of one chain of keys; thread c then merges the chains of column c.
// Bytes read: the split's keys of one head once per 8 or 64 columns (again from cache), the queries of the head.
// Deterministic: one writer per partial, and an order that depends on the position in the split alone.
template <class Shape>
GLOBAL(kTileThreads, 3)
lse_fp32_kernel(AttentionMassParams p, bool aligned, Partial* partial, int64_t split_keys, int splits) {
    using Tile = Tile<Shape>;
    SHARED(float, keys, [Tile::kKeyFloats]);
    SHARED(float, queries, [Tile::kColumnFloats]);
    SHARED(float, high, [kChains * Tile::kColumns]);
    SHARED(float, sum, [kChains * Tile::kColumns]);
    SHARED(float, lse, [Tile::kColumns]);
    SHARED(int, end, [Tile::kColumns]);
    SHARED(int, found, [4]);

    ptx::grid_wait();
    ptx::grid_launch_dependents();
    const Split split = split_of(p, splits);
    const int64_t b = split.b;
    const int kv = split.kv;
    const Rows rows = find_rows<kTileThreads>(p, b, found);
    const int64_t first = rows.start + static_cast<int64_t>(split.number) * split_keys;
    if (first >= rows.stop) return;
    const int count = static_cast<int>(rows.stop - first < split_keys ? rows.stop - first : split_keys);

    Tile tile(p, rows, b, aligned, 1.0f, keys, queries, end, lse);
    partial = partials_of(p, partial, split, splits) + rows.first * tile.group;
    int column0 = 0, key0 = 0, channel = 0;
    auto key_at = [&](int k) { return key0 + k < count ? static_cast<int>(first) + key0 + k : -1; };
    const int chain = tile.y() % kChains;
    Partial running[Tile::kColumnsPer];
    tile.fetch(kv, column0, channel, key_at);
    while (column0 < tile.columns) {
        tile.stage(channel);
        __syncthreads();
        const int column0_now = column0, key0_now = key0, channel_now = channel;
        channel += Tile::kChunk;
        const bool complete = channel >= p.head_dim;
        if (complete) channel = 0, key0 += kTileKeys;
        const bool finished = key0 >= count;
        if (finished) key0 = 0, column0 += Tile::kColumns;
        if (column0 < tile.columns) tile.fetch(kv, column0, channel, key_at);

        if (channel_now == 0) tile.clear();
        tile.multiply(column0_now, channel_now);
        UNROLL
        for (int c = 0; complete && c < Tile::kColumnsPer; ++c) {
            const int last = end[tile.column_of(c)];
            float x[kChainKeys], tile_high = -kInf, tile_sum = 0;
            UNROLL
            for (int k = 0; k < kChainKeys; ++k) {
                const int64_t key = first + key0_now + chain + k * kChains;
                const float logit = tile.chain_logit(chain, k, c);  // a shuffle: no lane may skip it
                x[k] = key < last ? logit : -kInf;
                tile_high = fmaxf(tile_high, x[k]);  // skips NaN, the sum does not
            }
            UNROLL
            for (int k = 0; k < kChainKeys; ++k) tile_sum = __fadd_rn(tile_sum, ptx::ex2(x[k] - finite(tile_high)));
            running[c] = merge(key0_now > 0 ? running[c] : Partial{-kInf, 0.0f}, {tile_high, tile_sum});
            const int at = chain * Tile::kColumns + tile.column_of(c);
            if (finished && tile.y() < kChains) high[at] = running[c].high, sum[at] = running[c].sum;
        }
        __syncthreads();  // partials are complete, and the staged chunk may be replaced
        const int column = column0_now + threadIdx.x;
        if (finished && threadIdx.x < Tile::kColumns && column < tile.columns) {
            Partial all = {high[threadIdx.x], sum[threadIdx.x]};
            for (int other = 1; other < kChains; ++other) {
                const int at = other * Tile::kColumns + threadIdx.x;
                all = merge(all, {high[at], sum[at]});
            }
            partial[column] = all;
        }
    }
}

}  // namespace
}  // namespace crop
