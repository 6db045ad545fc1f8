"""Tiny models of Gemma 4: sliding and full layers of different heads, with or without what the small checkpoints add."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.support.families.entry import (
    IMAGE,
    INIT,
    MASKS,
    PATCH,
    TEXT,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    Image,
    before,
    pixels,
    text_tokens,
)
from tests.support.families.grids import vision_types

MARKERS = dict(image_token_id=IMAGE, video_token_id=VIDEO, boi_token_id=VISION_START, eoi_token_id=VISION_END,
               audio_token_id=87, boa_token_id=88, eoa_token_index=89, tie_word_embeddings=False)  # fmt: skip
HEADS = dict(TEXT, head_dim=8, global_head_dim=16, sliding_window=20, tie_word_embeddings=False)
SMALL = dict(HEADS, head_dim=4, global_head_dim=8, num_hidden_layers=7, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
             + ["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, use_double_wide_mlp=True,
             hidden_size_per_layer_input=16, vocab_size_per_layer_input=TEXT["vocab_size"])  # fmt: skip
LARGE = dict(HEADS, layer_types=["sliding_attention", "full_attention"] * 2, attention_k_eq_v=True,
             num_global_key_value_heads=1, use_bidirectional_attention="vision")  # fmt: skip
EXPERTS = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24)
SIZES = ((64, 48), (40, 56))
MOST = 48  # tokens that a picture is padded to


def encoded(text: dict[str, Any]) -> Callable[[], Any]:
    """With a vision tower, which averages 2 x 2 patches."""

    def config() -> Any:
        vision = transformers.Gemma4VisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=8, patch_size=PATCH, pooling_kernel_size=2, position_embedding_size=32, initializer_range=INIT,
        )  # fmt: skip
        text_config = transformers.Gemma4TextConfig(**text)
        return transformers.Gemma4Config(text_config=text_config, vision_config=vision, audio_config=None, **MARKERS)

    return config


def large(**more: Any) -> dict[str, Any]:
    return dict(LARGE, hidden_size_per_layer_input=0, **more)


def unified() -> Any:
    """Without a tower: pixels of 2 x 2 patches are projected."""
    vision = transformers.Gemma4UnifiedVisionConfig(
        patch_size=PATCH, pooling_kernel_size=2, mm_embed_dim=16, mm_posemb_size=32, output_proj_dims=16
    )
    text = transformers.Gemma4UnifiedTextConfig(**LARGE)
    return transformers.Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config=None, **MARKERS)


def frames(size: tuple[int, int], count: int, merge: int, seed: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Tokens of a picture; patches (count, most, pixels) and their (column, row), padded.

    ``merge``: patches beside each other that the model makes one token of.
    """
    rows, columns = (side // (2 * PATCH) for side in size[::-1])
    tokens, most, side = rows * columns, MOST * merge**2, 2 * PATCH // merge
    row, column = torch.meshgrid(torch.arange(rows * merge), torch.arange(columns * merge), indexing="ij")
    place = torch.full((count, most, 2), -1)
    place[:, : tokens * merge**2] = torch.stack([column, row], -1).flatten(0, 1)
    return tokens, pixels(count, most, 3 * side * side, seed=seed) * (place[..., :1] >= 0), place


def positioned(merge: int, video: bool = False) -> Callable[[tuple[int, int], int, bool], Image]:
    """Pictures with the places of their patches; ``video``: wide ones become two frames, with a time before each."""

    def image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
        if not video or size[0] < size[1]:
            tokens, patches, place = frames(size, 1, merge, seed)
            arguments = {"pixel_values": patches, "image_position_ids": place}
            return Image((VISION_START, *[IMAGE] * tokens, VISION_END), arguments, size)
        tokens, patches, place = frames((size[0] // 2, size[1] // 2), 2, merge, seed)
        arguments = {"pixel_values_videos": patches, "video_position_ids": place,
                     "num_frames_per_video": torch.tensor([2])}  # fmt: skip
        if "num_frames_per_video" not in inspect.signature(transformers.Gemma4Model.get_video_features).parameters:
            arguments = {"pixel_values_videos": patches[None], "video_position_ids": place[None]}
        shots = [(*text_tokens(3, seed + n), VISION_START, *[VIDEO] * tokens, VISION_END) for n in range(2)]
        return Image(shots[0] + shots[1], arguments, size)

    return image


def family(title: str, config: Callable[[], Any], image: Any, mask: Any = "image in windows", **more: Any) -> Family:
    kind, name = ("gemma4_unified", "Gemma4Unified") if config is unified else ("gemma4", "Gemma4")
    refuses = MASKS | {"flash_attention_2": f"must be eager or sdpa for '{kind}'"}
    return Family(f"Gemma 4{title}", f"{name}ForConditionalGeneration", config, image, sizes=SIZES, types=vision_types,
                  mask=mask, cuts=(2,), refuses=refuses, **more)  # fmt: skip


FAMILIES = {
    "gemma4": family(": 26B-A4B, experts, images see themselves", encoded(large(**EXPERTS)), positioned(2),
                     fast=True),
    "gemma4_video": family(": 31B, video", encoded(large()), positioned(2, video=True)),
    "gemma4_small": family(": E2B and E4B, inputs per layer, shared keys", encoded(SMALL), positioned(2), "causal",
                           unable={"devices": before("5.24", "layers hand each other keys in a dictionary of one device")}),
    "gemma4_unified": family(" 12B: no vision tower", unified, positioned(1), "image beyond windows",
                             tower="embed_vision"),
}  # fmt: skip
