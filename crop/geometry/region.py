"""Region: which part of an image a question needs, as boxes of normalised coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Box = tuple[float, float, float, float]


def _clip_box(box: Sequence[float]) -> Box:
    if not isinstance(box, Sequence) or len(box) != 4:
        raise ValueError(f"Region: each box must be (x0, y0, x1, y1), got {box}")
    x0, y0, x1, y1 = values = tuple(float(value) for value in box)
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"Region: box must be finite, got {values}")
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"Region: box must satisfy x0 < x1 and y0 < y1, got {values}")
    if x0 >= 1 or y0 >= 1 or x1 <= 0 or y1 <= 0:
        raise ValueError(f"Region: box must overlap the image [0, 1) x [0, 1), got {values}")
    return max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0)


@dataclass(frozen=True)
class Region:
    """The part of an image that a question needs: a union of boxes.

    Args:
        boxes: (x0, y0, x1, y1) each, normalised to the ORIGINAL image, half open; parts outside the
            image are clipped away.
        confidence: the localizer's trust in the boxes, in [0, 1].
        reason: why it is what it is, in words for the user, such as why a localizer fell back to the whole image; takes
            no part in comparison.
    Raises:
        ValueError: no box; a box that is not finite, empty, inverted or wholly outside the image;
            confidence out of range.
    Source: one rectangle per question in CROP (arXiv 2505.21233); several boxes are our choice.
    """

    boxes: tuple[Box, ...]
    confidence: float = 1.0
    reason: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.boxes) == 0:
            raise ValueError("Region: boxes must hold at least one box, got none")
        if not 0.0 <= self.confidence <= 1.0:
            raise ValueError(f"Region: confidence must be in [0, 1], got {self.confidence}")
        object.__setattr__(self, "boxes", tuple(_clip_box(box) for box in self.boxes))

    @staticmethod
    def whole(confidence: float = 1.0, reason: str = "") -> Region:
        """The whole image: contains every centre in [0, 1) x [0, 1)."""
        return Region(((0.0, 0.0, 1.0, 1.0),), confidence, reason)

    @staticmethod
    def box(x0: float, y0: float, x1: float, y1: float, confidence: float = 1.0) -> Region:
        """One box, normalised to the original image, half open."""
        return Region(((x0, y0, x1, y1),), confidence)

    @staticmethod
    def from_blocks(xmin: int, ymin: int, xmax: int, ymax: int, grid: int = 8, confidence: float = 1.0) -> Region:
        """The rectangle of whole blocks of a ``grid`` x ``grid`` division of the image.

        Args:
            xmin, ymin, xmax, ymax: 0-based block indices, all inclusive.
        Raises:
            ValueError: not 0 <= min <= max < grid.
        Source: CROP (arXiv 2505.21233), 8 x 8 blocks.
        """
        blocks = (xmin, ymin, xmax, ymax)
        if not (0 <= xmin <= xmax < grid and 0 <= ymin <= ymax < grid):
            raise ValueError(f"Region.from_blocks: blocks must satisfy 0 <= min <= max < grid={grid}, got {blocks}")
        return Region.box(xmin / grid, ymin / grid, (xmax + 1) / grid, (ymax + 1) / grid, confidence)

    @staticmethod
    def from_pixels(
        boxes: Sequence[float] | Sequence[Sequence[float]], size: tuple[float, float], confidence: float = 1.0
    ) -> Region:
        """Box or boxes in pixels of the original image.

        Args:
            boxes: (x0, y0, x1, y1), or a sequence of such; half open.
            size: (width, height) of the original image.
        Raises:
            ValueError: size not positive, or what ``Region`` raises.
        """
        width, height = size
        if not (width > 0 and height > 0):
            raise ValueError(f"Region.from_pixels: size must be positive, got {tuple(size)}")
        table = np.atleast_2d(np.asarray(boxes, dtype=np.float64))
        if table.ndim != 2 or table.shape[1] != 4:
            raise ValueError(f"Region.from_pixels: boxes must have shape (4,) or (num_boxes, 4), got {boxes}")
        scaled = table / (width, height, width, height)
        return Region(tuple(tuple(box) for box in scaled.tolist()), confidence)

    def dilate(self, margin: float) -> Region:
        """Every box grown by ``margin`` (fraction of the image's side) on each side, clipped."""
        if not (math.isfinite(margin) and margin >= 0):
            raise ValueError(f"Region.dilate: margin must be finite and >= 0, got {margin}")
        grown = tuple((x0 - margin, y0 - margin, x1 + margin, y1 + margin) for x0, y0, x1, y1 in self.boxes)
        return replace(self, boxes=grown)

    def union(self, other: Region) -> Region:
        """Both regions together, with the lower of the two confidences and both reasons."""
        reason = "; ".join(dict.fromkeys(filter(None, (self.reason, other.reason))))
        return Region(self.boxes + other.boxes, min(self.confidence, other.confidence), reason)

    def _pieces(self) -> list[tuple[float, bool]]:
        """(area, covered) of the rectangles into which all box borders cut the image."""
        xs, ys = (sorted({0.0, 1.0}.union(*(box[axis::2] for box in self.boxes))) for axis in (0, 1))
        return [
            (
                (right - left) * (bottom - top),
                any(b[0] <= left and right <= b[2] and b[1] <= top and bottom <= b[3] for b in self.boxes),
            )
            for left, right in pairwise(xs)
            for top, bottom in pairwise(ys)
        ]

    @cached_property
    def is_whole(self) -> bool:
        """Whether the boxes together cover the image."""
        if len(self.boxes) == 1:  # the usual case, asked at every call
            return self.boxes[0] == (0.0, 0.0, 1.0, 1.0)
        return all(covered for _, covered in self._pieces())

    @cached_property
    def area(self) -> float:
        """Area of the union of the boxes, as a fraction of the image."""
        return math.fsum(area for area, covered in self._pieces() if covered)

    @cached_property
    def corners(self) -> np.ndarray:
        """(4, num_boxes, 1) x0, y0, x1, y1."""
        # float32 like token centres, so that a centre exactly on a border compares equal to it.
        return np.array(self.boxes, dtype=np.float32).T[:, :, None]

    def hits(self, center: Tensor) -> np.ndarray:
        """(num_boxes, N) bool: which box contains which point."""
        x, y = center.numpy().T
        x0, y0, x1, y1 = self.corners
        return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)

    def contains(self, center: Tensor) -> Tensor:
        """(N,) bool: which of the points ``center``, (N, 2) float32 x, y on the CPU, lie in the region."""
        return torch.from_numpy(self.hits(center).any(0))

    def distance(self, center: Tensor) -> Tensor:
        """Signed distance of points to the border of the nearest box, negative inside.

        Args:
            center: (N, 2) float32 x, y in the original image, on the CPU.
        Returns:
            (N,) float32, in sides of the image.
        """
        x, y = center.numpy().T
        x0, y0, x1, y1 = self.corners
        dx, dy = np.maximum(x0 - x, x - x1), np.maximum(y0 - y, y - y1)
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
        return torch.from_numpy((outside + np.minimum(np.maximum(dx, dy), 0)).min(0))
