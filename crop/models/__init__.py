"""What differs between model families: where the vision tokens are, and where in the image each one looks.

This package is the only place that knows a family by name. A family is one :class:`Adapter` in ``ADAPTERS``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter import Adapter, Placed, Prompt
from .anyres import next_images, onevision_images
from .fixed import gemma3_images, llava_check, llava_images, paligemma_images, resize_crop_pad_view
from .grids import merged_images, pixtral_images
from .tiles import idefics3_images, internvl_images, tiled_check

__all__ = ["ADAPTERS", "Adapter", "Placed", "Prompt", "adapter_for", "resize_crop_pad_view"]

# Arguments that have one row per image.
GRIDS, PIXELS, SIZES = ("image_grid_thw", "video_grid_thw"), ("pixel_values",), ("image_sizes",)

ADAPTERS: dict[str, Adapter] = {
    adapter.model_type: adapter
    for adapter in (
        Adapter("gemma3", gemma3_images, PIXELS, makes_masks=True),
        Adapter("glm4v", merged_images, GRIDS, tower="visual"),
        Adapter("idefics3", idefics3_images, check=tiled_check, tower="vision_model", decoder="text_model"),
        Adapter("internvl", internvl_images, check=tiled_check),
        Adapter("llava", llava_images, PIXELS, check=llava_check),
        Adapter("llava_next", next_images, SIZES),
        Adapter("llava_onevision", onevision_images, SIZES),
        Adapter("mistral3", pixtral_images, SIZES),
        Adapter("paligemma", paligemma_images, PIXELS, makes_masks=True, two_way=True),
        Adapter("qwen2_vl", merged_images, GRIDS, tower="visual", videos=True),
        Adapter("qwen2_5_vl", merged_images, GRIDS, tower="visual", videos=True),
        Adapter("qwen3_vl", merged_images, GRIDS, tower="visual", videos=True, adds_again="_deepstack_process"),
        Adapter("smolvlm", idefics3_images, check=tiled_check, tower="vision_model", decoder="text_model"),
    )
}


def adapter_for(model: Any) -> Adapter:
    """The adapter of a model.

    Raises:
        TypeError: not a Hugging Face model. ValueError: no vision, or a family without an adapter.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or model_type is None:
        raise TypeError(f"patch: model must be a Hugging Face vision-language model, got {type(model).__name__}")
    if model_type in ADAPTERS:
        return ADAPTERS[model_type]
    known = ", ".join(sorted(ADAPTERS))
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"patch: model must have a vision tower, got model_type {model_type!r} without vision_config; "
            f"supported families: {known}"
        )
    raise ValueError(
        f"patch: model_type must be one of {known}, got {model_type!r}; "
        "a new family needs one Adapter in crop/models (README, 'Adding a family')"
    )
