"""VisionLayout: where every vision token of one image lies, in the prompt and in the picture."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crop import backend
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Box, Region

PATCH, NEWLINE, PADDING = 0, 1, 2


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
        check: False skips the checks, where the arrays are valid by construction.
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
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        if not check:
            return
        count, dtypes = len(self.position), {"position": torch.int64, "center": torch.float32, "kind": torch.uint8}
        for name in ("position", "center", "row", "col", "view", "kind"):
            dtype = dtypes.get(name, torch.int32)
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
        return self.position.shape[0]

    @staticmethod
    def grid(
        height: int, width: int, *, box: Box = (0.0, 0.0, 1.0, 1.0), position: Tensor | None = None, start: int = 0
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

    def at(self, position: Tensor) -> VisionLayout:
        """The same tokens at other places of a sequence: (N,) int64, ascending (not checked)."""
        arrays = (self.center, self.row, self.col, self.view, self.kind)
        return VisionLayout(position, *arrays, self.num_original, check=False)

    def of_patches(self) -> VisionLayout:
        """The same tokens, all called patches."""
        arrays = (self.position, self.center, self.row, self.col, self.view, torch.full_like(self.kind, PATCH))
        return VisionLayout(*arrays, self.num_original, check=False)

    @cached_property
    def address(self) -> tuple[Any, ...]:
        """What compiled code takes: number of tokens, where their arrays lie in memory, and these arrays, to keep them."""
        arrays = (self.position, self.center, self.row, self.col, self.view, self.kind)
        dense = [*map(Tensor.contiguous, arrays)]
        return (len(self), *map(Tensor.data_ptr, dense), dense)

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
        hits = region.hits(self.center) & self._patch
        inside = hits.any(0)
        empty = ~hits.any(1)
        if empty.any() and self._patch.any():
            x, y = self.center.numpy().T
            x0, y0, x1, y1 = region.corners[:, empty]
            apart = (x - (x0 + x1) / 2) ** 2 + (y - (y0 + y1) / 2) ** 2
            inside[np.where(self._patch, apart, np.inf).argmin(1)] = True
        return inside

    def inside(self, region: Region) -> Tensor:
        """(N,) bool: the tokens of the region.

        A patch is inside when its centre is; a box that holds no centre selects the patch nearest
        to the box's centre. A newline is inside if any patch of its row is. Padding never is.
        """
        return torch.from_numpy(self.levels(region, 0).numpy() == 0)

    def levels(self, region: Region, ring: int) -> Tensor:
        """(N,) uint8 level of every token: 0 inside, 1 in the ring around the region, 2 outside.

        The ring is the Chebyshev dilation of the inside patches by ``ring`` tokens, on the token
        grid of each view. A newline takes the lowest level of its row, padding is always outside.

        Raises:
            ValueError: ring < 0.
        Source: own choice.
        """
        if ring < 0:
            raise ValueError(f"levels: ring must be >= 0, got {ring}")
        if (planner := backend.planner()) is not None:
            return torch.from_numpy(planner.plan_levels(self.address, region.boxes, ring))
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

    def with_newlines(self, tokens: Tensor) -> Tensor:
        """(N,) bool ``tokens`` with the newlines of those rows that hold a patch of them, and no other newlines."""
        newline = self.kind.numpy() == NEWLINE
        if not newline.any():
            return tokens
        found, (view, row, _) = tokens.numpy() & ~newline, self._index
        rows = np.zeros(self.extent[:2], dtype=bool)
        rows[view[found], row[found]] = True
        return torch.from_numpy(np.where(newline, rows[view, row], found))

    def take(self, tokens: Tensor) -> VisionLayout:
        """The layout of some tokens, (N,) bool; ``num_original`` stays."""
        names = ("position", "center", "row", "col", "view", "kind")
        return replace(self, **{name: getattr(self, name)[tokens] for name in names})

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
        """Layout of the tokens that ``plan`` makes of these: mean centre; row, col, view and kind of the leader.

        Args:
            plan: over N tokens. position: (plan.num_out,) int64 sequence indices of the pooled tokens.
        Raises:
            ValueError: the plan is for another number of tokens.
        """
        if plan.num_tokens != len(self):
            raise ValueError(f"VisionLayout.pool: plan.num_tokens must be N={len(self)}, got {plan.num_tokens}")
        if (planner := backend.planner()) is not None:
            arrays = map(torch.from_numpy, planner.plan_pooled(self.address, plan.address))
            return VisionLayout(position, *arrays, self.num_original, check=False)
        center = self.center.numpy()[plan.members.numpy()].astype(np.float64)
        mean = np.zeros((plan.num_out, 2))
        if plan.num_out:
            offsets = plan.offsets.numpy()
            mean = np.add.reduceat(center, offsets[:-1]) / np.diff(offsets)[:, None]
        leader = plan.leader.numpy()
        led = (torch.from_numpy(array.numpy()[leader]) for array in (self.row, self.col, self.view, self.kind))
        return VisionLayout(position, torch.from_numpy(mean.astype(np.float32)), *led, self.num_original, check=False)


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
