"""Equal tiles, each encoded alone, and a view of the whole."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from crop.geometry.layout import VisionLayout
from crop.models.family import Placed, Prompt, Size, stack_views


def tiled_check(config: Any, processor: Any, sizes: Sequence[Size] | None, whole: bool) -> None:
    """A region can only be found among tiles whose arrangement is known: it follows from the processor and the size."""
    if not whole and (processor is None or sizes is None):
        name = "processor" if processor is None else "image_size"
        raise ValueError(
            f"patch: {name} must be given for {config.model_type!r} with a region, because it decides into which tiles an "
            "image is cut, got None"
        )


def tiled_layout(rows: int, columns: int, side: int) -> VisionLayout:
    """Tiles of ``side`` x ``side`` tokens in reading order, then the whole image; one tile alone is the whole image."""
    whole = VisionLayout.grid(side, side)
    return whole if rows * columns <= 1 else stack_views([_tiles(rows, columns, side), whole])


def _tiles(rows: int, columns: int, side: int) -> VisionLayout:
    """The tiles cover the image without overlap, so they form one grid: a cell may reach over their borders."""
    grid = VisionLayout.grid(rows * side, columns * side)
    order = torch.arange(rows * columns * side * side).view(rows, side, columns, side).transpose(1, 2).flatten()
    return VisionLayout(
        position=grid.position,
        center=grid.center[order],
        row=grid.row[order],
        col=grid.col[order],
        view=grid.view[order],
        kind=grid.kind[order],
        num_original=len(order),
    )


def internvl_images(prompt: Prompt) -> Placed:
    """InternVL: the arrangement of tiles whose aspect ratio is nearest to the image's."""
    config = prompt.config
    size, patch = (np.ravel(value)[0] for value in (config.vision_config.image_size, config.vision_config.patch_size))
    side = round(size // patch * config.downsample_ratio)
    counts = [(stop - start) // side**2 for _, runs in _runs_by_sample(prompt) for start, stop in runs]
    return prompt.place(_arranged(prompt, counts, side, _canvas))


def downsampled_images(prompt: Prompt) -> Placed:
    """Command A Vision and Aya Vision: text markers stand between the tiles, more of them behind an image."""
    config, counts = prompt.config, []
    for ids, runs in _runs_by_sample(prompt):
        before = None
        for start, stop in runs:
            # One marker is the end of a tile; that of an image is also what stands behind the last one.
            if before is None or (start - before > 1 and ids[before] == ids[runs[-1][1]]):
                counts.append(0)
            counts[-1], before = counts[-1] + 1, stop
    side = config.vision_config.image_size // config.vision_config.patch_size // config.downsample_factor
    return prompt.place(_arranged(prompt, counts, side, _canvas))


def _arranged(
    prompt: Prompt,
    counts: Sequence[int],
    side: int,
    arrange: Callable[[Any, Size], tuple[int, int]],
    whole_first: bool = False,
) -> list[VisionLayout]:
    """Layouts of images of as many tiles of ``side`` x ``side`` tokens as the prompt holds.

    A tile alone is the whole image. Where nobody told how several are arranged, every region is whole (``tiled_check``), and
    each tile is taken for a view of its own.

    Args:
        arrange: (processor, size) -> rows and columns of tiles. whole_first: the view of the whole precedes its tiles.
    Raises:
        ValueError: the processor cuts images of these sizes otherwise.
    """
    layouts, whole = [], VisionLayout.grid(side, side)
    for count, size in zip(counts, prompt.sizes(len(counts)), strict=True):
        if count <= 1 or prompt.processor is None or size is None:
            layouts.append(stack_views([whole] * count) if count > 1 else whole)
            continue
        rows, columns = arrange(prompt.processor, size)
        if rows * columns + 1 != count:
            raise ValueError(
                f"patch: an image of {size[0]} x {size[1]} pixels must have {rows * columns + 1} tiles by its processor, got "
                f"{count} in the prompt; give the size of the original, and set on the processor itself what it was called "
                "with (max_patches, size, ...)"
            )
        layouts.append(_whole_first(rows, columns, side) if whole_first else tiled_layout(rows, columns, side))
    return layouts


def _canvas(processor: Any, image_size: Size) -> tuple[int, int]:
    """Rows and columns of tiles, by the function of that name in the processor's own file."""
    size, (width, height) = dict(processor.size), image_size
    choose = sys.modules[type(processor).__module__].get_optimal_tiled_canvas
    columns, rows = choose(
        (height, width), (size["height"], size["width"]), processor.min_patches, processor.max_patches
    )
    return rows, columns


def _runs_by_sample(prompt: Prompt) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Of every sample with image tokens: its ids and something behind them, (start, stop) of its runs of image tokens."""
    found = []
    for row in prompt.ids:
        edges = torch.nn.functional.pad((row == prompt.config.image_token_id).int(), (1, 1)).diff()
        starts, stops = (torch.nonzero(edges == edge).flatten().tolist() for edge in (1, -1))
        if starts:
            found.append(([*row.tolist(), -1], list(zip(starts, stops, strict=True))))
    return found


def ovis2_images(prompt: Prompt) -> Placed:
    """Ovis2: the whole image, then its tiles; the markers between them tell how they are arranged."""
    config, vision = prompt.config, prompt.config.vision_config
    size, patch = (int(np.ravel(value)[0]) for value in (vision.image_size, vision.patch_size))
    if size // patch % vision.hidden_stride:
        raise ValueError(
            f"patch: the patches of a tile's side must be a multiple of hidden_stride={vision.hidden_stride}, got "
            f"{size // patch}: its last tokens would lie outside of the image"
        )
    side = size // patch // vision.hidden_stride
    start, whole, column, row, end = config.visual_indicator_token_ids
    layouts, seen = [], []
    for token in prompt.ids.flatten().tolist():
        if token == start:
            seen = []
        elif token in (whole, column, row):
            seen.append(token)
        elif token == end:
            rows = 1 + seen.count(row)
            layouts.append(_whole_first(rows, 1 + seen.count(column) // rows, side))
    return prompt.place(layouts)


def _whole_first(rows: int, columns: int, side: int) -> VisionLayout:
    """The whole image, then its tiles where there are several."""
    whole = VisionLayout.grid(side, side)
    return whole if rows * columns == 1 else stack_views([whole, _tiles(rows, columns, side)])


def perception_images(prompt: Prompt) -> Placed:
    """Perception LM: the whole image, then the tiles of the canvas that fits it best."""
    images, views = prompt.argument("pixel_values").shape[:2]
    side = math.isqrt(int((prompt.ids == prompt.config.image_token_id).sum()) // (images * views))
    return prompt.place(_arranged(prompt, [views] * images, side, _best_fit, whole_first=True))


def _best_fit(processor: Any, image_size: Size) -> tuple[int, int]:
    """Rows and columns of tiles, by the processor's own resizing."""
    width, height = image_size
    nothing = torch.empty(1, 1, height, width, device="meta")  # its size decides
    _, (columns, rows) = processor.resize(nothing, processor.tile_size, processor.max_num_tiles)
    return rows, columns


def idefics3_images(prompt: Prompt) -> Placed:
    """Idefics3 and SmolVLM: the image is stretched to whole tiles; the text between them tells how they are arranged.

    A marker and a tag stand before each tile, a line end behind each row of tiles; the whole image comes last, with a tag of
    its own and the marker behind it, too.
    """
    vision = prompt.config.vision_config
    side, layouts = vision.image_size // vision.patch_size // prompt.config.scale_factor, []
    for ids, runs in _runs_by_sample(prompt):
        marker, tiles, rows = ids[runs[-1][1]], 0, 0
        tags = [_since(marker, ids[:start]) for start, _ in runs]
        for tag, (_, stop) in zip(tags, runs, strict=True):
            if tag != tags[-1]:
                tiles, rows = tiles + 1, rows + (ids[stop] != marker)
                continue
            layouts.append(tiled_layout(rows, tiles // max(rows, 1), side))
            tiles = rows = 0
    return prompt.place(layouts)


def _since(marker: int, ids: list[int]) -> list[int]:
    """What stands behind the last marker."""
    return list(itertools.takewhile(lambda token: token != marker, reversed(ids)))
