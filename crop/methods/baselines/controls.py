"""Controls that any method must beat: a random choice, a uniform one, plain pooling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crop.geometry.layout import PADDING, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.methods.baselines.budget import Budgeted


def even_cells(layout: VisionLayout, count: int) -> Tensor:
    """Cut the token grid into ``count`` cells of nearly equal size and shape.

    Every view gets its share by size; in it, bands of rows are cut into equally wide pieces.

    Returns:
        (N,) int64 cell of each token, each of [0, count) used; count must be in [1, N].
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


def pooled(layout: VisionLayout, label: Tensor) -> PoolPlan:
    """Tokens of one label share a cell, those of a negative one leave."""
    return PoolPlan.from_labels(label, layout.row, layout.col, torch.zeros(len(layout), dtype=torch.uint8))


def kept_alone(layout: VisionLayout, kept: Tensor) -> PoolPlan:
    """Tokens ``kept`` (n,) stay as they are, the others leave."""
    return pooled(layout, torch.full((len(layout),), -1).scatter_(0, kept, kept))


@dataclass(frozen=True)
class RandomTokens(Budgeted):
    """Keep random tokens, the same for equal seeds and sizes; padding where nothing else is left. Source: control."""

    seed: int = 0  # of the choice

    def pool(self, layout: VisionLayout, count: int) -> PoolPlan:
        noise = torch.rand(len(layout), generator=torch.Generator().manual_seed(self.seed))
        return kept_alone(layout, (noise + (layout.kind == PADDING)).argsort()[:count])


@dataclass(frozen=True)
class AveragePooling(Budgeted):
    """Average cells of nearly equal size and shape over the whole image. Source: control."""

    def pool(self, layout: VisionLayout, count: int) -> PoolPlan:
        return pooled(layout, even_cells(layout, count))


@dataclass(frozen=True)
class UniformGrid(Budgeted):
    """Keep the middle token of each cell that ``AveragePooling`` would average. Source: control."""

    def pool(self, layout: VisionLayout, count: int) -> PoolPlan:
        return kept_alone(layout, pooled(layout, even_cells(layout, count)).leader.long())
