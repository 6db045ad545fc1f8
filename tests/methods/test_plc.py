"""Pre-LLM Compression: budgets met exactly, the region the finest, cells as documented."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crop.geometry.layout import NEWLINE, PATCH, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.geometry.strides import build_plan, fit_strides
from crop.methods import PreLLMCompression
from tests.support.closed_form import count_cells
from tests.support.layouts import (
    boxes,
    cells_of,
    layouts,
    regions,
    sides,
    with_newlines,
)

pytestmark = pytest.mark.fast

quick = settings(max_examples=80)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inside": 0}, ValueError, "strides must satisfy"),
        ({"inside": 3}, ValueError, "strides must satisfy"),
        ({"outside": 17}, ValueError, "strides must satisfy"),
        ({"context": 2.0}, TypeError, "strides must be integers"),
        ({"ring": -1}, ValueError, "ring must be >= 0, got -1"),
        ({"ring": 1.5}, TypeError, "ring must be an integer, got 1.5"),
        ({"mode": "sum"}, ValueError, "mode must be one of .* got 'sum'"),
        ({"keep": 0.5, "outside": 8}, ValueError, "strides must be left at their defaults"),
    ],
)
def test_plc_validates_itself(arguments, error, message):
    with pytest.raises(error, match=f"PreLLMCompression: {message}"):
        PreLLMCompression(**arguments)


def test_plc_with_strides():
    layout = VisionLayout.grid(24, 24)
    region = Region.from_blocks(2, 2, 3, 3)  # tokens 6..11 on both axes
    plan = PreLLMCompression(1, 2, 4, ring=2).plan(layout, region)
    assert plan.num_out == count_cells(24, 24, (6, 6, 12, 12), 2, (1, 2, 4)) == 84
    assert PreLLMCompression().plan(layout, Region.whole()) is None
    assert PreLLMCompression(1, 1, 1).plan(layout, region) is None
    assert PreLLMCompression(2, 2, 2).plan(layout, Region.whole()).num_out == 144
    assert PreLLMCompression().pool_mode == "distinct"
    assert PreLLMCompression(mode="max").pool_mode == "max"
    assert PreLLMCompression().layer is None
    assert PreLLMCompression().select(layout, region) is None


def test_plc_splits_the_nearest_cells_first():
    # One row of 8, stride 2: the leaders 0, 2, 4, 6 lie 1/16, 5/16, 7/16, 3/16 deep.
    plan = PreLLMCompression(keep=5).plan(VisionLayout.grid(1, 8), Region.whole())
    assert cells_of(plan) == [[0, 1], [2, 3], [4], [5], [6, 7]]
    # Strides 2 and 3 both make 4 cells of a 4 x 4 grid; one cell of 16 gives up its middle.
    plan = PreLLMCompression(keep=3).plan(VisionLayout.grid(4, 4), Region.whole())
    assert cells_of(plan) == [[5], [6], [n for n in range(16) if n not in (5, 6)]]
    assert plan.leader.tolist() == [5, 6, 9]


def test_plc_sheds_single_members_of_the_last_cell_it_can_pay_for():
    # One row of 12, region = token 0, ring = 1..2. A stride of 2 outside would make 8 cells.
    layout, region = VisionLayout.grid(1, 12), Region.box(0.0, 0.0, 1 / 12, 1.0)
    level = layout.levels(region, 2)
    assert fit_strides(layout, level, 5) == (1, 3, 3)
    assert fit_strides(layout, level, 7) == (1, 1, 3)
    plan = PreLLMCompression(keep=5).plan(layout, region)
    assert cells_of(plan) == [[0], [1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    plan = PreLLMCompression(keep=7).plan(layout, region)
    assert cells_of(plan) == [[0], [1], [2], [3], [4, 5], [6, 7, 8], [9, 10, 11]]
    assert plan.level.tolist() == [0, 1, 1, 2, 2, 2, 2]


def test_plc_drops_the_farthest_cells_where_no_stride_fits():
    layout, region = VisionLayout.grid(4, 4), Region.box(0.0, 0.0, 0.25, 0.25)
    level = layout.levels(region, 2)
    assert fit_strides(layout, level, 2) is None
    assert cells_of(PreLLMCompression(keep=1).plan(layout, region)) == [[0]]
    ring = [1, 2, 4, 5, 6, 8, 9, 10]
    assert cells_of(PreLLMCompression(keep=2).plan(layout, region)) == [[0], ring]
    # Newlines go before any patch does: token 3 is the newline nearest to the region.
    lines = with_newlines(3, 3)
    ring = [1, 2, 4, 5, 6, 8, 9, 10]
    assert cells_of(PreLLMCompression(keep=2).plan(lines, region)) == [[0], ring]
    assert cells_of(PreLLMCompression(keep=3).plan(lines, region)) == [[0], [3], ring]


@given(layouts, regions, st.data())
@quick
def test_plc_meets_every_budget_exactly(layout, region, data):
    budget = data.draw(st.integers(1, len(layout)))
    plan = PreLLMCompression(keep=budget).plan(layout, region)
    if plan is None:
        assert budget == len(layout)
        return
    assert plan.num_out == budget
    PoolPlan(plan.members, plan.offsets, plan.leader, plan.level, plan.num_tokens)
    level, kind = layout.levels(region, 2), layout.kind
    for cell in cells_of(plan):
        assert len(set(kind[cell].tolist())) == len(set(layout.view[cell].tolist())) == 1
        assert len(set(level[cell].tolist())) == 1
        assert len(cell) == 1 or kind[cell[0]] != NEWLINE
    strides = fit_strides(layout, level, budget)
    if strides is None:
        assert (plan.inverse < 0).any()
    else:
        assert (plan.inverse >= 0).all(), "a budget within reach must not drop tokens"
        # Cells of the picked strides are split in the order ring, outside, padding.
        base = build_plan(layout, level, strides)
        group, cell = layout.group(level), plan.inverse.long()
        pooled = plan.counts[cell] > 1
        split = plan.counts[cell] < base.counts[base.inverse.long()]
        for near, far in ((0, 1), (1, 2), (2, 4)):
            assert not (pooled[group <= near].any() and split[group == far].any())
        if strides[0] == 1:
            inside = ((level == 0) & (kind == PATCH)).nonzero()[:, 0]
            assert plan.counts[plan.inverse[inside].long()].tolist() == [1] * len(inside)


@given(sides, sides, boxes(), st.integers(0, 3), st.integers(1, 150))
@quick
def test_fit_strides_is_the_first_that_fits(height, width, box, ring, budget):
    layout, region = VisionLayout.grid(height, width), Region((box,))
    inside = layout.inside(region).view(height, width)
    rows, cols = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    tokens = int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1
    span = range(1, 17)
    triples = ((i, c, o) for i, o, c in itertools.product(span, span, span) if i <= c <= o)
    first = next((t for t in triples if count_cells(height, width, tokens, ring, t) <= budget), None)
    level = layout.levels(region, ring)
    found = fit_strides(layout, level, budget)
    if found is not None and not (level == 1).any():
        found = (found[0], first[1], found[2])  # no ring, no say
    if found is not None and not (level == 2).any() and not (level == 1).any():
        found = (found[0], first[1], first[2])
    assert found == first


@given(layouts, regions)
@settings(max_examples=30)
def test_larger_budgets_are_never_coarser(layout, region):
    level = layout.levels(region, 2)
    previous = (math.inf,) * 3
    for budget in range(1, len(layout) + 1, max(1, len(layout) // 12)):
        inside, context, outside = fit_strides(layout, level, budget) or (math.inf,) * 3
        assert (inside, outside, context) <= previous
        previous = inside, outside, context
    assert fit_strides(layout, level, len(layout)) == (1, 1, 1)
