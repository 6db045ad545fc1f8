"""From a score per vision token to boxes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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
        """The token grid of a layout of one view; of several views, the mean over those that see a place, at the finest
        pitch among them.

        Args:
            layout: N tokens, not pooled. score: (N,), not read where there is no patch; NaN counts as 0.
        """
        values = np.nan_to_num(score.double().cpu().numpy())
        pictures = [place.picture(values) for place in _places(layout)]
        return pictures[0] if len(pictures) == 1 else _joined(pictures)

    def boxes(self, chosen: np.ndarray, *, gap: int, max_boxes: int, dilate: int) -> list[TokenBox]:
        """Boxes around the places that touch, the heaviest first.

        Args:
            chosen: (rows, columns) bool.
            gap: boxes that share rows are joined over this many places.
            max_boxes: how many are returned at most.
            dilate: places that every box grows on each side first.
        """
        height, width = self.values.shape
        boxes = _merge([_grow(box, dilate, height, width) for box in _touching(chosen)], gap)
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


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the patches of one view stand in their picture.

    Args:
        token: (M,) int64 which tokens they are. at: their rows and columns.
        valid, cell: of the ``Raster``.
    """

    token: np.ndarray
    at: tuple[np.ndarray, np.ndarray]
    valid: np.ndarray
    cell: np.ndarray

    def picture(self, values: np.ndarray) -> Raster:
        picture = np.zeros(self.valid.shape)
        picture[self.at] = values[self.token]
        return Raster(picture, self.valid, self.cell)


@lru_cache(maxsize=16)  # pictures of one size have one layout
def _places(layout: VisionLayout) -> list[_Place]:
    """One per view."""
    number, row, col = (axis.numpy() for axis in (layout.view, layout.row, layout.col))
    patch, places = (layout.kind == PATCH).numpy(), []
    for view in np.unique(number):
        here = number == view
        y, x = row - row[here].min(), col - col[here].min()
        valid = np.zeros((y[here].max() + 1, x[here].max() + 1), dtype=bool)
        cell = np.zeros((*valid.shape, 4))
        cell[y[here], x[here]] = layout.cells[here]
        token = np.flatnonzero(here & patch)
        at = y[token], x[token]
        valid[at] = True
        places.append(_Place(token, at, valid, cell))
    return places


def _joined(pictures: list[Raster]) -> Raster:
    """Pictures of parts of one image, at the finest pitch among them, averaged where they overlap."""
    pitch, start, size = np.empty((len(pictures), 2)), np.empty((len(pictures), 2)), []
    for number, picture in enumerate(pictures):
        corners = picture.cell[picture.valid]
        pitch[number] = (corners[:, 2:] - corners[:, :2]).min(0, initial=1.0)
        start[number] = picture.cell[0, 0, :2]
        size.append(picture.valid.shape)
    width, height = (int(round(1 / side)) for side in pitch.min(0))
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for picture, (dx, dy), (x0, y0), (rows, columns) in zip(pictures, pitch, start, size, strict=True):
        row, col = np.floor((y - y0) / dy).astype(int), np.floor((x - x0) / dx).astype(int)
        at = np.ix_(row.clip(0, rows - 1), col.clip(0, columns - 1))
        seen = picture.valid[at] & np.outer((row >= 0) & (row < rows), (col >= 0) & (col < columns))
        total += np.where(seen, picture.values[at], 0.0)
        count += seen
    left, top = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    cell = np.stack([left, top, left + 1 / width, top + 1 / height], -1)
    return Raster(total / count.clip(min=1), count > 0, cell)


def check_ranges(op: str, settings: Any) -> None:
    """Refuse box settings out of their ranges: what localizers that make boxes from scores check first.

    Raises:
        ValueError: ``threshold`` or ``min_confidence`` not in (0, 1); ``gap`` or ``dilate`` < 0; ``max_boxes`` < 1.
    """
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
        threshold, gap, max_boxes, dilate, min_confidence: see ``AttentionLocalizer``.
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
    """Boxes around the sets of True cells that touch, corners included; from top to bottom."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), dtype=bool)
    padded[:, 1:-1] = mask
    # Runs of cells in reading order; a place counts on from row to row, ``pitch`` places each.
    pitch, edge = width + 1, np.flatnonzero(padded[:, 1:] != padded[:, :-1])
    start, stop = edge[::2], edge[1::2]
    # A run touches those of the row above that end no earlier than it begins and begin no later than it ends.
    low, high = stop.searchsorted(start - pitch), start.searchsorted(stop - pitch, side="right")
    first = list(range(len(start)))  # an earlier run of the same set

    def root(run: int) -> int:
        while first[run] != run:
            run = first[run]
        return run

    for run, touched in enumerate(map(range, low.tolist(), high.tolist())):
        for other in touched:
            one, two = sorted((root(other), root(run)))
            first[two] = one
    boxes: dict[int, TokenBox] = {}
    for run, (begin, end) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        row, left = divmod(begin, pitch)
        box, of = (left, row, left + end - begin, row + 1), root(run)
        boxes[of] = _around(boxes.get(of, box), box)
    return list(boxes.values())


def _around(a: TokenBox, b: TokenBox) -> TokenBox:
    return (*map(min, a[:2], b[:2]), *map(max, a[2:], b[2:]))


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
                a = _around(a, b)
        merged.append(a)
    return merged
