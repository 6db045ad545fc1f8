// Planning on the host: which tokens are inside a region, and which of them share a cell. The same arithmetic as the numpy code
// in crop/geometry, bit for bit; that code is the specification. No device, no threads.
#pragma once
#include <cstdint>
#include <vector>

namespace crop {

struct PlanLayout {  // VisionLayout, contiguous
    int64_t num_tokens;
    const int64_t* position;  // (num_tokens,) in the sample
    const float* center;      // (num_tokens, 2) x, y
    const int32_t *row, *col, *view;
    const uint8_t* kind;  // 0 patch, 1 newline, 2 padding
};

struct PlanBox {
    float x0, y0, x1, y1;
};

// (num_tokens,) 0 inside the region, 1 in the ring around it, 2 outside: VisionLayout.levels.
void plan_levels(const PlanLayout& layout, const std::vector<PlanBox>& boxes, int ring, uint8_t* level);

struct PlanCells {  // PoolPlan
    std::vector<int32_t> members, offsets, leader;
    std::vector<uint8_t> level;
};

// Cells by three strides (inside, ring, outside), or, where budget > 0, exactly that many of the mildest: plan_by_strides and
// plan_by_budget of crop/geometry/strides.py.
PlanCells plan_cells(const PlanLayout& layout, const std::vector<PlanBox>& boxes, int ring, const int strides[3],
                     int64_t budget);

struct PlanGiven {  // PoolPlan of anyone's, contiguous
    int64_t num_out;
    const int32_t *members, *offsets, *leader;
};

struct PlanPooled {  // VisionLayout of pooled tokens, one per cell
    float* center;
    int32_t *row, *col, *view;
    uint8_t* kind;
};

// VisionLayout.pool: mean centre; row, col, view and kind of the leader.
int plan_pooled(const PlanLayout& layout, const PlanGiven& cells, const PlanPooled& out);

struct PlanImage {  // one pooled image of a batch
    int64_t sample;
    PlanLayout layout;
    PlanGiven cells;
};

// leader_of (batch, seq_len): flat position of the token that leads each token's cell, -1 = in none. Text leads itself.
// counts (batch,): how many lead one.
int plan_leaders(const bool* valid, int64_t batch, int64_t seq_len, const std::vector<PlanImage>& images, int64_t* leader_of,
                 int64_t* counts);

// PoolStep of crop/patching/pool_step.py, but for the members.
struct PlanPool {
    int64_t *kept_index, *slot_of, *source;  // (batch, width), (batch, seq_len), (batch * seq_len,)
    bool *alone, *real;                      // (batch * seq_len,), (batch, width)
    int32_t *offsets, *leader;               // (batch * width + 1,), (batch * width,)
};

int plan_pool(const int64_t* leader_of, int64_t batch, int64_t seq_len, int64_t width, const PlanPool& out,
              std::vector<int32_t>& members);

}  // namespace crop
