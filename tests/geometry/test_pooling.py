"""Pool plans and strides. Hand-computed tables and brute-force enumeration."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.geometry.strides import build_plan, count_groups
from tests.support.closed_form import count_cells
from tests.support.layouts import (
    QUESTION_REGIONS,
    cells_of,
    with_newlines,
)

pytestmark = pytest.mark.fast

quick = settings(max_examples=150)


def int_tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_plan_by_hand():
    # 4 x 4 grid, region = patch (0, 0), no ring, outside pooled 2 x 2.
    layout = VisionLayout.grid(4, 4)
    level = layout.levels(Region.box(0.0, 0.0, 0.25, 0.25), 0)
    plan = build_plan(layout, level, (1, 1, 2))
    assert cells_of(plan) == [[0], [2, 3, 6, 7], [1, 4, 5], [8, 9, 12, 13], [10, 11, 14, 15]]
    # The L-shaped cell's centroid (2/3, 2/3) is nearest to patch (1, 1) = 5, after 2.
    assert plan.leader.tolist() == [0, 2, 5, 8, 10]
    assert plan.level.tolist() == [0, 2, 2, 2, 2]
    assert plan.counts.tolist() == [1, 4, 3, 4, 4]
    assert plan.inverse.tolist() == [0, 2, 1, 1, 2, 2, 1, 1, 3, 3, 4, 4, 3, 3, 4, 4]
    assert (plan.num_out, plan.num_tokens, plan.is_identity) == (5, 16, False)
    dtypes = {array.dtype for array in (plan.members, plan.offsets, plan.leader, plan.inverse)}
    assert dtypes == {torch.int32} and plan.level.dtype == torch.uint8


def test_cell_may_be_disconnected():
    # A column through the middle of one 4 x 4 block leaves its left and right side in one cell.
    layout = VisionLayout.grid(4, 4)
    plan = build_plan(layout, layout.levels(Region.box(0.25, 0.0, 0.75, 1.0), 0), (1, 1, 4))
    assert [0, 3, 4, 7, 8, 11, 12, 15] in cells_of(plan)
    assert plan.num_out == 9 == count_cells(4, 4, (1, 0, 3, 4), 0, (1, 1, 4))


def test_newlines_and_padding_have_cells_of_their_own():
    layout = with_newlines(2, 2)
    plan = build_plan(layout, layout.levels(Region.whole(), 0), (2, 2, 2))
    assert cells_of(plan) == [[0, 1, 3, 4], [2], [5]]
    padded = VisionLayout.grid(3, 2, box=(0.0, -1.0, 1.0, 2.0))  # only the middle row is image
    plan = build_plan(padded, padded.levels(Region.whole(), 0), (1, 1, 4))
    assert cells_of(plan) == [[0, 1, 4, 5], [2], [3]]


@given(st.data())
@quick
def test_plan_equals_enumeration_and_closed_form(data):
    height, width = (data.draw(st.integers(1, 19), label=name) for name in ("height", "width"))
    x0, x1 = sorted(data.draw(st.tuples(*[st.integers(-2, width + 3)] * 2), label="x"))
    y0, y1 = sorted(data.draw(st.tuples(*[st.integers(-2, height + 3)] * 2), label="y"))
    ring = data.draw(st.integers(0, 5), label="ring")
    strides = tuple(sorted(data.draw(st.tuples(*[st.integers(1, 16)] * 3), label="strides")))
    layout = VisionLayout.grid(height, width)
    row, col = layout.row.tolist(), layout.col.tolist()

    box = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    empty = box[0] >= box[2] or box[1] >= box[3]

    def level_of(r: int, c: int) -> int:
        gap = max(box[0] - c, c - box[2] + 1, box[1] - r, r - box[3] + 1)
        return 2 if empty or gap > ring else int(gap > 0)

    level = torch.tensor([level_of(r, c) for r, c in zip(row, col, strict=True)]).to(torch.uint8)
    if not empty:
        region = Region.box(x0 / width, y0 / height, x1 / width, y1 / height)
        assert layout.levels(region, ring).tolist() == level.tolist()
        assert layout.inside(region).tolist() == (level == 0).tolist()

    cells = defaultdict(list)
    for token, (r, c, lev) in enumerate(zip(row, col, level.tolist(), strict=True)):
        cells[lev, r // strides[lev], c // strides[lev]].append(token)

    def leader_of(members: list[int]) -> int:
        # Compared times the count, in integers: float centroids would break exact ties.
        count, rows, cols = len(members), sum(row[t] for t in members), sum(col[t] for t in members)
        return min(
            members,
            key=lambda t: ((row[t] * count - rows) ** 2 + (col[t] * count - cols) ** 2, t),
        )

    expected = sorted((leader_of(members), members) for members in cells.values())
    plan = build_plan(layout, level, strides)
    assert plan.leader.tolist() == [leader for leader, _ in expected]
    assert cells_of(plan) == [members for _, members in expected]
    assert plan.level.tolist() == level[plan.leader.long()].tolist()
    assert plan.num_out == count_cells(height, width, (x0, y0, x1, y1), ring, strides)
    counts = [count_groups(layout, level, stride)[group] for group, stride in enumerate(strides)]
    assert sum(counts) == plan.num_out
    # Built without checking, so check here: partition, order, leaders.
    PoolPlan(plan.members, plan.offsets, plan.leader, plan.level, plan.num_tokens)
    assert sorted(plan.members.tolist()) == list(range(height * width))


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=40), st.integers(1, 7))
@quick
def test_from_labels_with_dropped_tokens_is_valid(labels, width):
    label = torch.tensor(labels)
    index = torch.arange(len(labels))
    level = (index % 3).to(torch.uint8)
    plan = PoolPlan.from_labels(label, index // width, index % width, level)
    PoolPlan(plan.members, plan.offsets, plan.leader, plan.level, plan.num_tokens)
    assert plan.num_out == len(set(labels) - {-1})
    for token, cell in enumerate(plan.inverse.tolist()):
        assert (cell == -1) == (labels[token] == -1)
        if cell >= 0:
            assert labels[token] == labels[plan.leader[cell]]


@pytest.mark.parametrize(
    ("members", "offsets", "leader", "requirement"),
    [
        ((0, 1, 2), (0, 2), (0,), "offsets must ascend strictly"),
        ((0, 1, 2), (1, 3), (1,), "offsets must ascend strictly"),
        ((0, 1, 2), (0, 3, 3), (0, 1), "offsets must ascend strictly"),
        (
            (0, 1, 4),
            (0, 3),
            (0,),
            r"members must be in \[0, num_tokens=4\), got values from 0 to 4",
        ),
        ((-1, 1, 2), (0, 3), (1,), "members must be in"),
        ((0, 1, 1), (0, 2, 3), (0, 1), "members must hold each token at most once"),
        ((0, 2, 1), (0, 3), (0,), "members must ascend in each cell"),
        ((2, 3, 0, 1), (0, 2, 4), (2, 0), "leader must ascend strictly"),
        ((0, 1, 2), (0, 1, 3), (0, 3), "leader must be a member"),
        ((0, 1, 2), (0, 1, 3), (0, 9), "leader must ascend strictly in"),
        ((0, 1), (0, 1, 2), (0,), "leader and level must have one entry per cell"),
    ],
)
def test_plan_validates_itself(members, offsets, leader, requirement):
    arrays = [int_tensor(*values) for values in (members, offsets, leader)]
    level = torch.zeros(len(leader), dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"PoolPlan: {requirement}"):
        PoolPlan(*arrays, level, 4)


def test_plan_refuses_other_dtypes():
    plan = PoolPlan.identity(3)
    with pytest.raises(TypeError, match=r"members must be a 1-d torch\.int32"):
        dataclasses.replace(plan, members=plan.members.long(), check=True)
    with pytest.raises(TypeError, match=r"level must be a 1-d torch\.uint8"):
        dataclasses.replace(plan, level=plan.leader, check=True)


def test_identity_and_concatenate():
    layout = VisionLayout.grid(2, 2)
    pooled = build_plan(layout, layout.levels(Region.whole(), 0), (2, 2, 2))
    joined = PoolPlan.concatenate([PoolPlan.identity(3), pooled, PoolPlan.identity(1)])
    assert cells_of(joined) == [[0], [1], [2], [3, 4, 5, 6], [7]]
    assert joined.leader.tolist() == [0, 1, 2, 3, 7]
    assert (joined.num_tokens, joined.num_out) == (8, 5)
    PoolPlan(joined.members, joined.offsets, joined.leader, joined.level, joined.num_tokens)
    assert PoolPlan.identity(3).is_identity and not joined.is_identity
    assert PoolPlan.concatenate([]).num_tokens == 0


def test_plan_is_copied_to_a_device_once():
    plan = PoolPlan.identity(4)
    assert plan.to("cpu") is plan
    copy = plan.to("meta")
    assert copy is plan.to(torch.device("meta"))
    assert copy.members.device.type == "meta" and copy.num_tokens == 4


def test_pool_layout_by_hand():
    layout = VisionLayout.grid(2, 4)
    level = layout.levels(Region.box(0.0, 0.0, 0.25, 1.0), 0)
    plan = build_plan(layout, level, (1, 1, 2))
    assert cells_of(plan) == [[0], [1, 5], [2, 3, 6, 7], [4]]
    pooled = layout.pool(plan, torch.tensor([3, 4, 5, 6]))
    expected = torch.tensor([[0.125, 0.25], [0.375, 0.5], [0.75, 0.5], [0.125, 0.75]])
    torch.testing.assert_close(pooled.center, expected)
    assert pooled.row.tolist() == [0, 0, 0, 1] and pooled.col.tolist() == [0, 1, 2, 0]
    assert (len(pooled), pooled.num_original) == (4, 8)
    with pytest.raises(ValueError, match=r"plan.num_tokens must be N=4, got 8"):
        pooled.pool(plan, torch.arange(4))


@pytest.mark.parametrize("strides", [(0, 1, 1), (2, 1, 4), (1, 4, 2), (1, 2, 17)])
def test_strides_must_ascend_in_range(strides):
    layout = VisionLayout.grid(2, 2)
    with pytest.raises(ValueError, match="strides must satisfy"):
        build_plan(layout, layout.levels(Region.whole(), 0), strides)
    with pytest.raises(ValueError, match="strides must satisfy"):
        count_cells(2, 2, (0, 0, 1, 1), 0, strides)


def test_counts_by_hand():
    # 24 x 24, 6 x 6 box at (6, 6), ring 2 -> 10 x 10 from 4 to 14: 36 patches, ring 25 - 9 blocks of
    # 2 x 2, outside 36 blocks of 4 x 4 of which [4, 12) x [4, 12) is swallowed whole: 4.
    assert count_cells(24, 24, (6, 6, 12, 12), 2, (1, 2, 4)) == 36 + 16 + 32
    assert count_cells(24, 24, (3, 3, 3, 9), 2, (1, 2, 4)) == 36
    assert count_cells(24, 24, (-5, -5, 99, 99), 2, (3, 5, 16)) == 64
    assert count_cells(0, 7, (0, 0, 1, 1), 1, (1, 1, 1)) == 0
    with pytest.raises(ValueError, match="must be >= 0, got 4, 4, -1"):
        count_cells(4, 4, (0, 0, 1, 1), -1, (1, 1, 1))


@pytest.mark.skipif(not QUESTION_REGIONS.is_file(), reason=f"needs {QUESTION_REGIONS}")
def test_real_regions_have_the_closed_form_count():
    boxes = [json.loads(line)["box"] for line in QUESTION_REGIONS.read_text().splitlines()[::7]]
    # A few annotated boxes have no area; no region can be made of them.
    boxes = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
    assert len(boxes) > 900
    layout = VisionLayout.grid(24, 24)
    for box in boxes:
        region = Region((box,))
        inside = layout.inside(region).view(24, 24)
        assert 1 <= inside.sum() <= 576
        rows, cols = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        tokens = int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1
        assert inside.sum() == (tokens[2] - tokens[0]) * (tokens[3] - tokens[1])
        plan = build_plan(layout, layout.levels(region, 2), (1, 2, 4))
        assert plan.num_out == count_cells(24, 24, tokens, 2, (1, 2, 4))
