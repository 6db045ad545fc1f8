"""Cells by strides: blocks of the token grid, cut at the borders of region and ring; by strides or by a number of cells."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from crop import backend
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region

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


def plan_by_strides(layout: VisionLayout, region: Region, ring: int, strides: tuple[int, int, int]) -> PoolPlan:
    """``build_plan`` for a region and a ring of some tokens around it, at strides (inside, context, outside)."""
    if backend.planner() is not None:
        check_strides("plan_by_strides", strides)
        return _compiled(layout, region, ring, strides, 0)
    return build_plan(layout, layout.levels(region, ring), strides)


def plan_by_budget(layout: VisionLayout, region: Region, ring: int, budget: int) -> PoolPlan:
    """Plan with exactly ``budget`` cells, in [1, len(layout)].

    The mildest strides that fit (``fit_strides``; 16 everywhere if none do) make a first plan. Its cells are ranked by
    group (inside, ring, outside, newline, padding), then by the signed distance of the leader to the region, then by
    reading order. Spare tokens split the first cells into single tokens; the last cell touched gives up only as many
    members as are paid for, the nearest first. If even stride 16 gives too many cells, the last ones are dropped.

    Source: own choice; splitting to single tokens widens the part seen at full resolution.
    """
    if backend.planner() is not None:
        return _compiled(layout, region, ring, (1, 1, 1), budget)
    level = layout.levels(region, ring)
    plan = build_plan(layout, level, fit_strides(layout, level, budget) or (MAX_STRIDE,) * 3)
    if plan.num_out == budget:
        return plan
    leader, counts, label = plan.leader.numpy(), plan.counts.numpy(), plan.inverse.numpy()
    distance = region.distance(layout.center).numpy()
    group = layout.group(level).numpy()
    rank = np.lexsort((distance[leader], group[leader]))  # stable: ties in reading order
    chosen = np.zeros(plan.num_out, dtype=bool)
    if plan.num_out > budget:
        chosen[rank[budget:]] = True
        label = np.where(chosen[label], -1, label)
    else:
        spare = budget - plan.num_out
        gain = (counts[rank] - 1).cumsum()
        whole = int(np.searchsorted(gain, spare, side="right"))
        chosen[rank[:whole]] = True
        single = chosen[label]
        left = spare - (int(gain[whole - 1]) if whole else 0)
        if left:
            begin, end = plan.offsets[rank[whole] :][:2].tolist()
            members = plan.members[begin:end].numpy()
            single[members[distance[members].argsort(kind="stable")[:left]]] = True
        label = np.where(single, plan.num_out + np.arange(len(label)), label)
    label = torch.from_numpy(label.astype(np.int64))
    return PoolPlan.from_labels(label, layout.row, layout.col, level)


def _compiled(layout: VisionLayout, region: Region, ring: int, strides: tuple[int, int, int], budget: int) -> PoolPlan:
    """Either of them in compiled code, bit for bit; budget: 0 = by strides."""
    arrays = backend.native.plan_cells(layout.address, region.boxes, ring, strides, budget)
    return PoolPlan(*map(torch.from_numpy, arrays), len(layout), check=False)
