"""Equal tiles, each encoded alone, and a view of the whole."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from crop.geometry.layout import VisionLayout
from crop.models.family import Placed, Prompt, Size, need_picture, stack_views


def tiled_check(config: Any, processor: Any, sizes: Sequence[Size] | None, whole: bool) -> None:
    """A region can only be found among tiles whose arrangement is known: it follows from the processor and the size."""
    if not whole:
        need_picture(config, processor, sizes, "into which tiles an image is cut")


def tiled_layout(rows: int, columns: int, side: int) -> VisionLayout:
    """Tiles of ``side`` x ``side`` tokens in reading order, then the whole image; one tile alone is the whole image."""
    whole = VisionLayout.grid(side, side)
    return whole if rows * columns <= 1 else stack_views([_tiles(rows, columns, side, side), whole])


def _tiles(rows: int, columns: int, height: int, width: int) -> VisionLayout:
    """Tiles of ``height`` x ``width`` tokens cover the image without overlap, so they form one grid: a cell may reach over
    their borders."""
    grid = VisionLayout.grid(rows * height, columns * width)
    order = torch.arange(len(grid)).view(rows, height, columns, width).transpose(1, 2).flatten()
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
    """InternVL and Qianfan-OCR: the arrangement of tiles whose aspect ratio is nearest to the image's."""
    vision = prompt.config.vision_config
    size, patch = (np.ravel(value)[0] for value in (vision.image_size, vision.patch_size))
    return _in_one_run(prompt, round(size // patch * prompt.config.downsample_ratio))


def got_images(prompt: Prompt) -> Placed:
    """GOT-OCR 2 and PP-Chart2Table: as InternVL, with tokens of 4 x 4 patches."""
    vision = prompt.config.vision_config
    return _in_one_run(prompt, vision.image_size // vision.patch_size // 4)


def _in_one_run(prompt: Prompt, side: int) -> Placed:
    """All tiles of an image, ``side`` x ``side`` tokens each, stand without a marker between them."""
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
        _refuse_other(size, rows * columns + 1, count)
        layouts.append(_whole_first(rows, columns, side) if whole_first else tiled_layout(rows, columns, side))
    return layouts


def _refuse_other(size: Size, wanted: int, count: int) -> None:
    """ValueError: the prompt holds another number of tiles than the processor cuts an image of this size into."""
    if count != wanted:
        raise ValueError(
            f"patch: an image of {size[0]} x {size[1]} pixels must have {wanted} tiles by its processor, got "
            f"{count} in the prompt; give the size of the original, and set on the processor itself what it was called "
            "with (max_patches, size, ...)"
        )


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
    return whole if rows * columns == 1 else stack_views([whole, _tiles(rows, columns, side, side)])


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


def docling_images(prompt: Prompt) -> Placed:
    """Granite-Docling: tiles in rows, a marker and a tag before each, the whole last; a tile alone has the first one's tag.

    There are four times as many tokens where the caller asked for the fine path.
    """
    vision, layouts = prompt.config.vision_config, []
    side = vision.image_size // vision.patch_size // vision.scale_factor
    side *= 1 if prompt.arguments.get("tile_fine_mask") is None else 2
    for image in _images(prompt):
        layouts.append(
            tiled_layout(*_arrangement(image[:-1]), side) if len(image) > 1 else VisionLayout.grid(side, side)
        )
    return prompt.place(layouts)


def minicpm_images(prompt: Prompt) -> Placed:
    """MiniCPM-V and MiniCPM-OCR: the whole, then its slices in rows; each has a shape of its own, and a marker before it."""
    merge = 2 if (prompt.arguments.get("downsample_mode") or prompt.config.downsample_mode) == "4x" else 4
    shapes = iter((torch.as_tensor(prompt.argument("target_sizes")) // merge).tolist())
    layouts = []
    for image in _images(prompt):
        rows, columns = _arrangement(image[1:])
        whole, *slices = itertools.islice(shapes, len(image))
        layouts.append(stack_views([VisionLayout.grid(*whole), *_slices(rows, columns, slices)]))
    return prompt.place(layouts)


def _slices(rows: int, columns: int, shapes: Sequence[Sequence[int]]) -> list[VisionLayout]:
    """One grid of all where they are alike, else a view of each."""
    if shapes and all(shape == shapes[0] for shape in shapes):
        return [_tiles(rows, columns, *shapes[0])]
    boxes = [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]
    return [VisionLayout.grid(*shape, box=box) for shape, box in zip(shapes, boxes, strict=True)]


def _images(prompt: Prompt) -> list[list[tuple[int, int]]]:
    """(start, stop) of the runs of each image: the tag of its first tile is that of the first one of the sample."""
    found = []
    for ids, runs in _runs_by_sample(prompt):
        for start, stop in runs:
            if ids[start - 1] == ids[runs[0][0] - 1]:
                found.append([])
            found[-1].append((start, stop))
    return found


def _arrangement(runs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns of tiles: two tokens stand between tiles, more between rows."""
    if not runs:
        return 0, 0
    rows = 1 + sum(start - stop > 2 for (_, stop), (start, _) in itertools.pairwise(runs))
    return rows, len(runs) // rows


def lfm2_images(prompt: Prompt) -> Placed:
    """LFM2-VL: tiles of a large image, then the whole in its own shape; a small one alone. A tag stands before each tile."""
    shapes = iter((torch.as_tensor(prompt.argument("spatial_shapes")) // prompt.config.downsample_factor).tolist())
    counts: list[int] = []
    for _, runs in _runs_by_sample(prompt):
        for (_, before), (start, stop) in itertools.pairwise([(0, -2), *runs]):
            if start - before > 1:  # what ends an image and what begins the next
                counts.append(0)
            counts[-1] += stop - start
    layouts = []
    for count, size in zip(counts, prompt.sizes(len(counts)), strict=True):
        tiles: list[Sequence[int]] = []
        while sum(map(math.prod, tiles)) < count:
            tiles.append(next(shapes))
        if len(tiles) == 1 or prompt.processor is None or size is None:
            layouts.append(stack_views([VisionLayout.grid(*tile) for tile in tiles]))
            continue
        rows, columns = _lfm2_canvas(prompt.processor, size)
        _refuse_other(size, rows * columns + prompt.processor.use_thumbnail * (rows * columns > 1), len(tiles))
        cut, rest = tiles[: rows * columns], tiles[rows * columns :]
        layouts.append(stack_views([*_slices(rows, columns, cut), *(VisionLayout.grid(*whole) for whole in rest)]))
    return prompt.place(layouts)


def _lfm2_canvas(processor: Any, image_size: Size) -> tuple[int, int]:
    """Rows and columns of tiles, by the processor's own steps on an image without pixels."""
    names, (width, height) = inspect.signature(processor.resize_and_split).parameters, image_size
    given = {name: getattr(processor, name) for name in names if name != "images"}
    _, (rows,), (columns,), _ = processor.resize_and_split(torch.empty(1, 1, height, width, device="meta"), **given)
    return rows, columns
