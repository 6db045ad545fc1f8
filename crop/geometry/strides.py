"""Cells by strides: blocks of the token grid, cut at the borders of region and ring."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan

MAX_STRIDE = 16

# Tokens of different groups never share a cell; see VisionLayout.group.
NUM_GROUPS = 5

INSIDE, RING, OUTSIDE, NEWLINES, PADS = range(NUM_GROUPS)


def check_strides(op: str, strides: tuple[int, int, int]) -> None:
    """Raise unless ``strides`` are three ints with 1 <= inside <= context <= outside <= 16."""
    if not all(isinstance(stride, int) and not isinstance(stride, bool) for stride in strides):
        raise TypeError(f"{op}: strides must be integers, got {strides}")
    inside, context, outside = strides
    if not 1 <= inside <= context <= outside <= MAX_STRIDE:
        raise ValueError(f"{op}: strides must satisfy 1 <= inside <= context <= outside <= {MAX_STRIDE}, got {strides}")


def build_plan(layout: VisionLayout, level: Tensor, strides: tuple[int, int, int]) -> PoolPlan:
    """Cells = stride x stride blocks of the token grid, cut at the level borders: a partition.

    Two patches share a cell when they agree in view, level, row // stride and col // stride on the
    global token grid, with the stride of their level. Padding is pooled at the outside stride in
    cells of its own, so that every token stays accounted for. A newline is a cell of its own.

    Args:
        layout: the N tokens of one image.
        level: (N,) uint8 as returned by ``layout.levels``.
        strides: (inside, context, outside), 1 <= inside <= context <= outside <= 16.
    Raises:
        ValueError: strides out of order or range.
    Source: own choice (variable-ratio adaptive pooling).
    """
    check_strides("build_plan", strides)
    group = layout.group(level).numpy()
    span = prod(layout.extent)
    stride = np.array((*strides, 1, strides[2]))[group]
    label = group * np.int64(span) + layout.block(stride).numpy()
    label = np.where(group == NEWLINES, NUM_GROUPS * span + np.arange(len(label)), label)
    return PoolPlan.from_labels(torch.from_numpy(label), layout.row, layout.col, level)


def count_groups(layout: VisionLayout, level: Tensor, stride: int) -> list[int]:
    """Cells inside, in the ring, outside, of newlines and of padding, with every patch pooled at ``stride``.

    Groups never share cells: the count for any strides is the sum of one entry per group. Arguments as ``build_plan``.
    """
    group, block = layout.group(level).numpy(), layout.block(stride).numpy()
    used = np.zeros((NUM_GROUPS, prod(layout.extent)), dtype=bool)
    used[group, block] = True
    counts = [int(np.count_nonzero(row)) for row in used]
    counts[NEWLINES] = int(np.count_nonzero(group == NEWLINES))
    return counts


def fit_strides(layout: VisionLayout, level: Tensor, budget: int) -> tuple[int, int, int] | None:
    """Mildest strides with at most ``budget`` cells.

    Mildest = first in the lexicographic order of (inside, outside, context): the region is spared
    for as long as any strides allow it, then the coarsest stride of the image is as small as
    possible, then that of the ring. None where no strides up to 16 fit.

    Args:
        layout, level: as ``build_plan``. budget: cells, >= 1.
    Source: own choice; counts per level are independent, so each stride is counted only once.
    """
    tables: dict[int, list[int]] = {}

    def count(group: int, stride: int) -> int:
        if stride not in tables:
            tables[stride] = count_groups(layout, level, stride)
        return tables[stride][group]

    # At stride 1 a cell is a token; an empty level has no say, so only one stride is tried for it.
    has_ring, has_outside, has_padding = (count(g, 1) > 0 for g in (RING, OUTSIDE, PADS))
    newlines = count(NEWLINES, 1)
    least = newlines + has_ring + has_outside + has_padding
    for inside in range(1, MAX_STRIDE + 1):
        if count(INSIDE, inside) + least > budget:
            continue
        last = MAX_STRIDE if has_ring or has_outside or has_padding else inside
        for outside in range(inside, last + 1):
            rest = budget - newlines - count(INSIDE, inside)
            rest -= count(OUTSIDE, outside) + count(PADS, outside)
            for context in range(inside, outside + 1):
                if count(RING, context) <= rest:
                    return inside, context, outside
    return None
