"""Token layouts: where in the image each token looks. Hand-computed tables."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from crop.geometry.layout import PADDING, PATCH, VisionLayout
from crop.geometry.region import Region
from crop.geometry.strides import build_plan
from tests.support.layouts import (
    with_newlines,
)

pytestmark = pytest.mark.fast


def test_grid_by_hand():
    layout = VisionLayout.grid(2, 4, start=5)
    assert len(layout) == layout.num_original == 8
    assert layout.position.tolist() == list(range(5, 13))
    assert layout.row.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert layout.col.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert layout.center[[0, 3, 6]].tolist() == [[0.125, 0.25], [0.875, 0.25], [0.625, 0.75]]
    assert not layout.kind.any() and not layout.view.any()


def test_grid_larger_than_the_image_is_padding():
    # A 2:1 landscape image padded to a square: the image is the middle half of the rows.
    layout = VisionLayout.grid(4, 2, box=(0.0, -0.5, 1.0, 1.5))
    assert layout.kind.tolist() == [PADDING] * 2 + [PATCH] * 4 + [PADDING] * 2
    assert layout.center[2].tolist() == [0.25, 0.25]
    assert layout.inside(Region.whole()).tolist() == [False] * 2 + [True] * 4 + [False] * 2


def test_grid_smaller_than_the_image_is_a_crop():
    layout = VisionLayout.grid(1, 2, box=(0.25, 0.0, 0.75, 1.0), position=torch.tensor([3, 9]))
    assert layout.center.tolist() == [[0.375, 0.5], [0.625, 0.5]]
    assert layout.position.tolist() == [3, 9]


def test_layout_validates_itself():
    layout = VisionLayout.grid(2, 2)
    bad = {
        "position": torch.tensor([0, 2, 1, 3]),
        "center": torch.zeros(4, 3),
        "row": torch.tensor([0, 0, 1, -1], dtype=torch.int32),
        "col": torch.zeros(3, dtype=torch.int32),
        "view": torch.zeros(4, dtype=torch.int32, device="meta"),
        "num_original": 3,
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"VisionLayout: {name} must"):
            dataclasses.replace(layout, **{name: value})
    with pytest.raises(TypeError, match=r"kind must be torch\.uint8, got torch\.int64"):
        dataclasses.replace(layout, kind=torch.zeros(4, dtype=torch.int64))
    for size, box in (
        ((0, 2), (0, 0, 1, 1)),
        ((2, 2), (0, 0, 0, 1)),
        ((2, 2), (0, math.nan, 1, 1)),
    ):
        with pytest.raises(ValueError, match=r"VisionLayout.grid: "):
            VisionLayout.grid(*size, box=box)


def test_inside_selects_nearest_patch_where_a_box_holds_no_centre():
    layout = VisionLayout.grid(4, 4)
    assert layout.inside(Region.box(0.0, 0.0, 0.5, 0.25)).nonzero()[:, 0].tolist() == [0, 1]
    speck = (0.76, 0.52, 0.78, 0.53)  # nearest centre: (0.875, 0.625), token 11
    assert layout.inside(Region((speck,))).nonzero()[:, 0].tolist() == [11]
    both = Region(((0.0, 0.0, 0.25, 0.25), speck))
    assert layout.inside(both).nonzero()[:, 0].tolist() == [0, 11]


def test_padding_is_never_inside_nor_nearest():
    layout = VisionLayout.grid(4, 4, box=(0.0, -0.5, 1.0, 1.5))  # rows 1 and 2 are the image
    speck = Region.box(0.0, 0.0, 0.01, 0.01)
    assert layout.inside(speck).nonzero()[:, 0].tolist() == [4]
    assert layout.levels(speck, 4)[layout.kind == PADDING].tolist() == [2] * 8
    alone = dataclasses.replace(layout, kind=torch.full_like(layout.kind, PADDING))
    assert not alone.inside(Region.whole()).any()


def test_levels_by_hand_with_newlines():
    # Patches (1, 1) and (1, 2) are inside; the last column holds newlines, which follow their row.
    level = with_newlines(5, 4).levels(Region.box(0.25, 0.2, 0.75, 0.4), 1)
    assert level.view(5, 5).tolist() == [
        [1, 1, 1, 1, 1],
        [1, 0, 0, 1, 0],
        [1, 1, 1, 1, 1],
        [2, 2, 2, 2, 2],
        [2, 2, 2, 2, 2],
    ]
    assert level.dtype == torch.uint8
    with pytest.raises(ValueError, match="ring must be >= 0, got -1"):
        with_newlines(2, 2).levels(Region.whole(), -1)


def test_ring_stays_in_its_view():
    grid = VisionLayout.grid(2, 8)
    tiles = dataclasses.replace(grid, view=grid.col // 4, col=grid.col % 4)
    region = Region.box(0.375, 0.0, 0.5, 1.0)  # the last column of the left tile
    assert tiles.levels(region, 2).view(2, 8).tolist() == [[2, 1, 1, 0, 2, 2, 2, 2]] * 2


def test_inside_is_monotone_under_dilation_and_union():
    layout, region = VisionLayout.grid(9, 7), Region.box(0.3, 0.3, 0.6, 0.5)
    inside = layout.inside(region)
    assert (layout.inside(region.dilate(0.1)) >= inside).all()
    assert (layout.inside(region.union(Region.box(0, 0, 0.2, 0.2))) >= inside).all()


def test_empty_layout():
    parts = [torch.empty(0, dtype=torch.int32) for _ in range(3)]
    kind = torch.empty(0, dtype=torch.uint8)
    layout = VisionLayout(parts[0].long(), torch.empty(0, 2), *parts, kind, num_original=0)
    level = layout.levels(Region.whole(), 1)
    plan = build_plan(layout, level, (1, 2, 4))
    assert len(level) == plan.num_out == len(plan.inverse) == 0
    assert len(layout.pool(plan, layout.position)) == 0
