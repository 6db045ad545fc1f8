"""One grid per image, which follows its size; no tiles."""

from __future__ import annotations

import itertools

import torch

from crop.geometry.layout import NEWLINE, VisionLayout
from crop.models.family import Placed, Prompt, stack_views


def merged_images(prompt: Prompt) -> Placed:
    """Qwen2-VL and its kin: ``image_grid_thw`` counts patches, which are merged squarewise into tokens.

    A video is one entry: each frame that the encoder makes of it (of two pictures) is a view of its own.
    """
    found: Placed = []
    for kind in ("image", "video"):
        token_id = getattr(prompt.config, f"{kind}_token_id")
        if not (prompt.ids == token_id).any():
            continue
        layouts = []
        merge = prompt.config.vision_config.spatial_merge_size
        for frames, height, width in prompt.argument(f"{kind}_grid_thw").tolist():
            if kind == "image" and frames != 1:
                raise ValueError(f"patch: image_grid_thw must have one frame per image, got {frames}")
            frame = VisionLayout.grid(height // merge, width // merge)
            layouts.append(stack_views([frame] * frames))
        found += prompt.place(layouts, token_id)
    return sorted(found, key=lambda entry: (entry[0], int(entry[1].position[0])))


def gemma4_images(prompt: Prompt) -> Placed:
    """Gemma 4: ``image_position_ids`` are (column, row) of each patch, or of each token where the picture has no encoder.

    Square neighbours are averaged into one token. A video is one entry, each of its frames a view of its own.
    """
    vision, found = prompt.config.vision_config, []
    merge = 1 if vision.model_type == "gemma4_unified_vision" else vision.pooling_kernel_size
    for kind in ("image", "video"):
        token_id = getattr(prompt.config, f"{kind}_token_id")
        if not (prompt.ids == token_id).any():
            continue
        last = torch.as_tensor(prompt.argument(f"{kind}_position_ids")).amax(1)  # padding is -1
        frames = [VisionLayout.grid((row + 1) // merge, (column + 1) // merge) for column, row in last.tolist()]
        counts = [1] * len(frames)
        if kind == "video":
            counts = torch.as_tensor(prompt.argument("num_frames_per_video")).tolist()
        left = iter(frames)
        found += prompt.place([stack_views(list(itertools.islice(left, count))) for count in counts], token_id)
    return sorted(found, key=lambda entry: (entry[0], int(entry[1].position[0])))


def pixtral_images(prompt: Prompt) -> Placed:
    """Pixtral, Mistral 3, LightOnOCR: ``image_sizes`` holds the resized images, of which whole tokens are seen.

    A break token stands between two rows, but in LightOnOCR.
    """
    config = prompt.config
    side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    sizes = torch.as_tensor(prompt.argument("image_sizes")).tolist()
    grids = [(height // side, width // side, height, width) for height, width in sizes]
    found = prompt.place(
        [
            VisionLayout.grid(rows, columns, box=(0.0, 0.0, columns * side / width, rows * side / height))
            for rows, columns, height, width in grids
        ]
    )
    return [(sample, _with_breaks(layout)) for sample, layout in found]


def _with_breaks(layout: VisionLayout) -> VisionLayout:
    """Add the single tokens that stand between the rows of a grid: they go with the row that they end."""
    _, rows, columns = layout.extent
    last = torch.arange(1, rows) * columns - 1
    last = last[layout.position[last + 1] - layout.position[last] == 2]
    if len(last) == 0:
        return layout
    position, order = torch.cat([layout.position, layout.position[last] + 1]).sort()
    center = layout.center[last]
    center[:, 0] += 1 / columns
    return VisionLayout(
        position=position,
        center=torch.cat([layout.center, center])[order],
        row=torch.cat([layout.row, layout.row[last]])[order],
        col=torch.cat([layout.col, layout.col[last] + 1])[order],
        view=torch.cat([layout.view, layout.view[last]])[order],
        kind=torch.cat([layout.kind, torch.full_like(layout.kind[last], NEWLINE)])[order],
        num_original=len(position),
    )
