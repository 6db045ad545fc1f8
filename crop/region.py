"""Region and VisionLayout: where a question looks, and where every vision token lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from crop.plan import PoolPlan, count_cells

__all__ = ["NEWLINE", "PADDING", "PATCH", "PoolPlan", "Region", "VisionLayout", "count_cells"]

Box = tuple[float, float, float, float]

PATCH, NEWLINE, PADDING = 0, 1, 2


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
            grid: blocks per side.
            confidence: see ``Region``.
        Returns:
            Region with one box.
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
        boxes: Sequence[float] | Sequence[Sequence[float]],
        size: tuple[float, float],
        confidence: float = 1.0,
    ) -> Region:
        """Box or boxes in pixels of the original image.

        Args:
            boxes: (x0, y0, x1, y1), or a sequence of such; half open.
            size: (width, height) of the original image in pixels.
            confidence: see ``Region``.
        Returns:
            Region with one box per given box.
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
        xs = sorted({0.0, 1.0}.union(*((box[0], box[2]) for box in self.boxes)))
        ys = sorted({0.0, 1.0}.union(*((box[1], box[3]) for box in self.boxes)))
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
        return all(covered for _, covered in self._pieces())

    @cached_property
    def area(self) -> float:
        """Area of the union of the boxes, as a fraction of the image."""
        return math.fsum(area for area, covered in self._pieces() if covered)

    @cached_property
    def _corners(self) -> np.ndarray:
        """(4, num_boxes, 1) x0, y0, x1, y1."""
        # float32 like token centres, so that a centre exactly on a border compares equal to it.
        return np.array(self.boxes, dtype=np.float32).T[:, :, None]

    def _hits(self, center: Tensor) -> np.ndarray:
        """(num_boxes, N) bool: which box contains which point."""
        x, y = center.numpy().T
        x0, y0, x1, y1 = self._corners
        return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)

    def contains(self, center: Tensor) -> Tensor:
        """Which points lie in the region.

        Args:
            center: (N, 2) float32 x, y in the original image, on the CPU.
        Returns:
            (N,) bool.
        """
        return torch.from_numpy(self._hits(center).any(0))

    def distance(self, center: Tensor) -> Tensor:
        """Signed distance of points to the border of the nearest box, negative inside.

        Args:
            center: (N, 2) float32 x, y in the original image, on the CPU.
        Returns:
            (N,) float32, in sides of the image.
        Source: signed distance function of a rectangle.
        """
        x, y = center.numpy().T
        x0, y0, x1, y1 = self._corners
        dx, dy = np.maximum(x0 - x, x - x1), np.maximum(y0 - y, y - y1)
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
        return torch.from_numpy((outside + np.minimum(np.maximum(dx, dy), 0)).min(0))


@dataclass(frozen=True, eq=False)
class VisionLayout:
    """Where every vision token of one image of one sample lies; CPU tensors.

    Args:
        position: (N,) int64 index of the token in its sample's (padded) sequence, ascending.
        center: (N, 2) float32 x, y in the original image; outside [0, 1) for processor padding.
        row, col: (N,) int32 coordinates on the token grid of the token's view.
        view: (N,) int32 grid the token belongs to (0 where there is one; base view / tiles differ).
        kind: (N,) uint8 PATCH = 0, NEWLINE = 1, PADDING = 2.
        num_original: vision tokens of this image before any pruning.
    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or device, position not ascending, negative
            grid coordinates.
    """

    position: Tensor
    center: Tensor
    row: Tensor
    col: Tensor
    view: Tensor
    kind: Tensor
    num_original: int

    def __post_init__(self) -> None:
        dtypes = {
            "position": torch.int64,
            "center": torch.float32,
            "row": torch.int32,
            "col": torch.int32,
            "view": torch.int32,
            "kind": torch.uint8,
        }
        count = len(self.position)
        for name, dtype in dtypes.items():
            array, shape = getattr(self, name), (count, 2) if name == "center" else (count,)
            if array.dtype != dtype:
                raise TypeError(f"VisionLayout: {name} must be {dtype}, got {array.dtype}")
            if array.shape != shape or not array.is_cpu:
                raise ValueError(
                    f"VisionLayout: {name} must be a CPU tensor of shape {shape}, "
                    f"got {tuple(array.shape)} on {array.device}"
                )
        if self.num_original < count:
            raise ValueError(f"VisionLayout: num_original must be >= N={count}, got {self.num_original}")
        if count == 0:
            return
        if (np.diff(self.position.numpy()) <= 0).any():
            raise ValueError("VisionLayout: position must ascend strictly, got an unsorted one")
        for name in ("row", "col", "view"):
            if getattr(self, name).numpy().min() < 0:
                raise ValueError(f"VisionLayout: {name} must be >= 0, got a negative value")

    def __len__(self) -> int:
        return len(self.position)

    @cached_property
    def _value(self) -> tuple[int | bytes, ...]:
        arrays = (self.position, self.center, self.row, self.col, self.view, self.kind)
        return self.num_original, *(array.numpy().tobytes() for array in arrays)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VisionLayout) and self._value == other._value

    def __hash__(self) -> int:  # by value, so that plans can be cached
        return hash(self._value)

    @staticmethod
    def grid(
        height: int,
        width: int,
        *,
        box: Box = (0.0, 0.0, 1.0, 1.0),
        position: Tensor | None = None,
        start: int = 0,
    ) -> VisionLayout:
        """Row-major grid of tokens that covers a rectangle of the original image.

        Args:
            height, width: tokens per column and per row.
            box: (x0, y0, x1, y1) that the grid covers: larger than the image = padded by the
                processor (tokens whose centre is outside are PADDING), smaller = cropped.
            position: (height * width,) int64; default ``start + arange``.
            start: sequence index of the first token where ``position`` is not given.
        Returns:
            VisionLayout with one view; equal ones may share their arrays.
        Raises:
            ValueError: height or width < 1; box empty or inverted; position of the wrong length.
        """
        layout = _grid(height, width, tuple(box))
        if position is None and start:
            position = torch.from_numpy(np.arange(start, start + len(layout)))
        return layout if position is None else replace(layout, position=position)

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """View, row and column of every token as int64."""
        arrays = (self.view, self.row, self.col)
        return tuple(array.numpy().astype(np.int64) for array in arrays)

    @cached_property
    def extent(self) -> tuple[int, int, int]:
        """Numbers of views, rows and columns that hold all tokens."""
        return tuple(int(axis.max(initial=-1)) + 1 for axis in self._index)

    @cached_property
    def cells(self) -> np.ndarray:
        """(N, 4) float64 x0, y0, x1, y1: the rectangle of the original image that each token stands for.

        Neighbours share their border. Only for a layout whose tokens are not pooled.
        """
        center = self.center.numpy().astype(np.float64)
        pitch = np.ones_like(center)
        view, row, col = self._index
        for number in range(self.extent[0]):
            here = view == number
            for axis, place in enumerate((col[here], row[here])):
                if len(place) and np.ptp(place):
                    pitch[here, axis] = np.ptp(center[here, axis]) / np.ptp(place)
        # Rounded, so that borders which should coincide do, whatever float32 made of the centres.
        return np.concatenate([center - pitch / 2, center + pitch / 2], 1).round(6)

    @cached_property
    def _patch(self) -> np.ndarray:
        return self.kind.numpy() == PATCH

    def _inside_patches(self, region: Region) -> np.ndarray:
        hits = region._hits(self.center) & self._patch
        inside = hits.any(0)
        empty = ~hits.any(1)
        if empty.any() and self._patch.any():
            x, y = self.center.numpy().T
            x0, y0, x1, y1 = region._corners[:, empty]
            apart = (x - (x0 + x1) / 2) ** 2 + (y - (y0 + y1) / 2) ** 2
            inside[np.where(self._patch, apart, np.inf).argmin(1)] = True
        return inside

    def inside(self, region: Region) -> Tensor:
        """Tokens of the region.

        A patch is inside when its centre is; a box that holds no centre selects the patch nearest
        to the box's centre. A newline is inside if any patch of its row is. Padding never is.

        Args:
            region: boxes in the original image.
        Returns:
            (N,) bool.
        """
        return self.levels(region, 0) == 0

    def levels(self, region: Region, ring: int) -> Tensor:
        """Level of every token: 0 inside, 1 in the ring around the region, 2 outside.

        The ring is the Chebyshev dilation of the inside patches by ``ring`` tokens, on the token
        grid of each view. A newline takes the lowest level of its row, padding is always outside.

        Args:
            region: boxes in the original image.
            ring: tokens, >= 0.
        Returns:
            (N,) uint8.
        Raises:
            ValueError: ring < 0.
        Source: own choice.
        """
        if ring < 0:
            raise ValueError(f"levels: ring must be >= 0, got {ring}")
        patch = self._patch
        inside = self._inside_patches(region)
        level = np.full(len(self), 2, dtype=np.uint8)
        if ring:
            level[self._dilate(inside, ring) & patch] = 1
        level[inside] = 0
        newline = self.kind.numpy() == NEWLINE
        if newline.any():
            view, row, _ = self._index
            lowest = np.full(self.extent[:2], 2, dtype=np.uint8)
            np.minimum.at(lowest, (view[patch], row[patch]), level[patch])
            level[newline] = lowest[view[newline], row[newline]]
        return torch.from_numpy(level)

    def _dilate(self, inside: np.ndarray, ring: int) -> np.ndarray:
        mask = np.zeros(self.extent, dtype=bool)
        mask[self._index] = inside
        for _ in range(2):  # rows, then columns: a square window is separable
            grown = mask.copy()
            for step in range(1, ring + 1):
                grown[:, step:] |= mask[:, :-step]
                grown[:, :-step] |= mask[:, step:]
            mask = grown.swapaxes(1, 2)
        return mask[self._index]

    def group(self, level: Tensor) -> Tensor:
        """(N,) uint8 what may share a cell: patches of one level (0..2), newlines 3, padding 4."""
        return torch.from_numpy(np.where(self._patch, level.numpy(), self.kind.numpy() + 2))

    def block(self, stride: int | np.ndarray) -> Tensor:
        """(N,) int64 number of the stride x stride block a token lies in, below prod(extent)."""
        view, row, col = self._index
        _, height, width = self.extent
        return torch.from_numpy((view * height + row // stride) * width + col // stride)

    def pool(self, plan: PoolPlan, position: Tensor) -> VisionLayout:
        """Layout of the tokens that ``plan`` makes of this layout's tokens.

        Args:
            plan: PoolPlan over N tokens.
            position: (plan.num_out,) int64 sequence indices of the pooled tokens.
        Returns:
            VisionLayout: centre = mean of the members' centres; row, col, view and kind of the
            leader; num_original unchanged.
        Raises:
            ValueError: the plan is for another number of tokens.
        """
        if plan.num_tokens != len(self):
            raise ValueError(f"VisionLayout.pool: plan.num_tokens must be N={len(self)}, got {plan.num_tokens}")
        center = self.center.numpy().astype(np.float64)[plan.members.numpy()]
        mean = np.zeros((plan.num_out, 2))
        if plan.num_out:
            mean = np.add.reduceat(center, plan.offsets[:-1].numpy()) / plan.counts[:, None].numpy()
        leader = plan.leader.long()
        return VisionLayout(
            position=position,
            center=torch.from_numpy(mean.astype(np.float32)),
            row=self.row[leader],
            col=self.col[leader],
            view=self.view[leader],
            kind=self.kind[leader],
            num_original=self.num_original,
        )


@lru_cache(maxsize=32)  # every call of a model lays out its pictures again
def _grid(height: int, width: int, box: Box) -> VisionLayout:
    """See ``VisionLayout.grid``; positions from 0."""
    if height < 1 or width < 1:
        raise ValueError(f"VisionLayout.grid: size must be >= 1, got {height} x {width}")
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"VisionLayout.grid: box must satisfy x0 < x1 and y0 < y1, got {box}")
    row, col = (axis.ravel() for axis in np.indices((height, width), dtype=np.int32))
    center = np.empty((height * width, 2), dtype=np.float32)
    center[:, 0] = x0 + (col + 0.5) * (x1 - x0) / width
    center[:, 1] = y0 + (row + 0.5) * (y1 - y0) / height
    padded = ((center < 0) | (center >= 1)).any(1)
    return VisionLayout(
        position=torch.from_numpy(np.arange(height * width)),
        center=torch.from_numpy(center),
        row=torch.from_numpy(row),
        col=torch.from_numpy(col),
        view=torch.from_numpy(np.zeros_like(row)),
        kind=torch.from_numpy(np.where(padded, PADDING, PATCH).astype(np.uint8)),
        num_original=height * width,
    )
