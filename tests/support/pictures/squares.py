"""One square grid per picture."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.support.pictures.colours import coordinates, patch_colours

SIDE = {"height": 112, "width": 112}


CLIP = CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size=SIDE)


def see_square(config: Any, processor: Any, patch: int) -> Any:
    """Gemma 3 averages patches, which is what a mean over a larger patch does."""

    def see(size: tuple[int, int]) -> tuple:
        out = processor(coordinates(*size), return_tensors="pt")
        return config, processor, out, patch_colours(out["pixel_values"], processor, patch).flatten(0, 2), 0

    return see


def see_patches(config: Any, kind: str, processor: Any) -> Any:
    vision = dict(image_size=112, patch_size=14, model_type=f"{kind}_vision_model")
    return see_square(config(vision_config=vision), processor, 14)


CASES = {
    "fast_vlm": see_square(transformers.FastVlmConfig(image_seq_length=64), CLIP, 14),
    "gemma3": see_square(
        transformers.Gemma3Config(vision_config=dict(image_size=112, patch_size=7), mm_tokens_per_image=64),
        Gemma3ImageProcessorPil(size=SIDE),
        14,
    ),
    "llava": see_patches(transformers.LlavaConfig, "clip", CLIP),
    "paligemma": see_patches(transformers.PaliGemmaConfig, "siglip", SiglipImageProcessorPil(size=SIDE)),
    "vipllava": see_patches(transformers.VipLlavaConfig, "clip", CLIP),
}
