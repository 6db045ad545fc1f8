"""Cells by strides: blocks of the token grid, cut at the borders of region and ring."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
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
    Returns:
        PoolPlan over N tokens.
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
    """Cells of each group when every patch and padding token is pooled at ``stride``.

    Groups never share cells, so the count for any strides is the sum of one entry per group.

    Args:
        layout: the N tokens of one image.
        level: (N,) uint8 as returned by ``layout.levels``.
        stride: 1..16.
    Returns:
        5 ints: inside, ring, outside, newlines, padding.
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
    possible, then that of the ring.

    Args:
        layout: the tokens of one image.
        level: (N,) uint8 from ``layout.levels``.
        budget: cells, >= 1.
    Returns:
        (inside, context, outside), or None if no strides up to 16 fit.
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


def _blocks(low: int, high: int, stride: int) -> int:
    """Blocks of ``stride`` tokens that [low, high) touches."""
    return -(-high // stride) - low // stride


def _enclosed(inner: tuple[int, int], outer: tuple[int, int], stride: int) -> int:
    """Blocks of ``outer`` (cut to it) that lie wholly in ``inner``, a part of ``outer``."""
    first = outer[0] // stride if inner[0] == outer[0] else -(-inner[0] // stride)
    last = -(-outer[1] // stride) if inner[1] == outer[1] else inner[1] // stride
    return max(0, last - first)


def count_cells(
    height: int,
    width: int,
    box: tuple[int, int, int, int],
    ring: int,
    strides: tuple[int, int, int],
) -> int:
    """Number of cells of one token grid with one rectangular region, in closed form.

    ``blocks(box, inside) + blocks(ringbox, context) - enclosed(box in ringbox, context) +
    blocks(grid, outside) - enclosed(ringbox in grid, outside)``, each the product over both axes.

    Args:
        height, width: the token grid.
        box: (x0, y0, x1, y1) tokens, half open, clipped to the grid; may be empty.
        ring: Chebyshev dilation of the box by this many tokens, clipped to the grid.
        strides: (inside, context, outside).
    Returns:
        ``plan.num_out`` of the plan for these levels and strides.
    Raises:
        ValueError: negative size or ring, strides not ascending in 1..16.
    Source: own choice; derived for cells cut at the level borders.
    """
    check_strides("count_cells", strides)
    if min(height, width, ring) < 0:
        raise ValueError(f"count_cells: height, width and ring must be >= 0, got {height}, {width}, {ring}")
    inside, context, outside = strides
    sizes = (width, height)
    grid = [(0, size) for size in sizes]
    core = [(max(0, box[axis]), min(sizes[axis], box[axis + 2])) for axis in (0, 1)]
    if any(low >= high for low, high in core):
        return _blocks(*grid[0], outside) * _blocks(*grid[1], outside)
    halo = [(max(0, low - ring), min(size, high + ring)) for (low, high), size in zip(core, sizes, strict=True)]

    def product(function, *axes) -> int:
        return function(*axes[0]) * function(*axes[1])

    total = product(_blocks, *((low, high, inside) for low, high in core))
    for outer, inner, stride in ((halo, core, context), (grid, halo, outside)):
        total += product(_blocks, *((low, high, stride) for low, high in outer))
        total -= product(_enclosed, *((a, b, stride) for a, b in zip(inner, outer, strict=True)))
    return total
