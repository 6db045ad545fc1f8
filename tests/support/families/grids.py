"""Tiny models whose token grid follows the size of the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.support.families.entry import (
    HIDDEN,
    IMAGE,
    MARK,
    MARKERS,
    MROPE,
    PATCH,
    QWEN_TOWER,
    TEXT,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    Image,
    pixels,
    text_tokens,
)


def patches_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    rows, columns = size[1] // (2 * PATCH), size[0] // (2 * PATCH)
    arguments = {
        "pixel_values": pixels(4 * rows * columns, 6 * PATCH * PATCH, seed=seed),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }
    return Image((VISION_START, *[IMAGE] * (rows * columns), VISION_END), arguments, size)


def film(stamped: bool) -> Callable[[tuple[int, int], int, bool], Image]:
    """Wide pictures become videos of four pictures, two frames to the model; others stay images.

    ``stamped``: a time stands before every frame and markers around it, else they are one run.
    """

    def image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
        if size[0] < size[1]:
            return patches_image(size, seed)
        rows, columns = size[1] // (4 * PATCH), size[0] // (4 * PATCH)
        frame = (VIDEO,) * (rows * columns)
        arguments = {
            "pixel_values_videos": pixels(8 * rows * columns, 6 * PATCH * PATCH, seed=seed),
            "video_grid_thw": torch.tensor([[2, 2 * rows, 2 * columns]]),
        }
        if stamped:
            parts = [(*text_tokens(3, seed + n), VISION_START, *frame, VISION_END) for n in range(2)]
            return Image(parts[0] + parts[1], arguments, size)
        arguments["second_per_grid_ts"] = torch.tensor([1.5])
        return Image((VISION_START, *frame, *frame, VISION_END), arguments, size)

    return image


def vision_types(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def qwen2_vl() -> Any:
    vision = dict(QWEN_TOWER, embed_dim=16, hidden_size=HIDDEN, mlp_ratio=2)
    return transformers.Qwen2VLConfig(text_config=MROPE, vision_config=vision, **MARKERS)


def qwen2_5_vl() -> Any:
    vision = dict(QWEN_TOWER, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, window_size=4 * 2 * PATCH,
                  fullatt_block_indexes=[1])  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=MROPE, vision_config=vision, **MARKERS)


def qwen3_vl() -> Any:
    """Three levels of features are added again, the last behind the cut."""
    vision = dict(QWEN_TOWER, depth=3, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN,
                  num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])  # fmt: skip
    return transformers.Qwen3VLConfig(text_config=dict(MROPE, head_dim=8), vision_config=vision, **MARKERS)


def qwen3_vl_moe() -> Any:
    vision = dict(QWEN_TOWER, depth=3, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN,
                  num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])  # fmt: skip
    text = dict(MROPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **MARKERS)


def hybrid_text() -> dict[str, Any]:
    """Gated DeltaNet and full attention in turn, as every fourth layer of the real ones; a quarter of the head rotates."""
    rope = dict(MROPE["rope_parameters"], partial_rotary_factor=0.25, mrope_section=[2, 1, 1])
    return dict(MROPE, rope_parameters=rope, head_dim=32, layer_types=["linear_attention", "full_attention"] * 2,
                linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
                linear_num_value_heads=4)  # fmt: skip


def qwen3_5() -> Any:
    vision = dict(QWEN_TOWER, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, num_position_embeddings=64)
    return transformers.Qwen3_5Config(text_config=hybrid_text(), vision_config=vision, **MARKERS)


def qwen3_5_moe() -> Any:
    vision = dict(QWEN_TOWER, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, num_position_embeddings=64)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24)
    return transformers.Qwen3_5MoeConfig(text_config=hybrid_text() | experts, vision_config=vision, **MARKERS)


GLM_TOWER = dict(QWEN_TOWER, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, image_size=32)
GLM_MARKERS = dict(image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=VISION_START,
                   image_end_token_id=VISION_END, video_start_token_id=95, video_end_token_id=MARK)  # fmt: skip


def glm4v() -> Any:
    return transformers.Glm4vConfig(text_config=MROPE, vision_config=GLM_TOWER, **GLM_MARKERS)


def glm46v() -> Any:
    text, vision = transformers.Glm4vTextConfig(**MROPE), transformers.Glm4vVisionConfig(**GLM_TOWER)
    return transformers.Glm46VConfig(text_config=text, vision_config=vision, **GLM_MARKERS)


def glm4v_moe() -> Any:
    """One dense layer, then experts of which every token takes two, and one that all share."""
    rope = dict(MROPE["rope_parameters"], partial_rotary_factor=0.5, mrope_section=[1, 1, 0])
    text = dict(MROPE, rope_parameters=rope, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    return transformers.Glm4vMoeConfig(text_config=text, vision_config=GLM_TOWER, **GLM_MARKERS)


def glm_ocr() -> Any:
    return transformers.GlmOcrConfig(text_config=dict(MROPE, head_dim=8), vision_config=GLM_TOWER, **GLM_MARKERS)


def paddleocr_vl() -> Any:
    vision = dict(TOWER, image_size=32, spatial_merge_size=2)
    text = dict(MROPE, head_dim=8, tie_word_embeddings=False)
    return transformers.PaddleOCRVLConfig(text_config=text, vision_config=vision, **MARKERS, tie_word_embeddings=False)


def paddle_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Its patches are single pictures, (channels, height, width) each."""
    image = patches_image(size, seed)
    patches = image.arguments["pixel_values"][:, : 3 * PATCH * PATCH].reshape(-1, 3, PATCH, PATCH)
    return Image(image.ids, image.arguments | {"pixel_values": patches}, size)


def pixtral_tower() -> Any:
    return transformers.PixtralVisionConfig(**TOWER, image_size=64)


def pixtral() -> Any:
    return transformers.LlavaConfig(
        vision_config=pixtral_tower(),
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def mistral3() -> Any:
    return transformers.Mistral3Config(
        vision_config=pixtral_tower(),
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def lighton_ocr() -> Any:
    return transformers.LightOnOcrConfig(
        vision_config=pixtral_tower(),
        text_config=transformers.Qwen3Config(**TEXT, head_dim=8),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def rows_image(side: int) -> Callable[[tuple[int, int], int, bool], Image]:
    """Rows of image tokens with a break between two and an end behind the last."""

    def image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
        rows, columns = size[1] // side, size[0] // side
        ids = ([IMAGE] * columns + [MARK]) * rows
        ids[-1] = VISION_END
        arguments = {
            "pixel_values": pixels(1, 3, size[1], size[0], seed=seed),
            "image_sizes": torch.tensor([size[::-1]]),
        }
        return Image(tuple(ids), arguments, size)

    return image


def unbroken_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Image tokens alone, of 2 x 2 patches each; an odd patch at the right or the bottom goes into none of them."""
    image = rows_image(2 * PATCH)(size, seed, alone)
    return Image(tuple(token for token in image.ids if token == IMAGE), image.arguments, size)


def padded(images: list[list[Image]]) -> dict[str, Tensor]:
    """Pictures of different sizes in one tensor, as Pixtral's processor pads them."""
    flat = [image for row in images for image in row]
    width, height = (max(image.size[axis] for image in flat) for axis in (0, 1))
    full = torch.zeros(len(flat), 3, height, width)
    for place, image in zip(full, flat, strict=True):
        place[:, : image.size[1], : image.size[0]] = image.arguments["pixel_values"][0]
    return {"pixel_values": full, "image_sizes": torch.cat([image.arguments["image_sizes"] for image in flat])}


STATES = {"uniform": "whose layers carry states, needs cache='ragged', got cache='uniform'"}
FAMILIES = {
    "pixtral": Family(
        "Pixtral", "LlavaForConditionalGeneration", pixtral, rows_image(PATCH), sizes=((24, 16), (16, 20)), join=padded
    ),
    "qwen2_vl": Family(
        "Qwen2-VL, images", "Qwen2VLForConditionalGeneration", qwen2_vl, patches_image, types=vision_types,
        tower="visual",
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL, images", "Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, patches_image, types=vision_types,
        sizes=((64, 48), (40, 56)), tower="visual", thorough=True, fast=True,
    ),
    "qwen2_5_vl_video": Family(
        "Qwen2.5-VL, video", "Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, film(False), types=vision_types,
        sizes=((128, 128), (40, 56)), tower="visual",
    ),
    "qwen3_vl": Family(
        "Qwen3-VL, images, DeepStack", "Qwen3VLForConditionalGeneration", qwen3_vl, patches_image, types=vision_types,
        tower="visual", fast=True,
    ),
    "qwen3_vl_video": Family(
        "Qwen3-VL, video, DeepStack", "Qwen3VLForConditionalGeneration", qwen3_vl, film(True), types=vision_types,
        tower="visual",
    ),
    "qwen3_vl_moe": Family(
        "Qwen3-VL MoE, images, DeepStack", "Qwen3VLMoeForConditionalGeneration", qwen3_vl_moe,
        patches_image, types=vision_types, tower="visual",
    ),
    "qwen3_vl_moe_video": Family(
        "Qwen3-VL MoE, video, DeepStack", "Qwen3VLMoeForConditionalGeneration", qwen3_vl_moe,
        film(True), types=vision_types, tower="visual",
    ),
    "qwen3_5": Family(
        "Qwen3.5 and 3.6, images", "Qwen3_5ForConditionalGeneration", qwen3_5, patches_image, types=vision_types,
        tower="visual", cuts=(2,), refuses=STATES,
    ),
    "qwen3_5_video": Family(
        "Qwen3.5 and 3.6, video", "Qwen3_5ForConditionalGeneration", qwen3_5, film(True), types=vision_types,
        tower="visual", cuts=(2,), refuses=STATES,
    ),
    "qwen3_5_moe": Family(
        "Qwen3.5 and 3.6 MoE, images", "Qwen3_5MoeForConditionalGeneration", qwen3_5_moe, patches_image, types=vision_types,
        tower="visual", cuts=(2,), refuses=STATES,
    ),
    "glm4v": Family(
        "GLM-4V, images", "Glm4vForConditionalGeneration", glm4v, patches_image, types=vision_types, tower="visual"
    ),
    "glm46v": Family(
        "GLM-4.6V-Flash, images", "Glm46VForConditionalGeneration", glm46v, patches_image, types=vision_types,
        tower="visual",
    ),
    "glm4v_moe": Family(
        "GLM-4.5V and GLM-4.6V, images", "Glm4vMoeForConditionalGeneration", glm4v_moe, patches_image,
        types=vision_types, tower="visual",
    ),
    "glm_ocr": Family(
        "GLM-OCR, images", "GlmOcrForConditionalGeneration", glm_ocr, patches_image, types=vision_types, tower="visual"
    ),
    "paddleocr_vl": Family(
        "PaddleOCR-VL", "PaddleOCRVLForConditionalGeneration", paddleocr_vl, paddle_image, types=vision_types,
        tower="visual",
    ),
    "mistral3": Family(
        "Mistral 3", "Mistral3ForConditionalGeneration", mistral3, rows_image(2 * PATCH), join=padded
    ),
    "lighton_ocr": Family(
        "LightOnOCR", "LightOnOcrForConditionalGeneration", lighton_ocr, unbroken_image, sizes=((52, 32), (24, 44)),
        join=padded, tower="vision_encoder",
    ),
}  # fmt: skip
