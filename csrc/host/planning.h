// Planning on the host: which tokens are inside a region, and which of them share a cell. The same arithmetic as the numpy code
// in crop/geometry, bit for bit; that code is the specification. No device, no threads.
#pragma once
#include <cstdint>
#include <vector>

namespace crop {

struct PlanLayout {       // VisionLayout, contiguous
    const float* center;  // (num_tokens, 2) x, y
    const int32_t *row, *col, *view;
    const uint8_t* kind;  // 0 patch, 1 newline, 2 padding
    int64_t num_tokens;
};

struct PlanBox {
    float x0, y0, x1, y1;
};

// (num_tokens,) 0 inside the region, 1 in the ring around it, 2 outside: VisionLayout.levels.
void plan_levels(const PlanLayout& layout, const std::vector<PlanBox>& boxes, int ring, uint8_t* level);

struct PlanCells {  // PoolPlan; room for num_tokens cells
    int32_t *members, *offsets, *leader;
    uint8_t* level;
    int64_t num_members, num_out;
};

// Cells by three strides (inside, ring, outside), or, where budget > 0, exactly that many of the mildest: plan_by_strides and
// plan_by_budget of crop/geometry/strides.py.
void plan_cells(const PlanLayout& layout, const std::vector<PlanBox>& boxes, int ring, const int strides[3],
                int64_t budget, PlanCells& out);

struct PlanPooled {  // VisionLayout of pooled tokens, one per cell
    float* center;
    int32_t *row, *col, *view;
    uint8_t* kind;
};

// VisionLayout.pool: mean centre; row, col, view and kind of the leader.
int plan_pooled(const PlanLayout& layout, const PlanCells& cells, PlanPooled& out);

struct PlanImage {  // one pooled image of a batch
    int64_t sample, num_tokens, num_out;
    const int64_t* position;  // (num_tokens,) in the sample
    const int32_t *members, *offsets, *leader;
};

// leader_of (batch, seq_len): flat position of the token that leads each token's cell, -1 = in none. Text leads itself.
int plan_leaders(const uint8_t* valid, int64_t batch, int64_t seq_len, const std::vector<PlanImage>& images,
                 int64_t* leader_of);

// PoolStep of crop/patching/pool_step.py.
struct PlanPool {
    const int64_t* leader_of;  // (batch, seq_len)
    int64_t batch, seq_len, width;
    int64_t* kept_index;       // (batch, width)
    int64_t* slot_of;          // (batch, seq_len)
    int64_t* source;           // (batch * seq_len,)
    uint8_t* alone;            // (batch * seq_len,)
    uint8_t* real;             // (batch, width)
    int32_t* members;          // room for (batch * seq_len,)
    int32_t* offsets;          // (batch * width + 1,)
};

// Returns the number of members, or kBadArgument.
int64_t plan_pool(const PlanPool& p);

}  // namespace crop
