"""Policies: budgets met exactly, the region respected, tiers and order as documented."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crop.geometry.layout import NEWLINE, PADDING, PATCH, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.geometry.strides import build_plan, fit_strides
from crop.methods import Compose, InnerLLMPruning, Method, PreLLMCompression, Selection, by_name
from crop.methods.registry import POOL_SHARE
from tests.support.closed_form import count_cells

DATA = Path(os.environ.get("CROP_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
REGIONS = DATA / "question_regions" / "regions.jsonl"

quick = settings(max_examples=80, deadline=None)


def with_newlines(height: int, width: int) -> VisionLayout:
    """A grid with one newline token at the end of each row, as LLaVA-NeXT has."""
    wide = VisionLayout.grid(height, width + 1, box=(0.0, 0.0, (width + 1) / width, 1.0))
    kind = torch.where(wide.col == width, NEWLINE, PATCH).to(torch.uint8)
    return dataclasses.replace(wide, kind=kind)


def in_two_views(height: int, width: int) -> VisionLayout:
    """The image twice on one grid each: base view, then tiles of the same size."""
    grid = VisionLayout.grid(height, width)
    twice = {name: getattr(grid, name).repeat(2) for name in ("row", "col", "kind")}
    return VisionLayout(
        position=torch.arange(2 * height * width),
        center=grid.center.repeat(2, 1),
        view=torch.arange(2, dtype=torch.int32).repeat_interleave(height * width),
        num_original=2 * height * width,
        **twice,
    )


def padded(height: int, width: int) -> VisionLayout:
    """The image fills the upper two thirds, the processor padded the rest."""
    return VisionLayout.grid(height, width, box=(0.0, 0.0, 1.0, 1.5))


unit = st.floats(0.0, 1.0, width=32)


@st.composite
def boxes(draw) -> tuple[float, float, float, float]:
    x0, y0 = (draw(st.integers(0, 18)) / 20 for _ in range(2))
    width, height = (draw(st.integers(1, 20)) / 20 for _ in range(2))
    return x0, y0, x0 + width, y0 + height


regions = st.lists(boxes(), min_size=1, max_size=2).map(lambda drawn: Region(tuple(drawn)))
sides = st.integers(1, 12)
makers = st.sampled_from([VisionLayout.grid, with_newlines, in_two_views, padded])
layouts = st.builds(lambda maker, height, width: maker(height, width), makers, sides, sides)


def cells_of(plan: PoolPlan) -> list[list[int]]:
    return [piece.tolist() for piece in np.split(plan.members.numpy(), plan.offsets[1:-1].numpy())]


def kept_by(selection: Selection | None, scores: list[float]) -> list[int]:
    """Plain restatement of ops.select: priority, then weighted score, then index."""
    if selection is None:
        return list(range(len(scores)))
    weight = [1.0] * len(scores) if selection.weight is None else selection.weight.tolist()
    priority = selection.priority.tolist()
    order = sorted(
        (n for n in range(len(scores)) if priority[n] >= 0),
        key=lambda n: (-priority[n], -scores[n] * weight[n], n),
    )
    return sorted(order[: selection.num_keep])


# --- keep -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda keep: PreLLMCompression(keep=keep), InnerLLMPruning])
@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (True, TypeError, r"keep must be a float in \(0, 1\] or an int >= 1, got True"),
        ("0.5", TypeError, "keep must be a float"),
        (0, ValueError, "keep as a token count must be >= 1, got 0"),
        (-3, ValueError, "keep as a token count must be >= 1, got -3"),
        (0.0, ValueError, r"keep as a fraction must be in \(0, 1\], got 0.0"),
        (-0.5, ValueError, "keep as a fraction"),
        (64.0, ValueError, "keep as a fraction"),
        (1.5, ValueError, "keep as a fraction"),
        (math.nan, ValueError, "keep as a fraction"),
        (math.inf, ValueError, "keep as a fraction"),
    ],
)
def test_bad_keep_raises(make, keep, error, message):
    with pytest.raises(error, match=message):
        make(keep)


@pytest.mark.parametrize(
    ("keep", "budget"),
    [(1, 1), (7, 7), (0.5, 18), (0.11, 4), (1e-9, 1), (35, 35), (0.98, 35)],
)
def test_keep_is_a_count_or_a_fraction(keep, budget):
    layout, region = VisionLayout.grid(6, 6), Region.box(0.2, 0.2, 0.6, 0.7)
    assert PreLLMCompression(keep=keep).plan(layout, region).num_out == budget
    assert InnerLLMPruning(keep).select(layout, region).num_keep == budget


@pytest.mark.parametrize("keep", [1.0, 36, 0.99])
def test_keep_all_is_none(keep):
    layout, region = VisionLayout.grid(6, 6), Region.box(0.2, 0.2, 0.6, 0.7)
    assert PreLLMCompression(keep=keep).plan(layout, region) is None
    assert InnerLLMPruning(keep).select(layout, region) is None


def test_one_token_and_all_tokens_are_not_confused():
    # 1 == 1.0 in Python, also as a key of a cache.
    layout, region = VisionLayout.grid(3, 3), Region.whole()
    assert PreLLMCompression(keep=1).plan(layout, region).num_out == 1
    assert PreLLMCompression(keep=1.0).plan(layout, region) is None
    assert PreLLMCompression(keep=1).plan(layout, region).num_out == 1
    assert InnerLLMPruning(1).select(layout, region).num_keep == 1
    assert InnerLLMPruning(1.0).select(layout, region) is None


def test_more_tokens_than_the_image_had_raise():
    layout = VisionLayout.grid(4, 4)
    message = "keep as a token count must be <= num_original=16, got 17"
    with pytest.raises(ValueError, match=f"PreLLMCompression: {message}"):
        PreLLMCompression(keep=17).plan(layout, Region.whole())
    with pytest.raises(ValueError, match=f"InnerLLMPruning: {message}"):
        InnerLLMPruning(17).select(layout, Region.whole())


# --- PLC ------------------------------------------------------------------------------------------


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
@settings(max_examples=30, deadline=None)
def test_larger_budgets_are_never_coarser(layout, region):
    level = layout.levels(region, 2)
    previous = (math.inf,) * 3
    for budget in range(1, len(layout) + 1, max(1, len(layout) // 12)):
        inside, context, outside = fit_strides(layout, level, budget) or (math.inf,) * 3
        assert (inside, outside, context) <= previous
        previous = inside, outside, context
    assert fit_strides(layout, level, len(layout)) == (1, 1, 1)


def test_plans_are_cached_by_value():
    def plan() -> PoolPlan:
        return PreLLMCompression(keep=0.3).plan(VisionLayout.grid(6, 6), Region.box(0, 0, 0.5, 0.5))

    assert plan() is plan()
    other = PreLLMCompression(keep=0.3).plan(VisionLayout.grid(6, 6), Region.box(0, 0, 0.5, 0.4))
    assert other is not plan()


# --- ILP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "hard"}, ValueError, "mode must be one of"),
        ({"layer": 0}, ValueError, "layer must be >= 1, got 0"),
        ({"layer": 2.0}, TypeError, "layer must be an integer"),
        ({"layer": True}, TypeError, "layer must be an integer"),
        ({"rows": "all"}, ValueError, "rows must be one of"),
        ({"ring": -1}, ValueError, "ring must be >= 0"),
        ({"floor": -1}, ValueError, "floor must be >= 0"),
        ({"region_weight": 0.0}, ValueError, "region_weight must be finite and > 0"),
        ({"region_weight": math.nan}, ValueError, "region_weight must be finite and > 0"),
    ],
)
def test_ilp_validates_itself(arguments, error, message):
    with pytest.raises(error, match=f"InnerLLMPruning: {message}"):
        InnerLLMPruning(**arguments)


def test_ilp_tiers_by_hand():
    # Region = patch (1, 1); ring around it; floor cells of 3 x 3 outside: their middles, where the
    # cell at the top left has none left but the ring.
    layout = VisionLayout.grid(6, 6)
    region = Region.box(1 / 6, 1 / 6, 2 / 6, 2 / 6)
    selection = InnerLLMPruning(10, floor=3).select(layout, region)
    assert selection.priority.view(6, 6).tolist() == [
        [2, 2, 2, 0, 0, 0],
        [2, 3, 2, 0, 1, 0],
        [2, 2, 2, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert selection.priority.dtype == torch.int8
    assert (selection.num_keep, selection.weight, selection.needs_scores) == (10, None, True)
    plain = InnerLLMPruning(10, ring=0, floor=0).select(layout, region).priority
    assert plain.sum() == plain.view(6, 6)[1, 1] == 3


def test_ilp_whole_region_is_one_tier():
    # FastV: without a region only the scores decide.
    fastv = InnerLLMPruning(0.5, layer=2, rows="last")
    assert (fastv.layer, fastv.rows) == (2, "last")
    selection = fastv.select(VisionLayout.grid(4, 4), Region.whole())
    assert selection.priority.tolist() == [3] * 16
    scores = [float(n % 8) for n in range(16)]
    assert kept_by(selection, scores) == [4, 5, 6, 7, 12, 13, 14, 15]


def test_ilp_padding_comes_last():
    layout = padded(6, 6)  # 4 rows of image, 2 of padding
    region = Region.box(0.0, 0.0, 0.2, 0.2)
    little = InnerLLMPruning(24).select(layout, region).priority
    much = InnerLLMPruning(25).select(layout, region).priority
    assert little[24:].tolist() == [-1] * 12 and little[:24].min() == 0
    assert torch.equal(much, little + 1)
    assert kept_by(InnerLLMPruning(25).select(layout, region), [float(n) for n in range(36)]) == [
        *range(24),
        35,
    ]


def test_ilp_strict_keeps_exactly_the_region():
    layout, method = with_newlines(4, 4), InnerLLMPruning(mode="strict")
    region = Region.box(0.25, 0.25, 0.75, 0.5)
    selection = method.select(layout, region)
    assert not selection.needs_scores
    assert kept_by(selection, [0.0] * 20) == [6, 7, 9] == layout.inside(region).nonzero()[:, 0].tolist()
    assert selection.num_keep == 3
    assert method.select(layout, Region.whole()) is None
    assert method.select(padded(3, 3), Region.whole()).num_keep == 6


def test_ilp_region_weight():
    layout, region = VisionLayout.grid(2, 2), Region.box(0.0, 0.0, 0.5, 0.5)
    soft = InnerLLMPruning(2, mode="soft", region_weight=1.5).select(layout, region)
    assert soft.weight.tolist() == [1.5, 1.0, 1.0, 1.0] and soft.weight.dtype == torch.float32
    assert soft.num_keep == 2 and soft.priority.tolist() == [0, 0, 0, 0] and soft.needs_scores
    assert InnerLLMPruning(2, region_weight=1.5).select(layout, region).weight is None


@given(layouts, regions, st.data())
@quick
def test_ilp_keeps_exactly_the_budget_and_the_region_first(layout, region, data):
    keep = data.draw(st.floats(0.01, 1.0))
    scores = data.draw(st.lists(unit, min_size=len(layout), max_size=len(layout)))
    selection = InnerLLMPruning(keep).select(layout, region)
    kept = kept_by(selection, scores)
    assert len(kept) == min(max(round(keep * len(layout)), 1), len(layout))
    assert (selection is None) == (len(kept) == len(layout))
    level, kind = layout.levels(region, 1), layout.kind
    tier = [3 if k == PADDING else int(lev) for lev, k in zip(level, kind, strict=True)]
    lost = set(range(len(layout))) - set(kept)
    for near, far in ((0, 1), (1, 2), (2, 3)):  # a tier is opened only once the one before is full
        assert not (any(tier[n] <= near for n in lost) and any(tier[n] >= far for n in kept)), (
            f"tier {far} was kept before tier {near} was full"
        )


@given(layouts, regions, st.data())
@settings(max_examples=40, deadline=None)
def test_ilp_is_monotone_in_keep(layout, region, data):
    scores = data.draw(st.lists(unit, min_size=len(layout), max_size=len(layout)))
    previous: set[int] = set()
    for keep in range(1, len(layout) + 1, max(1, len(layout) // 10)):
        kept = set(kept_by(InnerLLMPruning(keep).select(layout, region), scores))
        assert len(kept) == keep and kept >= previous
        previous = kept


@given(layouts, regions, st.integers(1, 6))
@quick
def test_ilp_floor_has_one_token_per_cell_outside(layout, region, floor):
    selection = InnerLLMPruning(1, ring=1, floor=floor).select(layout, region)
    if selection is None:
        assert len(layout) == 1
        return
    outside = (layout.levels(region, 1) == 2) & (layout.kind == PATCH)
    cells = defaultdict(list)
    for n in outside.nonzero()[:, 0].tolist():
        cells[int(layout.view[n]), int(layout.row[n]) // floor, int(layout.col[n]) // floor].append(n)
    marked = (selection.priority == 1).nonzero()[:, 0].tolist()
    assert len(marked) == len(cells)
    assert all(len(set(members) & set(marked)) == 1 for members in cells.values())


# --- both -----------------------------------------------------------------------------------------


def test_method_keeps_everything():
    layout = VisionLayout.grid(2, 2)
    assert Method().plan(layout, Region.whole()) is None
    assert Method().select(layout, Region.whole()) is None
    assert Method.layer is None


def test_compose_takes_each_stage_from_its_method():
    plc, ilp = PreLLMCompression(mode="max"), InnerLLMPruning(0.1, layer=3, rows="last")
    both = Compose(plc, ilp)
    assert (both.layer, both.rows, both.pool_mode) == (3, "last", "max")
    layout, region = VisionLayout.grid(8, 8), Region.box(0.1, 0.1, 0.4, 0.3)
    assert both.plan(layout, region) is plc.plan(layout, region)
    assert torch.equal(both.select(layout, region).priority, ilp.select(layout, region).priority)
    with pytest.raises(TypeError, match="Compose: ilp must be a Method, got 3"):
        Compose(plc, 3)


@given(layouts, regions, st.floats(0.05, 1.0))
@quick
def test_both_stages_end_with_keep_of_the_original_tokens(layout, region, keep):
    method = by_name("crop", keep)
    assert method.layer == 2
    plan = method.plan(layout, region)
    if plan is not None:
        assert plan.num_out == max(1, round(keep**POOL_SHARE * len(layout)))
        layout = layout.pool(plan, layout.position[plan.leader.long()])
    selection = method.select(layout, region)
    left = len(layout) if selection is None else selection.num_keep
    assert left == max(1, round(keep * layout.num_original))
    assert len(kept_by(selection, [0.0] * len(layout))) == left


def test_by_name():
    assert by_name("none", 0.5) is None
    assert by_name("plc", 0.5) == PreLLMCompression(keep=0.5)
    assert by_name("ilp", 0.5) == InnerLLMPruning(0.5)
    assert by_name("crop", 0.0625) == Compose(PreLLMCompression(keep=0.125), InnerLLMPruning(0.0625))
    layout, region = VisionLayout.grid(6, 6), Region.box(0.0, 0.0, 0.5, 0.5)
    for name in ("crop", "plc", "ilp"):
        assert by_name(name, 1.0).plan(layout, region) is None
        assert by_name(name, 1.0).select(layout, region) is None
    with pytest.raises(ValueError, match=r"name must be one of .* got 'fastv'"):
        by_name("fastv", 0.5)
    with pytest.raises(ValueError, match="keep as a fraction"):
        by_name("none", 1.5)
    with pytest.raises(TypeError, match="by_name: keep must be a float"):
        by_name("plc", 64)


@pytest.mark.skipif(not REGIONS.is_file(), reason=f"needs {REGIONS}")
@pytest.mark.parametrize("keep", [64, 128, 192])
def test_real_regions_meet_the_budget(keep):
    layout = VisionLayout.grid(24, 24)
    plc, ilp = PreLLMCompression(keep=keep), InnerLLMPruning(keep)
    larger = 0
    real = [json.loads(line)["box"] for line in REGIONS.read_text().splitlines()[::97]]
    real = [box for box in real if box[0] < box[2] and box[1] < box[3]]
    for box in real:
        region = Region((box,))
        inside = layout.inside(region)
        plan = plc.plan(layout, region)
        assert plan.num_out == keep and (plan.inverse >= 0).all()
        kept = kept_by(ilp.select(layout, region), layout.center[:, 1].tolist())
        assert len(kept) == keep
        within = int(inside[kept].sum())
        assert within == min(keep, int(inside.sum()))
        larger += int(inside.sum()) > keep
        if inside.sum() <= keep - 12:  # the rest fits into twelve cells at stride 16
            assert (plan.counts[plan.inverse[inside].long()] == 1).all()
    assert 0 < larger < len(real) / 2
