"""The families, by model type; the one table that knows a family by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from crop.models.anyres import next_images, onevision_images
from crop.models.family import ModelFamily
from crop.models.fixed import gemma3_images, llava_check, llava_images, paligemma_images
from crop.models.grids import merged_images, pixtral_images
from crop.models.tiles import idefics3_images, internvl_images, tiled_check

# Arguments that have one row per image.
GRIDS, PIXELS, SIZES = ("image_grid_thw", "video_grid_thw"), ("pixel_values",), ("image_sizes",)

ADAPTERS: dict[str, ModelFamily] = {
    adapter.model_type: adapter
    for adapter in (
        ModelFamily("gemma3", gemma3_images, PIXELS, makes_masks=True),
        ModelFamily("glm4v", merged_images, GRIDS, tower="visual"),
        ModelFamily("idefics3", idefics3_images, check=tiled_check, tower="vision_model", decoder="text_model"),
        ModelFamily("internvl", internvl_images, check=tiled_check),
        ModelFamily("llava", llava_images, PIXELS, check=llava_check),
        ModelFamily("llava_next", next_images, SIZES),
        ModelFamily("llava_onevision", onevision_images, SIZES),
        ModelFamily("mistral3", pixtral_images, SIZES),
        ModelFamily("paligemma", paligemma_images, PIXELS, makes_masks=True, two_way=True),
        ModelFamily("qwen2_vl", merged_images, GRIDS, tower="visual", videos=True),
        ModelFamily("qwen2_5_vl", merged_images, GRIDS, tower="visual", videos=True),
        ModelFamily("qwen3_vl", merged_images, GRIDS, tower="visual", videos=True, adds_again="_deepstack_process"),
        ModelFamily("smolvlm", idefics3_images, check=tiled_check, tower="vision_model", decoder="text_model"),
    )
}


def family_of(model: Any) -> ModelFamily:
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
        "a new family needs one ModelFamily in crop/models (README, 'Adding a family')"
    )
