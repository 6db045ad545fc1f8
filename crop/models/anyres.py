"""A view of the whole image, then tiles joined to one grid, unpadded, with newlines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crop.geometry.layout import NEWLINE, VisionLayout
from crop.geometry.pieces import Pieces
from crop.models.family import Placed, Prompt, stack_views
from crop.models.fixed import refuse_class_token
from crop.models.newlines import markers, with_newlines


def anyres_images(prompt: Prompt) -> Placed:
    """LLaVA-NeXT and LLaVA-OneVision."""
    refuse_class_token(prompt.config)
    layouts = [
        anyres_layout(prompt.config, size, _most(prompt.config)) if tiled else _square_layout(prompt.config, size)
        for size, tiled in _sizes(prompt)
    ]
    return prompt.place(layouts)


def anyres_pieces(prompt: Prompt, layouts: Sequence[VisionLayout]) -> list[Pieces]:
    """The base view, then the tiles; a token of an interpolated grid may be made of several."""
    found = []
    for (size, tiled), layout in zip(_sizes(prompt), layouts, strict=True):
        tile = torch.full((len(layout), 1), -1)
        tile[(layout.view == 0) & (layout.kind != NEWLINE)] = 0
        count = 1
        if tiled:
            canvas, _ = _canvas_and_shown(prompt.config, size)
            side = prompt.config.vision_config.image_size
            rows, columns = (limit // side for limit in canvas)
            count += rows * columns
            patches = side // prompt.config.vision_config.patch_size
            made_of = torch.eye(rows * columns).view(-1, rows, 1, columns, 1).expand(-1, -1, patches, -1, patches)
            made_of = joined(
                made_of.reshape(-1, rows * patches, columns * patches), size, patches, _most(prompt.config)
            )
            made_of = made_of.flatten(1).T > 0
            most = int(made_of.sum(1).max()) if len(made_of) else 1
            tile = tile.expand(-1, most).clone()
            weight, number = made_of.float().topk(most, dim=1)
            tile[(layout.view == 1) & (layout.kind != NEWLINE)] = torch.where(weight > 0, number + 1, -1)
        overview = torch.zeros(count, dtype=torch.bool)
        overview[0] = True
        found.append(Pieces(tile, overview))
    return found


def _sizes(prompt: Prompt) -> list[tuple[list[int], bool]]:
    """(height, width) of every image, and whether it has tiles: in LLaVA-OneVision one that shares its prompt has none."""
    sizes = torch.as_tensor(prompt.argument("image_sizes")).tolist()
    alone = [True] * len(sizes)
    if prompt.arguments.get("batch_num_images") is not None:
        counts = torch.as_tensor(prompt.arguments["batch_num_images"]).tolist()
        alone = [count == 1 for count in counts for _ in range(count)]
    return list(zip(sizes, alone, strict=True))


def _most(config: Any) -> int | None:
    """Tiles above which LLaVA-OneVision interpolates the joined grid; LLaVA-NeXT never does."""
    ratio = getattr(config, "vision_aspect_ratio", None)
    return None if ratio is None else int(ratio.removeprefix("anyres_max_"))


def _canvas_and_shown(config: Any, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the canvas of tiles, and of the image as it is scaled to fit and centred on it."""
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension

    canvas = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    no_pixels = np.broadcast_to(np.uint8(0), (3, *size))
    return canvas, get_patch_output_size(no_pixels, canvas, ChannelDimension.FIRST)


def joined(values: Tensor, size: Sequence[int], side: int, most: int | None) -> Tensor:
    """What the model makes of the joined tiles: unpadded by its own code, and above ``most`` tiles interpolated.

    Args:
        values: (channels, rows, columns), one per token of the canvas. size: (height, width) of the original.
        side: tokens of a tile's side.
    """
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    values = unpad_image(values, tuple(size))
    if most is not None:
        ratio = math.sqrt(values.shape[1] * values.shape[2] / (most * side**2))
        if ratio > 1.1:
            smaller = [int(values.shape[1] // ratio), int(values.shape[2] // ratio)]
            values = nn.functional.interpolate(values[None], smaller, mode="bilinear")[0]
    return values


def _square_layout(config: Any, size: Sequence[int]) -> VisionLayout:
    """The image, padded to a square, and one newline behind the last row."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    height, width = size
    longest = max(size)
    # Integer halves, as the processor pastes the image.
    x, y = -((longest - width) // 2) / width, -((longest - height) // 2) / height
    center = VisionLayout.grid(side, side, box=(x, y, x + longest / width, y + longest / height)).center
    return with_newlines(center, side, side, [side - 1])


def anyres_layout(config: Any, size: Sequence[int], most: int | None = None) -> VisionLayout:
    """Base view and tiles of one image.

    The tiles' token centres, in pixels of the padded canvas, go through the model's own unpadding (and, above ``most``
    tiles, its interpolation); what comes out is where the tokens look.

    Args:
        config: has ``image_grid_pinpoints`` and ``vision_config``.
        size: (height, width) of the original, pixels.
        most: tiles above which the joined grid is interpolated; None: never.
    """
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    canvas, shown = _canvas_and_shown(config, size)
    pasted = [(limit - length) // 2 for length, limit in zip(shown, canvas, strict=True)]
    rows, columns = (limit // tile * (tile // patch) for limit in canvas)
    y = (torch.arange(rows) + 0.5) * patch
    x = (torch.arange(columns) + 0.5) * patch
    center = torch.stack(torch.meshgrid((y - pasted[0]) / shown[0], (x - pasted[1]) / shown[1], indexing="ij"))
    side = tile // patch
    center = joined(center, size, side, most)
    rows, columns = center.shape[1:]
    views = [VisionLayout.grid(side, side)]
    if rows and columns:
        center = center.flip(0).permute(1, 2, 0).reshape(-1, 2)
        views.append(with_newlines(center, rows, columns, range(rows)))
    elif rows:  # too thin for a token: the rows' newlines are left
        views.append(markers(rows))
    return stack_views(views)
