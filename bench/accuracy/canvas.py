"""Rivals that change the picture, for a model with a fixed grid of tokens: fewer pixels in a corner, only their tokens stay.

The canvas keeps the size of the picture, so that the model sees a smaller picture at the scale of its pixels, on the picture's
mean colour. What a model says of places on the canvas is turned back into places of the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods import Method

LARGEST = 1.0  # times that a cut-out is enlarged at most: there are no more pixels, and letters larger than any that are known
Box = tuple[float, float, float, float]


def _only(layout: VisionLayout, inside: torch.Tensor) -> PoolPlan:
    """Tokens ``inside`` (N,) bool stay as they are, the others leave."""
    width = layout.extent[2]
    label = (layout.row.long() * width + layout.col).masked_fill(~inside, -1)
    return PoolPlan.from_labels(label, layout.row, layout.col, inside.byte())


def corner(keep: float, grid: int) -> int:
    """Tokens per side of a square that holds a fraction ``keep`` of a grid at most."""
    return max(1, math.isqrt(round(keep * grid * grid)))


def blank(image: Image.Image) -> Image.Image:
    """A canvas of the size and the mean colour of a picture."""
    return Image.new("RGB", image.size, image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))


def shrink(image: Image.Image, keep: float, region: Region, grid: int) -> Image.Image:
    """Down-sampling: the image at a lower resolution in the upper left corner; the region is not looked at.

    Args:
        keep: fraction of the tokens at most. grid: tokens per side; the small image fills whole tokens.
    """
    share, canvas = corner(keep, grid) / grid, blank(image)
    canvas.paste(image.resize([max(1, round(side * share)) for side in image.size], Image.Resampling.LANCZOS))
    return canvas


def unshrink(box: Box, keep: float, region: Region, grid: int) -> Box:
    """Where a box on the canvas of ``shrink`` lies in the picture; boxes in sides of the two."""
    share = corner(keep, grid) / grid
    return tuple(min(1.0, value / share) for value in box)


@dataclass(frozen=True)
class CornerOnly(Method):
    """Keep the tokens where ``shrink`` put the image; ``keep``: fraction of the tokens at most."""

    keep: float

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan:
        side = corner(self.keep, layout.extent[2])
        return _only(layout, (layout.row < side) & (layout.col < side))


class Zoomed(NamedTuple):
    """Where ``zoom`` puts things: overview of ``side`` x ``side`` tokens, right of it ``rows`` x ``cols`` of the cut-out.

    ``box``: what is cut out, in sides of the image. ``scale``: its sides on the canvas, relative to its own.
    """

    side: int
    rows: int
    cols: int
    box: Box
    scale: float


def zoomed(region: Region, keep: float, grid: int, *, overview: float = 0.25, margin: float = 0.02) -> Zoomed | None:
    """A plan for ``zoom``; None where the region is all of the image.

    Args:
        region: several boxes are cut out as one, their bounds. keep: fraction of the tokens at most. grid: per side.
        overview: least share of the tokens for the small copy, which gets what the cut-out leaves. margin: around the region,
            in sides of the image.
    """
    if region.is_whole:
        return None
    x0, y0, x1, y1 = zip(*region.dilate(margin).boxes, strict=True)
    box = min(x0), min(y0), max(x1), max(y1)
    wide, high = (grid * (box[axis + 2] - box[axis]) for axis in (0, 1))
    tokens = round(keep * grid * grid)
    side = max(1, int(math.sqrt(overview * tokens)))
    scale = min((grid - side) / wide, grid / high, LARGEST)
    while (cols := math.ceil(wide * scale - 1e-6)) * (rows := math.ceil(high * scale - 1e-6)) + side**2 > tokens:
        if cols == rows == 1:
            break
        scale *= 0.98
    side = max(side, min(math.isqrt(max(0, tokens - rows * cols)), grid - cols))
    return Zoomed(side, rows, cols, box, scale)


def zoom(image: Image.Image, keep: float, region: Region, grid: int) -> Image.Image:
    """Overview and region side by side on one canvas, at the budget's resolution: ``crop.zoom`` for a fixed token grid."""
    plan = zoomed(region, keep, grid)
    if plan is None:
        return shrink(image, keep, region, grid)
    width, height = image.size
    canvas = blank(image)
    small = [max(1, round(length * plan.side / grid)) for length in image.size]
    canvas.paste(image.resize(small, Image.Resampling.LANCZOS))
    x0, y0, x1, y1 = plan.box
    source = (x0 * width, y0 * height, x1 * width, y1 * height)
    size = [max(1, round(plan.scale * (source[axis + 2] - source[axis]))) for axis in (0, 1)]
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS, box=source), (small[0], 0))
    return canvas


def unzoom(box: Box, keep: float, region: Region, grid: int) -> Box:
    """Where a box on the canvas of ``zoom`` lies in the picture; its middle tells whether it is of overview or cut-out."""
    plan = zoomed(region, keep, grid)
    if plan is None:
        return unshrink(box, keep, region, grid)
    if grid * (box[0] + box[2]) / 2 < plan.side:
        return tuple(min(1.0, value * grid / plan.side) for value in box)
    places = (start + (grid * value - shift) / (grid * plan.scale)
              for value, start, shift in zip(box, plan.box[:2] * 2, (plan.side, 0) * 2, strict=True))  # fmt: skip
    return tuple(
        min(max(place, low), high) for place, low, high in zip(places, plan.box[:2] * 2, plan.box[2:] * 2, strict=True)
    )


@dataclass(frozen=True)
class ZoomOnly(Method):
    """Keep the tokens where ``zoom`` put something; ``keep``: fraction of the tokens at most."""

    keep: float

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan:
        plan = zoomed(region, self.keep, layout.extent[2])
        if plan is None:
            return CornerOnly(self.keep).plan(layout, region)
        row, col = layout.row, layout.col
        overview = (row < plan.side) & (col < plan.side)
        cut = (row < plan.rows) & (col >= plan.side) & (col < plan.side + plan.cols)
        return _only(layout, overview | cut)
