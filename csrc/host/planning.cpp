#include "planning.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <utility>

#include "../common/ops.h"

namespace crop {
namespace {

enum Kind : uint8_t { kPatch = 0, kNewline = 1 };
enum Group : uint8_t { kInside = 0, kRing = 1, kOutside = 2, kNewlines = 3, kPads = 4 };
constexpr int kGroups = 5, kMaxStride = 16;

struct Grid {
    int64_t views = 0, height = 0, width = 0;
    explicit Grid(const PlanLayout& l) {
        for (int64_t n = 0; n < l.num_tokens; ++n) {
            views = std::max<int64_t>(views, l.view[n] + 1);
            height = std::max<int64_t>(height, l.row[n] + 1);
            width = std::max<int64_t>(width, l.col[n] + 1);
        }
    }
    int64_t span() const { return views * height * width; }
    int64_t at(int64_t view, int64_t row, int64_t col) const { return (view * height + row) * width + col; }
};

// Patches whose centre a box holds; a box that holds none selects the patch nearest to its own centre.
std::vector<uint8_t> inside_patches(const PlanLayout& l, const std::vector<PlanBox>& boxes) {
    std::vector<uint8_t> inside(l.num_tokens, 0);
    for (const PlanBox& b : boxes) {
        bool empty = true;
        for (int64_t n = 0; n < l.num_tokens; ++n) {
            const float x = l.center[2 * n], y = l.center[2 * n + 1];
            if (l.kind[n] == kPatch && x >= b.x0 && x < b.x1 && y >= b.y0 && y < b.y1) inside[n] = 1, empty = false;
        }
        if (!empty) continue;
        const float middle_x = (b.x0 + b.x1) / 2, middle_y = (b.y0 + b.y1) / 2;
        float least = std::numeric_limits<float>::infinity();
        int64_t nearest = -1;
        for (int64_t n = 0; n < l.num_tokens; ++n) {
            if (l.kind[n] != kPatch) continue;
            const float dx = l.center[2 * n] - middle_x, dy = l.center[2 * n + 1] - middle_y;
            const float apart = dx * dx + dy * dy;
            if (apart < least || nearest < 0) least = apart, nearest = n;
        }
        if (nearest >= 0) inside[nearest] = 1;
    }
    return inside;
}

// A square window is separable: along the rows of the grid, then along its columns.
void dilate(const Grid& g, int64_t ring, std::vector<uint8_t>& mask) {
    std::vector<uint8_t> grown;
    const auto pass = [&](int64_t lines, int64_t inner, int64_t length) {  // entries of a line are `inner` apart
        grown = mask;
        for (int64_t line = 0; line < lines; ++line) {
            uint8_t* __restrict to = grown.data() + line * inner * length;
            const uint8_t* __restrict from = mask.data() + line * inner * length;
            for (int64_t step = inner; step <= std::min(ring, length - 1) * inner; step += inner) {
                const int64_t left = length * inner - step;
                for (int64_t i = 0; i < left; ++i) to[i] |= from[i + step];
                for (int64_t i = 0; i < left; ++i) to[i + step] |= from[i];
            }
        }
        mask.swap(grown);
    };
    pass(g.views * g.height, 1, g.width);
    pass(g.views, g.width, g.height);
}

void levels(const PlanLayout& l, const Grid& g, const std::vector<PlanBox>& boxes, int ring, uint8_t* level) {
    const std::vector<uint8_t> inside = inside_patches(l, boxes);
    std::vector<uint8_t> near(g.span(), 0);
    for (int64_t n = 0; n < l.num_tokens; ++n) near[g.at(l.view[n], l.row[n], l.col[n])] = inside[n];
    dilate(g, ring, near);
    bool newlines = false;
    for (int64_t n = 0; n < l.num_tokens; ++n) {
        newlines |= l.kind[n] == kNewline;
        level[n] = inside[n] ? 0 : 2 - (ring && l.kind[n] == kPatch && near[g.at(l.view[n], l.row[n], l.col[n])]);
    }
    if (!newlines) return;
    std::vector<uint8_t> lowest(g.views * g.height, 2);
    for (int64_t n = 0; n < l.num_tokens; ++n)
        if (l.kind[n] == kPatch) {
            uint8_t& row = lowest[l.view[n] * g.height + l.row[n]];
            row = std::min(row, level[n]);
        }
    for (int64_t n = 0; n < l.num_tokens; ++n)
        if (l.kind[n] == kNewline) level[n] = lowest[l.view[n] * g.height + l.row[n]];
}

// One image while its cells are found.
struct Planner {
    const PlanLayout& l;
    const Grid g;
    std::vector<uint8_t> level, group;
    struct Cell {  // its members ascend: `first`, and `next` of each, -1 = none
        int32_t size = 0, first = -1, leader = -1;
    };
    std::vector<Cell> cells;
    std::vector<int32_t> next;
    int64_t counts[kMaxStride + 1][kGroups];
    bool counted[kMaxStride + 1] = {};
    std::vector<int32_t> stamp;

    Planner(const PlanLayout& layout, const std::vector<PlanBox>& boxes, int ring)
        : l(layout), g(layout), stamp(kGroups * g.span(), 0) {
        level.assign(l.num_tokens, 0), group.assign(l.num_tokens, 0);
        levels(l, g, boxes, ring, level.data());
        for (int64_t n = 0; n < l.num_tokens; ++n) group[n] = l.kind[n] == kPatch ? level[n] : l.kind[n] + 2;
    }

    std::vector<int32_t> quotients(int stride) const {
        std::vector<int32_t> found(std::max(g.height, g.width));
        for (size_t i = 0; i < found.size(); ++i) found[i] = static_cast<int32_t>(i) / stride;
        return found;
    }

    // Cells of a group with every patch pooled at `stride`; of newlines, their number.
    int64_t count(Group wanted, int stride) {
        if (!counted[stride]) {
            counted[stride] = true;
            std::fill(counts[stride], counts[stride] + kGroups, 0);
            const std::vector<int32_t> part = quotients(stride);
            for (int64_t n = 0; n < l.num_tokens; ++n) {
                int32_t& seen = stamp[group[n] * g.span() + g.at(l.view[n], part[l.row[n]], part[l.col[n]])];
                counts[stride][group[n]] += group[n] == kNewlines || seen != stride;
                seen = stride;
            }
        }
        return counts[stride][wanted];
    }

    // fit_strides: the mildest with at most `budget` cells; 16 everywhere where none are.
    void fit(int64_t budget, int strides[3]) {
        const bool ring = count(kRing, 1), outside_any = count(kOutside, 1), pads = count(kPads, 1);
        const int64_t newlines = count(kNewlines, 1), least = newlines + ring + outside_any + pads;
        for (int inside = 1; inside <= kMaxStride; ++inside) {
            if (count(kInside, inside) + least > budget) continue;
            const int last = ring || outside_any || pads ? kMaxStride : inside;
            for (int outside = inside; outside <= last; ++outside) {
                const int64_t rest =
                    budget - newlines - count(kInside, inside) - count(kOutside, outside) - count(kPads, outside);
                for (int context = inside; context <= outside; ++context)
                    if (count(kRing, context) <= rest) {
                        strides[0] = inside, strides[1] = context, strides[2] = outside;
                        return;
                    }
            }
        }
        strides[0] = strides[1] = strides[2] = kMaxStride;
    }

    // build_plan: the label of every token, below (kGroups * span + num_tokens).
    std::vector<int64_t> labels(const int strides[3]) const {
        const int of_group[kGroups] = {strides[0], strides[1], strides[2], 1, strides[2]};
        std::vector<int32_t> part[kGroups];
        for (int i = 0; i < kGroups; ++i) part[i] = quotients(of_group[i]);
        std::vector<int64_t> label(l.num_tokens);
        for (int64_t n = 0; n < l.num_tokens; ++n) {
            const auto& of = part[group[n]];
            label[n] = group[n] == kNewlines ? kGroups * g.span() + n
                                             : group[n] * g.span() + g.at(l.view[n], of[l.row[n]], of[l.col[n]]);
        }
        return label;
    }

    // PoolPlan.from_labels: a cell of all tokens of one label, below `bound`.
    void gather(const std::vector<int64_t>& label, int64_t bound) {
        std::vector<int32_t> number(bound, -1);
        next.assign(l.num_tokens, -1);
        for (int64_t n = l.num_tokens - 1; n >= 0; --n) {
            int32_t& found = number[label[n]];
            if (found < 0) found = static_cast<int32_t>(cells.size()), cells.emplace_back();
            add(cells[found], static_cast<int32_t>(n));
        }
        for (Cell& cell : cells) lead(cell);
    }

    void add(Cell& cell, int32_t n) { next[n] = cell.first, cell.first = n, ++cell.size; }

    // The member nearest to the centroid, the first of equals.
    void lead(Cell& cell) const {
        int64_t row = 0, col = 0, least = std::numeric_limits<int64_t>::max();
        for (int32_t n = cell.first; n >= 0; n = next[n]) row += l.row[n], col += l.col[n];
        for (int32_t n = cell.first; n >= 0; n = next[n]) {
            const int64_t dy = int64_t{l.row[n]} * cell.size - row, dx = int64_t{l.col[n]} * cell.size - col;
            const int64_t spread = dy * dy + dx * dx;
            const bool nearer = spread < least;  // not foreseeable: no branch
            cell.leader = nearer ? n : cell.leader, least = nearer ? spread : least;
        }
    }

    // Cells in the order of their leaders.
    PlanCells plan() const {
        std::vector<int32_t> led(l.num_tokens, -1);
        for (size_t i = 0; i < cells.size(); ++i)
            if (cells[i].size) led[cells[i].leader] = static_cast<int32_t>(i);
        PlanCells out;
        out.offsets.push_back(0);
        for (int64_t n = 0; n < l.num_tokens; ++n) {
            if (led[n] < 0) continue;
            for (int32_t member = cells[led[n]].first; member >= 0; member = next[member]) out.members.push_back(member);
            out.offsets.push_back(static_cast<int32_t>(out.members.size()));
            out.leader.push_back(static_cast<int32_t>(n)), out.level.push_back(level[n]);
        }
        return out;
    }

    // Region.distance of one token.
    static float distance(const PlanLayout& l, const std::vector<PlanBox>& boxes, int64_t n) {
        const float x = l.center[2 * n], y = l.center[2 * n + 1];
        float least = std::numeric_limits<float>::infinity();
        for (const PlanBox& b : boxes) {
            const float dx = std::max(b.x0 - x, x - b.x1), dy = std::max(b.y0 - y, y - b.y1);
            const float outside = std::hypot(std::max(dx, 0.0f), std::max(dy, 0.0f));
            least = std::min(least, outside + std::min(std::max(dx, dy), 0.0f));
        }
        return least;
    }

    // plan_by_budget, from the first plan on.
    void split(const std::vector<PlanBox>& boxes, int64_t budget) {
        using Rank = std::tuple<uint8_t, float, int32_t, size_t>;  // group, distance, leader, cell: the least comes first
        int64_t spare = budget - static_cast<int64_t>(cells.size());
        std::vector<Rank> order;
        for (size_t i = 0; i < cells.size(); ++i)
            if (spare < 0 || cells[i].size > 1)
                order.emplace_back(group[cells[i].leader], distance(l, boxes, cells[i].leader), cells[i].leader, i);
        if (spare < 0) {  // the last ones are dropped
            std::nth_element(order.begin(), order.begin() + budget, order.end());
            for (auto one = order.begin() + budget; one != order.end(); ++one) cells[std::get<3>(*one)].size = 0;
            return;
        }
        std::make_heap(order.begin(), order.end(), std::greater<Rank>());
        for (; spare > 0 && !order.empty(); order.pop_back()) {
            std::pop_heap(order.begin(), order.end(), std::greater<Rank>());
            const size_t i = std::get<3>(order.back());
            // All but one member become single tokens, or as many as are paid for, the nearest first.
            std::vector<std::pair<float, int32_t>> near;
            for (int32_t n = cells[i].first; n >= 0; n = next[n]) near.emplace_back(distance(l, boxes, n), n);
            const auto rest = near.begin() + std::min<int64_t>(spare, near.size() - 1);
            std::nth_element(near.begin(), rest, near.end());
            spare -= rest - near.begin();
            for (auto one = near.begin(); one != rest; ++one) {
                next[one->second] = -1;
                cells.push_back({1, one->second, one->second});
            }
            std::sort(rest, near.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
            cells[i] = {};
            for (auto one = rest; one != near.end(); ++one) add(cells[i], one->second);
            lead(cells[i]);
        }
    }
};

}  // namespace

void plan_levels(const PlanLayout& layout, const std::vector<PlanBox>& boxes, int ring, uint8_t* level) {
    levels(layout, Grid(layout), boxes, ring, level);
}

PlanCells plan_cells(const PlanLayout& layout, const std::vector<PlanBox>& boxes, int ring, const int strides[3],
                     int64_t budget) {
    Planner planner(layout, boxes, ring);
    int chosen[3] = {strides[0], strides[1], strides[2]};
    if (budget > 0) planner.fit(budget, chosen);
    planner.gather(planner.labels(chosen), kGroups * planner.g.span() + layout.num_tokens);
    if (budget > 0 && static_cast<int64_t>(planner.cells.size()) != budget) planner.split(boxes, budget);
    return planner.plan();
}

int plan_pooled(const PlanLayout& l, const PlanGiven& cells, const PlanPooled& out) {
    const auto strange = [&](int64_t n) { return n < 0 || n >= l.num_tokens; };
    for (int64_t c = 0; c < cells.num_out; ++c) {
        double x = 0, y = 0;
        for (int32_t i = cells.offsets[c]; i < cells.offsets[c + 1]; ++i) {
            const int64_t n = cells.members[i];
            if (strange(n)) return fail("plan: members must be tokens of the image");
            x += l.center[2 * n], y += l.center[2 * n + 1];
        }
        const double count = cells.offsets[c + 1] - cells.offsets[c];
        out.center[2 * c] = static_cast<float>(x / count), out.center[2 * c + 1] = static_cast<float>(y / count);
        const int64_t n = cells.leader[c];
        if (strange(n)) return fail("plan: leaders must be tokens of the image");
        out.row[c] = l.row[n], out.col[c] = l.col[n], out.view[c] = l.view[n], out.kind[c] = l.kind[n];
    }
    return 0;
}

int plan_leaders(const bool* valid, int64_t batch, int64_t seq_len, const std::vector<PlanImage>& images, int64_t* leader_of,
                 int64_t* counts) {
    for (int64_t n = 0; n < batch * seq_len; ++n) leader_of[n] = valid[n] ? n : -1;
    const auto outside = [](int64_t index, int64_t count) { return index < 0 || index >= count; };
    for (const auto& [sample, layout, cells] : images) {
        const int64_t base = sample * seq_len, *position = layout.position;
        for (int64_t n = 0; n < layout.num_tokens; ++n) {
            if (outside(sample, batch) || outside(position[n], seq_len)) return fail("plan: positions must lie in the batch");
            leader_of[base + position[n]] = -1;
        }
        for (int64_t c = 0; c < cells.num_out; ++c) {
            if (outside(cells.leader[c], layout.num_tokens)) return fail("plan: leaders must be tokens of the image");
            const int64_t leader = base + position[cells.leader[c]];
            for (int32_t i = cells.offsets[c]; i < cells.offsets[c + 1]; ++i) {
                if (outside(cells.members[i], layout.num_tokens)) return fail("plan: members must be tokens of the image");
                leader_of[base + position[cells.members[i]]] = leader;
            }
        }
    }
    for (int64_t b = 0; b < batch; ++b) {
        counts[b] = 0;
        for (int64_t n = b * seq_len; n < (b + 1) * seq_len; ++n) counts[b] += leader_of[n] == n;
    }
    return 0;
}

int plan_pool(const int64_t* leader_of, int64_t batch, int64_t seq_len, int64_t width, const PlanPool& out,
              std::vector<int32_t>& members) {
    const int64_t tokens = batch * seq_len, cells = batch * width;
    std::fill(out.offsets, out.offsets + cells + 1, 0);
    std::vector<int32_t> cell(tokens, -1);
    for (int64_t b = 0; b < batch; ++b) {
        int64_t left = width;
        for (int64_t n = (b + 1) * seq_len - 1; n >= b * seq_len; --n)
            if (leader_of[n] == n) {
                if (--left < 0) return fail("plan: width must hold the tokens of every sample");
                out.kept_index[b * width + left] = n - b * seq_len, out.real[b * width + left] = true;
                cell[n] = static_cast<int32_t>(b * width + left);
            }
        for (; left > 0; --left) out.kept_index[b * width + left - 1] = -1, out.real[b * width + left - 1] = false;
    }
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t n = b * seq_len; n < (b + 1) * seq_len; ++n) {
            const int64_t found = leader_of[n] < 0 ? -1 : cell[leader_of[n]];
            out.source[n] = found < 0 ? b * width : found;
            out.slot_of[n] = found < 0 ? -1 : found - b * width;
            if (found >= 0) ++out.offsets[found + 1];
        }
    for (int64_t i = 0; i < cells; ++i) {
        out.offsets[i + 1] += out.offsets[i];
        out.leader[i] = static_cast<int32_t>(out.kept_index[i]);
    }
    std::vector<int32_t> next(out.offsets, out.offsets + cells);
    members.resize(out.offsets[cells]);
    for (int64_t n = 0; n < tokens; ++n) {
        const int64_t found = out.source[n];
        out.alone[n] = out.slot_of[n] >= 0 && out.offsets[found + 1] - out.offsets[found] == 1;
        if (out.slot_of[n] >= 0) members[next[found]++] = static_cast<int32_t>(n);
    }
    return 0;
}

}  // namespace crop
