"""From a score per vision token to boxes."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from crop.region import PATCH, Region, VisionLayout

TokenBox = tuple[int, int, int, int]  # (left, top, right, bottom) tokens, half open


def find_region(
    layout: VisionLayout,
    score: Tensor,
    *,
    threshold: float = 0.02,
    gap: int = 3,
    max_boxes: int = 6,
    dilate: int = 0,
    min_confidence: float = 0.5,
) -> Region:
    """Boxes around the peaks of a score.

    Tokens belong to a peak where the smoothed score reaches ``threshold`` of its maximum and their
    own at least half the average; touching tokens make one box, and so do those in one line.

    Args:
        layout: N tokens of one view.
        score: (N,) float32 >= 0.
        threshold, gap, max_boxes, dilate, min_confidence: see ``AttentionLocalizer``.
    Returns:
        Region; its confidence is the share of the score in the boxes, corrected for chance:
        ``(share - area) / (1 - area)``. The whole image where that is below ``min_confidence``.
    Raises:
        ValueError: more than one view.
    Source: own choice.
    """
    views, height, width = layout.extent
    if views != 1:
        raise ValueError(f"find_region: layout must have one view, got {views}")
    row, col = layout.row.numpy(), layout.col.numpy()
    is_patch = (layout.kind == PATCH).numpy()
    values = np.where(is_patch, score.numpy().astype(np.float64), 0.0)
    if not values.sum() > 0:  # also NaN
        return Region.whole(0.0, "the score has no peak")
    grid, valid = np.zeros((height, width)), np.zeros((height, width), dtype=bool)
    cell = np.empty((height, width, 4))
    grid[row, col], valid[row, col] = values / values.sum(), is_patch
    cell[row, col] = layout.cells
    smooth = np.where(grid >= 0.5 / valid.sum(), _smooth(grid), 0.0)
    pieces = _components(smooth >= threshold * smooth.max())
    boxes = _merge([_grow(_bounds(piece), dilate, height, width) for piece in pieces], gap)
    boxes.sort(key=lambda box: -grid[box[1] : box[3], box[0] : box[2]].sum())
    boxes = boxes[:max_boxes]
    inside = np.zeros_like(valid)
    for left, top, right, bottom in boxes:
        inside[top:bottom, left:right] = True
    area = (inside & valid).sum() / valid.sum()
    confidence = float((grid[inside].sum() - area) / (1 - area)) if area < 1 else 0.0
    confidence = min(max(confidence, 0.0), 1.0)
    if confidence < min_confidence:
        return Region.whole(confidence, f"the peaks hold too little of the score: {confidence:.2f} < {min_confidence}")
    corners = ((*cell[y0, x0, :2], *cell[y1 - 1, x1 - 1, 2:]) for x0, y0, x1, y1 in boxes)
    return Region(tuple(corners), confidence)


def _smooth(grid: np.ndarray) -> np.ndarray:
    """Binomial 3 x 3 blur that does not darken the border."""

    def blur(values: np.ndarray) -> np.ndarray:
        for _ in range(2):
            padded = np.pad(values, ((1, 1), (0, 0)))
            values = (padded[:-2] + 2 * padded[1:-1] + padded[2:]).T / 4
        return values

    return blur(grid) / blur(np.ones_like(grid))


def _components(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Sets of True cells that touch, corners included."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    pieces = []
    while left:
        piece, front = [], [left.pop()]
        while front:
            y, x = front.pop()
            piece.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        pieces.append(piece)
    return pieces


def _bounds(piece: list[tuple[int, int]]) -> TokenBox:
    rows, columns = zip(*piece, strict=True)
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def _grow(box: TokenBox, by: int, height: int, width: int) -> TokenBox:
    left, top, right, bottom = box
    return max(left - by, 0), max(top - by, 0), min(right + by, width), min(bottom + by, height)


def _merge(boxes: list[TokenBox], gap: int) -> list[TokenBox]:
    """Join boxes that overlap or stand within ``gap`` tokens on shared rows, until none do."""
    merged: list[TokenBox] = []
    for a in boxes:
        while near := [b for b in merged if a[0] <= b[2] + gap and b[0] <= a[2] + gap and a[1] < b[3] and b[1] < a[3]]:
            for b in near:
                merged.remove(b)
                a = (*map(min, a[:2], b[:2]), *map(max, a[2:], b[2:]))
        merged.append(a)
    return merged
