"""One grid per image, which follows its size; no tiles."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from crop.geometry.layout import VisionLayout
from crop.models.family import Placed, Prompt, Size, need_picture, stack_views
from crop.models.newlines import markers, with_breaks, with_newlines


def merged_images(prompt: Prompt) -> Placed:
    """Qwen2-VL and its kin: ``image_grid_thw`` counts patches, which are merged squarewise into tokens.

    A video is one entry: each frame that the encoder makes of it (of two pictures) is a view of its own.
    """
    found: Placed = []
    for kind in ("image", "video"):
        token_id = getattr(prompt.config, f"{kind}_token_id")
        if (prompt.ids == token_id).any():
            found += prompt.place(_merged(prompt, kind), token_id)
    return sorted(found, key=lambda entry: (entry[0], int(entry[1].position[0])))


def glm_images(prompt: Prompt) -> Placed:
    """GLM-4V and its kin: as Qwen2-VL, but image tokens stand for the frames of a video, too; a prompt has one or the other."""
    return prompt.place(_merged(prompt, "image" if prompt.arguments.get("video_grid_thw") is None else "video"))


def _merged(prompt: Prompt, kind: str) -> list[VisionLayout]:
    """Grids of the images or the videos of a prompt, with a view per frame."""
    grids, merges = prompt.argument(f"{kind}_grid_thw"), prompt.arguments.get(f"{kind}_merge_sizes")
    if merges is None:
        vision = prompt.config.vision_config
        merge = getattr(vision, "spatial_merge_size", None) or vision.merge_kernel_size[0]  # the latter in Kimi K2.5
        merges = [merge] * len(grids)
    layouts = []
    for (frames, height, width), merge in zip(grids.tolist(), map(int, merges), strict=True):
        if kind == "image" and frames != 1:
            raise ValueError(f"patch: image_grid_thw must have one frame per image, got {frames}")
        layouts.append(stack_views([VisionLayout.grid(height // merge, width // merge)] * frames))
    return layouts


def kimi_images(prompt: Prompt) -> Placed:
    """Kimi K2.5: as Qwen2-VL, with padding at the right and the bottom, which the processor's own function tells."""
    layouts = _merged(prompt, "image")
    for number, size in enumerate(prompt.sizes(len(layouts))):
        if prompt.processor is None or size is None:
            continue  # every region is whole
        processor, (width, height) = prompt.processor, size
        (shown_h, shown_w), (full_h, full_w) = sys.modules[type(processor).__module__].navit_resize(
            height=height,
            width=width,
            patch_size=processor.patch_size,
            merge_kernel_size=processor.merge_size,
            max_patches=processor.max_patches,
            max_size_per_side=dict(processor.size)["max_height"],
        )
        _, rows, columns = layouts[number].extent
        layouts[number] = VisionLayout.grid(rows, columns, box=(0.0, 0.0, full_w / shown_w, full_h / shown_h))
    return prompt.place(layouts)


def kimi_check(config: Any, processor: Any, sizes: Sequence[Size] | None, whole: bool) -> None:
    """Where the picture ends among the tokens follows from the processor and the size."""
    if not whole:
        need_picture(config, processor, sizes, "how far an image is padded")


def hunyuan_images(prompt: Prompt) -> Placed:
    """HunYuan-VL: as Qwen2-VL, with a newline behind every row, and a marker before and behind the image."""
    framed = []
    for layout in _merged(prompt, "image"):
        _, rows, columns = layout.extent
        framed.append(stack_views([markers(1), with_newlines(layout.center, rows, columns, range(rows)), markers(1)]))
    return prompt.place(framed)


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
        places = torch.as_tensor(prompt.argument(f"{kind}_position_ids"))  # (..., most patches, 2), padding is -1
        last = places.flatten(0, -3).amax(1).tolist()
        frames = iter([VisionLayout.grid((row + 1) // merge, (column + 1) // merge) for column, row in last])
        counts = [1] * len(last)
        if kind == "video" and places.dim() == 4:  # older transformers: as many frames in every video
            counts = [places.shape[1]] * len(places)
        elif kind == "video":
            counts = torch.as_tensor(prompt.argument("num_frames_per_video")).tolist()
        found += prompt.place([stack_views(list(itertools.islice(frames, count))) for count in counts], token_id)
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
    return [(sample, with_breaks(layout)) for sample, layout in found]
