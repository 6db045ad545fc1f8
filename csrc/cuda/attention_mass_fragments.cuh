// Products of keys and queries of half types on the tensor cores: what the kernels of attention_mass_mma.cuh share.
//
// Keys lie on the M side of mma.m16n8k16 and columns on the N side, so the sum over columns is a sum within a thread and its
// quad. A product of matrices does not care for the order of the channels as long as both sides agree: lane t of a quad
// takes channels 8t..8t+7 of every 32 and feeds them as two steps of 16. Rows of K and Q therefore go into fragments as they
// lie in memory, 16 bytes a lane. Nothing but the instruction depends on the type of the elements.
#pragma once
#include "attention_mass.cuh"

namespace crop {
namespace {

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
template <int kDim, int kTiles, bool kChecked, class Load, class T>
DEV void multiply(float (&logit)[kTiles][4], const KeyFragment<kDim, kChecked> (&key)[kTiles],
                  RowFragment<kDim, kChecked>& query, const uint16_t* next, int dim, Load load16, T type) {
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
        if (s % 2) query.load_piece(s / 2, next, dim, load16);
    }
    UNROLL
    for (int m = 0; m < kTiles; ++m) {
        UNROLL
        for (int i = 0; i < 4; ++i) logit[m][i] = __fadd_rn(logit[m][i], odd[m][i]);
    }
}

}  // namespace
}  // namespace crop
