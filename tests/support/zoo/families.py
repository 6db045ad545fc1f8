"""The families that the contract runs over and that README lists."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

from crop.models import ADAPTERS
from tests.support import tiny_models
from tests.support.tiny_models import IMAGE, PATCH

from .entry import Family
from .grids import (
    film,
    glm4v,
    mistral3,
    padded,
    patches_image,
    pixtral,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    rows_image,
    vision_types,
)
from .squares import gemma3, llava, llava_processor, paligemma, square_image
from .tiles import (
    anyres_image,
    idefics3,
    idefics3_image,
    idefics3_processor,
    images_per_sample,
    internvl,
    internvl_image,
    internvl_processor,
    llava_next,
    llava_onevision,
    smolvlm,
    tiles_counted,
    tiles_padded,
)

FAMILIES: dict[str, Family] = {
    "llava": Family(
        "LLaVA-1.5 (CLIP or SigLIP tower)", "LlavaForConditionalGeneration", llava, square_image(6, False),
        processor=llava_processor,
    ),
    "pixtral": Family(
        "Pixtral", "LlavaForConditionalGeneration", pixtral, rows_image(PATCH), sizes=((24, 16), (16, 20)), join=padded
    ),
    "llava_next": Family(
        "LLaVA-NeXT: tiles, unpadding, newlines", "LlavaNextForConditionalGeneration", llava_next,
        anyres_image(llava_next), sizes=((44, 10), (10, 44)), join=tiles_padded,
    ),
    "llava_onevision": Family(
        "LLaVA-OneVision, images", "LlavaOnevisionForConditionalGeneration", llava_onevision,
        anyres_image(llava_onevision), sizes=((52, 20), (14, 30)), join=tiles_counted,
    ),
    "qwen2_vl": Family(
        "Qwen2-VL, images", "Qwen2VLForConditionalGeneration", qwen2_vl, patches_image, types=vision_types
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL, images", "Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, patches_image, types=vision_types
    ),
    "qwen2_5_vl_video": Family(
        "Qwen2.5-VL, video", "Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, film(False), types=vision_types
    ),
    "qwen3_vl": Family(
        "Qwen3-VL, images, DeepStack", "Qwen3VLForConditionalGeneration", qwen3_vl, patches_image, types=vision_types
    ),
    "qwen3_vl_video": Family(
        "Qwen3-VL, video, DeepStack", "Qwen3VLForConditionalGeneration", qwen3_vl, film(True), types=vision_types
    ),
    "glm4v": Family("GLM-4V, images", "Glm4vForConditionalGeneration", glm4v, patches_image, types=vision_types),
    "internvl": Family(
        "InternVL 2.5 and 3: tiles", "InternVLForConditionalGeneration", internvl, internvl_image,
        sizes=((70, 30), (20, 30)), processor=internvl_processor,
    ),
    "idefics3": Family(
        "Idefics3: tiles", "Idefics3ForConditionalGeneration", idefics3, idefics3_image, sizes=((48, 24), (20, 40)),
        join=images_per_sample, processor=idefics3_processor,
    ),
    "smolvlm": Family(
        "SmolVLM, images: tiles", "SmolVLMForConditionalGeneration", smolvlm, idefics3_image,
        sizes=((48, 24), (20, 40)), join=images_per_sample, processor=idefics3_processor,
    ),
    "mistral3": Family(
        "Mistral 3", "Mistral3ForConditionalGeneration", mistral3, rows_image(2 * PATCH), join=padded
    ),
    "gemma3": Family(
        "Gemma 3: sliding windows, images see themselves", "Gemma3ForConditionalGeneration", gemma3,
        square_image(12, True), attentions=("eager", "sdpa"),
        types=lambda ids: {"token_type_ids": (ids == IMAGE).int()},
    ),
    "paligemma": Family(
        "PaliGemma: prompts see themselves", "PaliGemmaForConditionalGeneration", paligemma, square_image(6, False),
        attentions=("eager", "sdpa"), types=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
    ),
}  # fmt: skip


@functools.cache
def get_config(name: str) -> Any:
    return FAMILIES[name].config()


def build_model(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A tiny random model; equal seeds give equal weights whatever the attention.

    The vision tower, which the patch leaves alone, stays eager: under flash attention the Pixtral tower of
    transformers 5.17 mixes the images of a batch.
    """
    torch.manual_seed(seed)
    family = FAMILIES[name]
    model = tiny_models.sharpen(getattr(transformers, family.classes)(family.config()), attention)
    tiny_models.set_attention(ADAPTERS[model.config.model_type].vision_tower(model.model), "eager")
    return model
