"""Equal tiles, each encoded alone, and a view of the whole."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.models.family import Placed, Prompt, Size, stack_views


def tiled_check(config: Any, processor: Any, sizes: Sequence[Size] | None, whole: bool) -> None:
    """A region can only be found among tiles whose arrangement is known."""
    if not whole:
        _need(config, processor, sizes)


def _need(config: Any, processor: Any, sizes: Any) -> None:
    """How many tiles an image has, and where, follows from the processor and the size of the original."""
    if processor is None or sizes is None:
        name = "processor" if processor is None else "image_size"
        raise ValueError(
            f"patch: {name} must be given for {config.model_type!r}, because it decides into which tiles an image is "
            "cut, got None"
        )


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
    return _unmarked(prompt, round(size // patch * prompt.config.downsample_ratio))


def got_images(prompt: Prompt) -> Placed:
    """GOT-OCR 2 and PP-Chart2Table: as InternVL, with tokens of 4 x 4 patches."""
    vision = prompt.config.vision_config
    return _unmarked(prompt, vision.image_size // vision.patch_size // 4)


def _unmarked(prompt: Prompt, side: int) -> Placed:
    """All tiles of an image, ``side`` x ``side`` tokens each, stand in one run."""
    counts = _runs(prompt.ids == prompt.config.image_token_id)
    layouts = []
    for count, image_size in zip(counts, prompt.sizes(len(counts)), strict=True):
        rows = columns = 1
        if count != side * side:
            _need(prompt.config, prompt.processor, image_size)
            rows, columns = _canvas(prompt.processor, image_size)
        layouts.append(tiled_layout(rows, columns, side))
    return prompt.place(layouts)


def _canvas(processor: Any, image_size: Size) -> tuple[int, int]:
    """Rows and columns of tiles, by the function of that name in the processor's own file."""
    if not processor.crop_to_patches:
        return 1, 1
    size, (width, height) = dict(processor.size), image_size
    choose = sys.modules[type(processor).__module__].get_optimal_tiled_canvas
    columns, rows = choose(
        (height, width), (size["height"], size["width"]), processor.min_patches, processor.max_patches
    )
    return rows, columns


def downsampled_images(prompt: Prompt) -> Placed:
    """Command A Vision and Aya Vision: text markers stand between the tiles, and between these and the whole."""
    config, sizes = prompt.config, prompt.image_sizes
    _need(config, prompt.processor, sizes)
    side = config.vision_config.image_size // config.vision_config.patch_size // config.downsample_factor
    return prompt.place([tiled_layout(*_canvas(prompt.processor, size), side) for size in sizes])


def _runs(is_image: Tensor) -> list[int]:
    """Lengths of the runs of True along the rows, in reading order."""
    edges = torch.nn.functional.pad(is_image.int(), (1, 1)).diff().flatten()
    return (torch.nonzero(edges < 0) - torch.nonzero(edges > 0)).flatten().tolist()


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
    layouts, whole = [], VisionLayout.grid(side, side)
    for size in prompt.sizes(images):
        if views == 1:
            layouts.append(whole)
            continue
        _need(prompt.config, prompt.processor, size)
        processor, (width, height) = prompt.processor, size
        nothing = torch.empty(1, 1, height, width, device="meta")  # its size decides
        _, (columns, rows) = processor.resize(nothing, processor.tile_size, processor.max_num_tiles)
        layouts.append(stack_views([whole, _tiles(rows, columns, side, side)]))
    return prompt.place(layouts)


def idefics3_images(prompt: Prompt) -> Placed:
    """Idefics3 and SmolVLM: the image is stretched to whole tiles; text markers stand between the tiles."""
    config, sizes = prompt.config, prompt.image_sizes
    _need(config, prompt.processor, sizes)
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // config.scale_factor
    return prompt.place([tiled_layout(*_split(config.model_type, prompt.processor, size), side) for size in sizes])


def _split(family: str, processor: Any, image_size: Size) -> tuple[int, int]:
    """Rows and columns of tiles, by the processor's own steps on an image without pixels."""
    if not processor.do_image_splitting:
        return 1, 1
    from transformers.image_utils import SizeDict

    steps, (width, height) = _steps(family), image_size
    longest = dict(processor.max_image_size)["longest_edge"]
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    if processor.do_resize:
        image = steps.resize(image, SizeDict(**dict(processor.size)))
    image = steps.resize_for_vision_encoder(image, longest)
    _, rows, columns = steps.split_images(image, {"longest_edge": longest})
    return rows, columns


@functools.cache
def _steps(family: str) -> Any:
    """The family's image processor, with a resize that only tells the size."""
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    (name,) = (name for name in vars(module) if name.endswith("ImageProcessorPil"))
    original = getattr(module, name)

    class WithoutPixels(original.__bases__[0]):
        def resize(self, image: np.ndarray, size: Any, **_: Any) -> np.ndarray:
            return np.broadcast_to(np.uint8(0), (3, size.height, size.width))

    return type("Steps", (original, WithoutPixels), {})()


def lfm2_images(prompt: Prompt) -> Placed:
    """LFM2-VL: tiles of a large image, then the whole; a small one in its own shape. Text markers stand between."""
    config, processor, sizes = prompt.config, prompt.processor, prompt.image_sizes
    _need(config, processor, sizes)
    shapes = (torch.as_tensor(prompt.argument("spatial_shapes")) // config.downsample_factor).tolist()
    layouts: list[VisionLayout] = []
    for width, height in sizes:
        rows, columns = _lfm2_canvas(processor, width, height)
        tiles, shapes = shapes[: rows * columns], shapes[rows * columns :]
        if len(tiles) == 1:
            layouts.append(VisionLayout.grid(*tiles[0]))
            continue
        views = [_tiles(rows, columns, *tiles[0])]
        if processor.use_thumbnail:
            views.append(VisionLayout.grid(*shapes.pop(0)))
        layouts.append(stack_views(views))
    return prompt.place(layouts)


def _lfm2_canvas(processor: Any, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tiles, by the processor's own steps on an image without pixels."""
    names = inspect.signature(processor.resize_and_split).parameters
    given = {name: getattr(processor, name) for name in names if name != "images"}
    if not processor.do_image_splitting:
        given |= dict(min_tiles=1, max_tiles=1)
    nothing = torch.empty(1, 1, height, width, device="meta")
    _, (rows,), (columns,), _ = processor.resize_and_split(nothing, **given)
    return rows, columns


def minicpm_images(prompt: Prompt) -> Placed:
    """MiniCPM-V and MiniCPM-OCR: the whole in its own shape, then its slices. Text markers stand between."""
    processor, sizes = prompt.processor, prompt.image_sizes
    _need(prompt.config, processor, sizes)
    merge = 2 if (prompt.arguments.get("downsample_mode") or prompt.config.downsample_mode) == "4x" else 4
    shapes = (torch.as_tensor(prompt.argument("target_sizes")) // merge).tolist()
    layouts: list[VisionLayout] = []
    for width, height in sizes:
        canvas = (processor.max_slice_nums, processor.scale_resolution)
        rows, columns = (processor.slice_mode and processor.get_sliced_grid((height, width), *canvas)) or (0, 0)
        whole, slices, shapes = shapes[:1], shapes[1 : 1 + rows * columns], shapes[1 + rows * columns :]
        views = [VisionLayout.grid(*shape) for shape in whole]
        if all(shape == slices[0] for shape in slices):
            views += [_tiles(rows, columns, *slices[0])] if slices else []
        else:  # resized one by one
            for number, shape in enumerate(slices):
                row, column = divmod(number, columns)
                box = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
                views.append(VisionLayout.grid(*shape, box=box))
        layouts.append(stack_views(views))
    return prompt.place(layouts)


def docling_images(prompt: Prompt) -> Placed:
    """Granite-Docling: tiles, then the whole; four times as many tokens where the caller asked for the fine path."""
    config, processor, sizes = prompt.config, prompt.processor, prompt.image_sizes
    _need(config, processor, sizes)
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // vision.scale_factor
    side *= 1 if prompt.arguments.get("tile_fine_mask") is None else 2
    return prompt.place([tiled_layout(*processor.get_tile_grid(height, width), side) for width, height in sizes])
