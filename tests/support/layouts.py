"""Layouts of every kind, regions and question files for the tests of geometry and methods."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from hypothesis import strategies as st

from crop.geometry.layout import NEWLINE, PATCH, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region

DATA = Path(os.environ.get("CROP_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
QUESTION_REGIONS = DATA / "question_regions" / "regions.jsonl"


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
    """Members of every cell."""
    edges = plan.offsets.tolist()
    return [plan.members[start:stop].tolist() for start, stop in zip(edges, edges[1:], strict=False)]
