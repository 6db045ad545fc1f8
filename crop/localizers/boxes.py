"""From a score per vision token to boxes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import numpy as np
from torch import Tensor

from crop.geometry.layout import PATCH, VisionLayout
from crop.geometry.region import Region

TokenBox = tuple[int, int, int, int]  # (left, top, right, bottom) tokens, half open


@dataclass(frozen=True, eq=False)
class Raster:
    """A score per vision token as a picture.

    Args:
        values: (rows, columns) float64 >= 0.
        valid: (rows, columns) bool, False where there is padding or no token.
        cell: (rows, columns, 4) float64, the rectangle of the original image that each place stands for.
    """

    values: np.ndarray
    valid: np.ndarray
    cell: np.ndarray

    @staticmethod
    def of(layout: VisionLayout, score: Tensor) -> Raster:
        """The token grid of a layout of one view; of several, the mean of those that see a place, at the finest pitch.

        Args:
            layout: N tokens, not pooled. score: (N,), not read where there is no patch; NaN counts as 0.
        """
        values, cells = np.nan_to_num(score.double().cpu().numpy()), layout.cells
        number, row, col = (axis.numpy() for axis in (layout.view, layout.row, layout.col))
        patch, views = (layout.kind == PATCH).numpy(), []
        for view in np.unique(number):
            here = number == view
            y, x = row - row[here].min(), col - col[here].min()
            shape = y[here].max() + 1, x[here].max() + 1
            picture = Raster(np.zeros(shape), np.zeros(shape, dtype=bool), np.zeros((*shape, 4)))
            picture.cell[y[here], x[here]] = cells[here]
            here &= patch
            picture.values[y[here], x[here]] = values[here]
            picture.valid[y[here], x[here]] = True
            views.append(picture)
        return views[0] if len(views) == 1 else _joined(views)

    def boxes(self, chosen: np.ndarray, *, gap: int, max_boxes: int, dilate: int) -> list[TokenBox]:
        """Boxes around the places that touch, the heaviest first, at most ``max_boxes``.

        Args:
            chosen: (rows, columns) bool.
            gap: boxes that share rows are joined over this many places.
            dilate: places that every box grows on each side first.
        """
        height, width = self.values.shape
        grown = [
            (max(left - dilate, 0), max(top - dilate, 0), min(right + dilate, width), min(bottom + dilate, height))
            for left, top, right, bottom in _touching(chosen)
        ]
        boxes = _merge(grown, gap)
        boxes.sort(key=lambda box: -self.values[box[1] : box[3], box[0] : box[2]].sum())
        return boxes[:max_boxes]

    def inside(self, boxes: list[TokenBox]) -> np.ndarray:
        """(rows, columns) bool: what the boxes cover."""
        inside = np.zeros(self.valid.shape, dtype=bool)
        for left, top, right, bottom in boxes:
            inside[top:bottom, left:right] = True
        return inside

    def region(self, boxes: list[TokenBox], confidence: float) -> Region:
        """The boxes in the original image."""
        corners = ((*self.cell[y0, x0, :2], *self.cell[y1 - 1, x1 - 1, 2:]) for x0, y0, x1, y1 in boxes)
        return Region(tuple(corners), confidence)


def _joined(pictures: list[Raster]) -> Raster:
    """Pictures of parts of one image, at the finest pitch among them, averaged where they overlap."""
    corners = [picture.cell[picture.valid] for picture in pictures]
    pitches = [(corner[:, 2:] - corner[:, :2]).min(0, initial=1.0) for corner in corners]
    width, height = (int(round(1 / side)) for side in np.min(pitches, 0))
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for picture, (dx, dy) in zip(pictures, pitches, strict=True):
        (x0, y0), (rows, columns) = picture.cell[0, 0, :2], picture.valid.shape
        row, col = np.floor((y - y0) / dy).astype(int), np.floor((x - x0) / dx).astype(int)
        at = np.ix_(row.clip(0, rows - 1), col.clip(0, columns - 1))
        seen = picture.valid[at] & np.outer((row >= 0) & (row < rows), (col >= 0) & (col < columns))
        total += np.where(seen, picture.values[at], 0.0)
        count += seen
    left, top = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    cell = np.stack([left, top, left + 1 / width, top + 1 / height], -1)
    return Raster(total / count.clip(min=1), count > 0, cell)


def box_settings(localizer: Any) -> dict[str, Any]:
    """The fields of a localizer that ``find_region`` takes by the same names."""
    return {name: getattr(localizer, name) for name in ("threshold", "gap", "max_boxes", "dilate", "min_confidence")}


def check_ranges(op: str, settings: Any) -> None:
    """ValueError unless threshold and min_confidence are in (0, 1), gap and dilate >= 0 and max_boxes >= 1."""
    for name in ("threshold", "min_confidence"):
        if not 0 < getattr(settings, name) < 1:
            raise ValueError(f"{op}: {name} must be in (0, 1), got {getattr(settings, name)}")
    for name, low in (("gap", 0), ("max_boxes", 1), ("dilate", 0)):
        if not getattr(settings, name) >= low:
            raise ValueError(f"{op}: {name} must be >= {low}, got {getattr(settings, name)}")


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
        layout: N tokens, not pooled.
        score: (N,) float32 >= 0.
        threshold: fraction of the peak from which tokens belong to the region, in (0, 1).
        gap: boxes that share rows are joined over this many tokens, as words in a line.
        max_boxes: boxes kept, the heaviest first. dilate: tokens that every box grows on each side.
    Returns:
        Region; its confidence is the share of the score in the boxes, corrected for chance:
        ``(share - area) / (1 - area)``. The whole image where that is below ``min_confidence``.
    Source: own choice.
    """
    raster = Raster.of(layout, score)
    grid, valid = raster.values, raster.valid
    if not grid.sum() > 0:
        return Region.whole(0.0, "the score has no peak")
    smooth = np.where(grid >= 0.5 * grid.sum() / valid.sum(), smoothed(grid), 0.0)
    boxes = raster.boxes(smooth >= threshold * smooth.max(), gap=gap, max_boxes=max_boxes, dilate=dilate)
    inside = raster.inside(boxes)
    area = (inside & valid).sum() / valid.sum()
    confidence = float((grid[inside].sum() / grid.sum() - area) / (1 - area)) if area < 1 else 0.0
    confidence = min(max(confidence, 0.0), 1.0)
    if confidence < min_confidence:
        return Region.whole(confidence, f"the peaks hold too little of the score: {confidence:.2f} < {min_confidence}")
    return raster.region(boxes, confidence)


def smoothed(grid: np.ndarray) -> np.ndarray:
    """Binomial 3 x 3 blur that does not darken the border."""

    def blur(values: np.ndarray) -> np.ndarray:
        for _ in range(2):
            padded = np.pad(values, ((1, 1), (0, 0)))
            values = (padded[:-2] + 2 * padded[1:-1] + padded[2:]).T / 4
        return values

    return blur(grid) / blur(np.ones_like(grid))


def _touching(mask: np.ndarray) -> list[TokenBox]:
    """Boxes around the sets of True cells that touch, corners included; in reading order of their first cells."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), (_, ends) = (edges == 1).nonzero(), (edges == -1).nonzero()
    runs = [(x0, y, x1, y + 1) for y, x0, x1 in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)]
    parent = list(range(len(runs)))

    def first(run: int) -> int:
        """The first run of the same set."""
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above: list[int] = []
    for row, group in groupby(range(len(runs)), key=lambda run: runs[run][1]):
        here = list(group)
        for this, other in product(here, above if above and runs[above[0]][1] == row - 1 else ()):
            if runs[other][0] <= runs[this][2] and runs[this][0] <= runs[other][2]:
                low, high = sorted((first(this), first(other)))
                parent[high] = low
        above = here
    boxes: dict[int, TokenBox] = {}
    for run, box in enumerate(runs):
        boxes[first(run)] = _around(boxes.get(first(run), box), box)
    return list(boxes.values())


def _around(a: TokenBox, b: TokenBox) -> TokenBox:
    return (*map(min, a[:2], b[:2]), *map(max, a[2:], b[2:]))


def _merge(boxes: list[TokenBox], gap: int) -> list[TokenBox]:
    """Join boxes that overlap or stand within ``gap`` tokens on shared rows, until none do."""
    merged: list[TokenBox] = []
    for a in boxes:
        while near := [b for b in merged if a[0] <= b[2] + gap and b[0] <= a[2] + gap and a[1] < b[3] and b[1] < a[3]]:
            for b in near:
                merged.remove(b)
                a = _around(a, b)
        merged.append(a)
    return merged
