"""A view of the whole image, then tiles joined to one grid, unpadded, with newlines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from crop.geometry.layout import VisionLayout
from crop.models.family import Placed, Prompt, stack_views
from crop.models.fixed import refuse_class_token
from crop.models.newlines import markers, with_newlines


def next_images(prompt: Prompt) -> Placed:
    """LLaVA-NeXT: every image has tiles."""
    refuse_class_token(prompt.config)
    sizes = torch.as_tensor(prompt.argument("image_sizes")).tolist()
    return prompt.place([tiled_layout(prompt.config, size) for size in sizes])


def onevision_images(prompt: Prompt) -> Placed:
    """LLaVA-OneVision: an image that shares its prompt with others has no tiles (``batch_num_images``)."""
    refuse_class_token(prompt.config)
    sizes = torch.as_tensor(prompt.argument("image_sizes")).tolist()
    alone = [True] * len(sizes)
    if prompt.arguments.get("batch_num_images") is not None:
        counts = torch.as_tensor(prompt.arguments["batch_num_images"]).tolist()
        alone = [count == 1 for count in counts for _ in range(count)]
    most = int(prompt.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    layouts = [
        tiled_layout(prompt.config, size, most) if tiled else _square_layout(prompt.config, size)
        for size, tiled in zip(sizes, alone, strict=True)
    ]
    return prompt.place(layouts)


def _square_layout(config: Any, size: Sequence[int]) -> VisionLayout:
    """The image, padded to a square, and one newline behind the last row."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    height, width = size
    longest = max(size)
    # Integer halves, as the processor pastes the image.
    x, y = -((longest - width) // 2) / width, -((longest - height) // 2) / height
    center = VisionLayout.grid(side, side, box=(x, y, x + longest / width, y + longest / height)).center
    return with_newlines(center, side, side, [side - 1])


def tiled_layout(config: Any, size: Sequence[int], most: int | None = None) -> VisionLayout:
    """Base view and tiles of one image.

    The tiles' token centres, in pixels of the padded canvas, go through the model's own unpadding (and, above ``most``
    tiles, its interpolation); what comes out is where the tokens look.

    Args:
        config: has ``image_grid_pinpoints`` and ``vision_config``.
        size: (height, width) of the original, pixels.
        most: tiles above which the joined grid is interpolated; None: never.
    """
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    canvas = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    # The image is scaled to fit the canvas and centred on it.
    no_pixels = np.broadcast_to(np.uint8(0), (3, *size))
    shown = get_patch_output_size(no_pixels, canvas, ChannelDimension.FIRST)
    pasted = [(limit - side) // 2 for side, limit in zip(shown, canvas, strict=True)]
    rows, columns = (limit // tile * (tile // patch) for limit in canvas)
    y = (torch.arange(rows) + 0.5) * patch
    x = (torch.arange(columns) + 0.5) * patch
    center = torch.stack(torch.meshgrid((y - pasted[0]) / shown[0], (x - pasted[1]) / shown[1], indexing="ij"))
    center = unpad_image(center, tuple(size))
    side = tile // patch
    if most is not None:
        ratio = math.sqrt(center.shape[1] * center.shape[2] / (most * side**2))
        if ratio > 1.1:
            smaller = [int(center.shape[1] // ratio), int(center.shape[2] // ratio)]
            center = nn.functional.interpolate(center[None], smaller, mode="bilinear")[0]
    rows, columns = center.shape[1:]
    views = [VisionLayout.grid(side, side)]
    if rows and columns:
        center = center.flip(0).permute(1, 2, 0).reshape(-1, 2)
        views.append(with_newlines(center, rows, columns, range(rows)))
    elif rows:  # too thin for a token: the rows' newlines are left
        views.append(markers(rows))
    return stack_views(views)
