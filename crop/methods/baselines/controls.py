"""Controls that any method must beat: a random choice, a uniform one, plain pooling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crop.geometry.layout import PADDING, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods.base import Method, budget_of, check_keep


def even_cells(layout: VisionLayout, count: int) -> Tensor:
    """Cut the token grid into ``count`` cells of nearly equal size and shape.

    Every view gets its share by size; in it, bands of rows are cut into equally wide pieces.

    Args:
        layout: N tokens. count: in [1, N].
    Returns:
        (N,) int64 cell of each token, each of [0, count) used.
    Source: own choice.
    """
    label = np.empty(len(layout), dtype=np.int64)
    view, row, col = (axis.numpy().astype(np.int64) for axis in (layout.view, layout.row, layout.col))
    seen = done = 0
    for number in np.unique(view):
        here = np.flatnonzero(view == number)
        height, width = (int(axis[here].max()) + 1 for axis in (row, col))
        seen += len(here)
        share = count * seen // len(layout) - done
        if len(here) == height * width and share:
            bands = max(min(round(math.sqrt(share * height / width)), height, share), -(-share // width))
            band = row[here] * bands // height
            edge = np.arange(bands + 1) * share // bands
            label[here] = done + edge[band] + col[here] * np.diff(edge)[band] // width
        elif share:  # not a full rectangle: pieces of the reading order
            label[here] = done + np.arange(len(here)) * share // len(here)
        else:
            label[here] = -1
        done += share
    return torch.from_numpy(label)


@dataclass(frozen=True)
class _Control(Method):
    keep: float | int = 0.11

    def __post_init__(self) -> None:
        check_keep(type(self).__name__, self.keep)

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | None:
        """Cells of one image; None if all tokens stay. Raises ValueError for a count beyond the image's."""
        count = budget_of(type(self).__name__, self.keep, layout)
        if count == len(layout):
            return None
        level = torch.zeros(len(layout), dtype=torch.uint8)
        return PoolPlan.from_labels(self._label(layout, count), layout.row, layout.col, level)

    def _label(self, layout: VisionLayout, count: int) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class RandomTokens(_Control):
    """Keep random tokens, the same ones for equal seeds and sizes; padding only where nothing else is left.

    Args:
        keep: fraction in (0, 1] or count. seed: of the choice.
    Source: control.
    """

    seed: int = 0

    def _label(self, layout: VisionLayout, count: int) -> Tensor:
        noise = torch.rand(len(layout), generator=torch.Generator().manual_seed(self.seed))
        kept = (noise + (layout.kind == PADDING)).argsort()[:count]
        return torch.full((len(layout),), -1).scatter_(0, kept, kept)


@dataclass(frozen=True)
class AveragePooling(_Control):
    """Average cells of nearly equal size and shape over the whole image.

    Args:
        keep: fraction in (0, 1] or count.
    Source: control.
    """

    def _label(self, layout: VisionLayout, count: int) -> Tensor:
        return even_cells(layout, count)


@dataclass(frozen=True)
class UniformGrid(_Control):
    """Keep the middle token of each cell that ``AveragePooling`` would average.

    Args:
        keep: fraction in (0, 1] or count.
    Source: control.
    """

    def _label(self, layout: VisionLayout, count: int) -> Tensor:
        level = torch.zeros(len(layout), dtype=torch.uint8)
        kept = PoolPlan.from_labels(even_cells(layout, count), layout.row, layout.col, level).leader.long()
        return torch.full((len(layout),), -1).scatter_(0, kept, kept)
