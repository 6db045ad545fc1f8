"""Tiny models with one square grid per picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.support.families.entry import (
    HIDDEN,
    IMAGE,
    INIT,
    MASKS,
    PATCH,
    TEXT,
    TOWER,
    VISION_END,
    VISION_START,
    Family,
    Image,
    pixels,
)

LLAVA_GRID = (8, 8)
LLAVA_SIDE = LLAVA_GRID[0] * PATCH


def llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=LLAVA_SIDE),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )


def llava_processor() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": LLAVA_SIDE}, crop_size={"height": LLAVA_SIDE, "width": LLAVA_SIDE}
    )


def vipllava() -> Any:
    return transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=LLAVA_SIDE),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, 1],
    )


def fast_vlm() -> Any:
    """A convolutional tower of transformers in the place of timm's, which may be missing."""
    vision = transformers.ConvNextConfig(patch_size=PATCH, num_stages=1, hidden_sizes=[16], depths=[1])
    vision.hidden_size = 16
    return transformers.FastVlmConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**TEXT, tie_word_embeddings=False),
        image_token_index=IMAGE,
        image_seq_length=LLAVA_GRID[0] * LLAVA_GRID[1],
    )


def gemma3() -> Any:
    """Sliding and full layers in turn, on either side of a cut; the window is shorter than the prompts."""
    text = TEXT | dict(head_dim=8, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=20,
                       query_pre_attn_scalar=8, tie_word_embeddings=False)  # fmt: skip
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=48, vision_use_head=False),
        mm_tokens_per_image=36,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )


def paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT, head_dim=8, tie_word_embeddings=False),
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=24, vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        tie_word_embeddings=False,
    )


def square_image(side: int, marked: bool) -> Callable[[tuple[int, int], int, bool], Image]:
    """A fixed number of tokens whatever the size of the picture."""

    def image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
        ids = (IMAGE,) * (side // (2 if marked else 1)) ** 2
        pictures = {"pixel_values": pixels(1, 3, side * PATCH, side * PATCH, seed=seed)}
        return Image((VISION_START, *ids, VISION_END) if marked else ids, pictures, size)

    return image


def janus_processor() -> Any:
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    return JanusImageProcessorPil(size={"height": 24, "width": 24})


def janus() -> Any:
    vision = dict(TOWER, image_size=24, mlp_ratio=1.5, projection_dim=HIDDEN)
    table = dict(base_channels=32, channel_multiplier=[1], num_res_blocks=1, latent_channels=32, num_embeddings=8,
                 projection_dim=HIDDEN, image_token_embed_dim=HIDDEN, num_patches=4)  # fmt: skip
    return transformers.JanusConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.JanusVisionConfig(**vision),
        vq_config=transformers.JanusVQVAEConfig(**table),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def deepseek_vl() -> Any:
    return transformers.DeepseekVLConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=24, vision_use_head=False),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def deepseek_vl_hybrid() -> Any:
    high = transformers.SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, mlp_dim=24, image_size=64,
        patch_size=PATCH, window_size=2, global_attn_indexes=[1], initializer_range=INIT,
    )  # fmt: skip
    return transformers.DeepseekVLHybridConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=24, vision_use_head=False),
        high_res_vision_config=high,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def hybrid_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """The same picture twice, for either tower."""
    image = square_image(6, False)(size, seed, alone)
    return Image(image.ids, image.arguments | {"high_res_pixel_values": pixels(1, 3, 64, 64, seed=seed)}, size)


FAMILIES = {
    "llava": Family(
        "LLaVA-1.5 (CLIP or SigLIP tower)",
        "LlavaForConditionalGeneration",
        llava,
        square_image(8, False),
        processor=llava_processor,
        tower_attention=True,
        thorough=True,
        fast=True,
    ),
    "vipllava": Family(
        "ViP-LLaVA",
        "VipLlavaForConditionalGeneration",
        vipllava,
        square_image(8, False),
        processor=llava_processor,
    ),
    "fast_vlm": Family(
        "FastVLM",
        "FastVlmForConditionalGeneration",
        fast_vlm,
        square_image(8, False),
        processor=llava_processor,
    ),
    "gemma3": Family(
        "Gemma 3: sliding windows, images see themselves",
        "Gemma3ForConditionalGeneration",
        gemma3,
        square_image(12, True),
        types=lambda ids: {"token_type_ids": (ids == IMAGE).int()},
        mask="image",
        cuts=(2,),
        refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'gemma3'"},
        fast=True,
    ),
    "paligemma": Family(
        "PaliGemma: prompts see themselves",
        "PaliGemmaForConditionalGeneration",
        paligemma,
        square_image(6, False),
        types=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
        mask="prefix",
        first_position=1,
        refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'paligemma'"},
    ),
    "janus": Family(
        "Janus",
        "JanusForConditionalGeneration",
        janus,
        square_image(6, False),
        processor=janus_processor,
        tower="vision_model",
        beside=(
            "vqmodel",
            "generation_embeddings",
            "generation_aligner",
            "generation_head",
        ),
    ),
    "deepseek_vl": Family(
        "DeepSeek-VL",
        "DeepseekVLForConditionalGeneration",
        deepseek_vl,
        square_image(6, False),
        processor=janus_processor,
        tower="vision_model",
    ),
    "deepseek_vl_hybrid": Family(
        "DeepSeek-VL-7B",
        "DeepseekVLHybridForConditionalGeneration",
        deepseek_vl_hybrid,
        hybrid_image,
        processor=janus_processor,
        tower="vision_model",
        beside=(
            "high_res_vision_model",
            "high_res_vision_neck",
            "high_res_vision_proj",
        ),
    ),
}
