"""Inner-LLM Pruning: budgets met exactly, the region respected, tiers and order as documented."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crop.geometry.layout import PADDING, VisionLayout
from crop.geometry.region import Region
from crop.methods import InnerLLMPruning, Selection
from tests.support.layouts import (
    layouts,
    padded,
    regions,
    unit,
    with_newlines,
)

pytestmark = pytest.mark.fast

quick = settings(max_examples=80)


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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "hard"}, ValueError, "mode must be one of"),
        ({"layer": 0}, ValueError, "layer must be >= 1, got 0"),
        ({"layer": 2.0}, TypeError, "layer must be an integer"),
        ({"layer": True}, TypeError, "layer must be an integer"),
        ({"rows": "all"}, ValueError, "rows must be one of"),
        ({"ring": -1}, ValueError, "ring must be >= 0"),
        ({"floor": 1}, TypeError, "floor is gone since 0.2"),
        ({"region_weight": 2.0}, TypeError, "region_weight is gone since 0.2"),
        ({"mode": "soft"}, ValueError, "mode must be one of .*got 'soft', which is gone since 0.2; use 'budget'"),
        ({"layer": None}, ValueError, "layer must be an int >= 1 or 'auto', got None"),
    ],
)
def test_ilp_validates_itself(arguments, error, message):
    with pytest.raises(error, match=f"InnerLLMPruning: {message}"):
        InnerLLMPruning(**arguments)


def test_ilp_tiers_by_hand():
    """Region = patch (1, 1); the ring around it."""
    layout = VisionLayout.grid(6, 6)
    region = Region.box(1 / 6, 1 / 6, 2 / 6, 2 / 6)
    selection = InnerLLMPruning(10).select(layout, region)
    assert selection.priority.view(6, 6).tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 2, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert selection.priority.dtype == torch.int8
    assert (selection.num_keep, selection.weight, selection.needs_scores) == (10, None, True)
    plain = InnerLLMPruning(10, ring=0).select(layout, region).priority
    assert plain.sum() == plain.view(6, 6)[1, 1] == 2


def test_ilp_whole_region_is_one_tier():
    # FastV: without a region only the scores decide.
    fastv = InnerLLMPruning(0.5, layer=2, rows="last")
    assert (fastv.layer, fastv.rows) == (2, "last")
    selection = fastv.select(VisionLayout.grid(4, 4), Region.whole())
    assert selection.priority.tolist() == [2] * 16
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
@settings(max_examples=40)
def test_ilp_is_monotone_in_keep(layout, region, data):
    scores = data.draw(st.lists(unit, min_size=len(layout), max_size=len(layout)))
    previous: set[int] = set()
    for keep in range(1, len(layout) + 1, max(1, len(layout) // 10)):
        kept = set(kept_by(InnerLLMPruning(keep).select(layout, region), scores))
        assert len(kept) == keep and kept >= previous
        previous = kept
