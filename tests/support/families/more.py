"""Tiny models of further families whose token grid follows the size of the picture, or is one square."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.support.families.entry import (
    HIDDEN,
    IMAGE,
    INIT,
    MARKERS,
    MASKS,
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
)
from tests.support.families.grids import GLM_MARKERS, GLM_TOWER, film, patches_image, qwen2_5_vl, vision_types
from tests.support.families.squares import square_image


def exaone4_5() -> Any:
    """Sliding and full layers in turn, on either side of a cut; the window is shorter than the prompts."""
    vision = dict(QWEN_TOWER, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, window_size=4 * 2 * PATCH,
                  fullatt_block_indexes=[1], num_key_value_heads=1)  # fmt: skip
    kinds = ["sliding_attention", "full_attention"] * 2
    text = transformers.Exaone4Config(**TEXT, head_dim=8, layer_types=kinds, sliding_window=20)
    return transformers.Exaone4_5_Config(text_config=text, vision_config=vision, image_token_id=IMAGE,
                                         video_token_id=VIDEO)  # fmt: skip


def cosmos3_omni() -> Any:
    vision = dict(QWEN_TOWER, depth=3, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN,
                  num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])  # fmt: skip
    text, vision = transformers.Qwen3VLTextConfig(**MROPE, head_dim=8), transformers.Qwen3VLVisionConfig(**vision)
    return transformers.Cosmos3OmniConfig(text_config=text, vision_config=vision, **MARKERS)


def cosmos3_edge() -> Any:
    vision = dict(TOWER, num_patches=64, spatial_merge_size=2)
    text = dict(MROPE, head_dim=8)
    return transformers.Cosmos3EdgeConfig(text_config=text, vision_config=vision, projector_hidden_size=24, **MARKERS)


def edge_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Its patches are of one picture each."""
    image = patches_image(size, seed)
    return Image(image.ids, image.arguments | {"pixel_values": image.arguments["pixel_values"][:, ::2]}, size)


def cohere_compass() -> Any:
    vision = dict(QWEN_TOWER, depth=3, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN,
                  num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])  # fmt: skip
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])
    text = dict(TEXT, rope_parameters={"sliding_attention": rope, "full_attention": None}, sliding_window=20,
                layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=False)  # fmt: skip
    return transformers.CohereCompassConfig(text_config=text, vision_config=vision, **MARKERS)


def video_llama_3() -> Any:
    return transformers.VideoLlama3Config(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=transformers.VideoLlama3VisionConfig(**TOWER),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def llama3_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Every patch of an image is a token."""
    rows, columns = size[1] // PATCH, size[0] // PATCH
    arguments = {
        "pixel_values": pixels(rows * columns, 3 * PATCH * PATCH, seed=seed),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
        "image_merge_sizes": torch.tensor([1]),
    }
    return Image((IMAGE,) * (rows * columns), arguments, size)


def hyperclovax_vision_v2() -> Any:
    text = transformers.HyperCLOVAXConfig(**TEXT, head_dim=8, residual_multiplier=0.5)
    return transformers.HyperCLOVAXVisionV2Config(
        text_config=text, vision_config=qwen2_5_vl().vision_config, image_token_id=IMAGE, video_token_id=VIDEO,
        tie_word_embeddings=False,
    )  # fmt: skip


def glmga() -> Any:
    text, vision = transformers.Glm4vTextConfig(**MROPE), transformers.Glm4vVisionConfig(**GLM_TOWER)
    return transformers.GlmgaConfig(text_config=text, vision_config=vision, **GLM_MARKERS)


def got_ocr2() -> Any:
    vision = transformers.GotOcr2VisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, mlp_dim=24, image_size=64,
        patch_size=PATCH, window_size=2, global_attn_indexes=[1], initializer_range=INIT,
    )  # fmt: skip
    text = transformers.Qwen2Config(**TEXT)
    return transformers.GotOcr2Config(text_config=text, vision_config=vision, image_token_index=IMAGE,
                                      tie_word_embeddings=False)  # fmt: skip


def deepseek_vl() -> Any:
    return transformers.DeepseekVLConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=24, vision_use_head=False),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


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


FAMILIES = {
    "exaone4_5": Family(
        "EXAONE 4.5, images: sliding windows", "Exaone4_5_ForConditionalGeneration", exaone4_5, patches_image,
        tower="visual", cuts=(2,), refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'exaone4_5'"},
    ),
    "cosmos3_omni": Family(
        "Cosmos 3, images, DeepStack", "Cosmos3OmniForConditionalGeneration", cosmos3_omni, patches_image,
        types=vision_types, tower="visual",
    ),
    "cosmos3_edge": Family(
        "Cosmos 3 Edge, images", "Cosmos3EdgeForConditionalGeneration", cosmos3_edge, edge_image, types=vision_types,
        tower="visual",
    ),
    "cohere_compass": Family(
        "North Micro Vision, images, DeepStack: sliding windows", "CohereCompassForConditionalGeneration",
        cohere_compass, patches_image, types=vision_types, tower="visual", cuts=(2,),
        refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'cohere_compass'"},
    ),
    "video_llama_3": Family(
        "VideoLLaMA 3, images", "VideoLlama3ForConditionalGeneration", video_llama_3, llama3_image,
        sizes=((24, 16), (16, 20)), tower="vision_model",
    ),
    "hyperclovax_vision_v2": Family(
        "HyperCLOVA X SEED Think, images", "HyperCLOVAXVisionV2ForConditionalGeneration", hyperclovax_vision_v2,
        patches_image, tower="vision_model",
    ),
    "glmga": Family(
        "GLM-GA", "Glm46VForConditionalGeneration", glmga, patches_image, types=vision_types, tower="visual",
    ),
    "deepseek_vl": Family(
        "DeepSeek-VL", "DeepseekVLForConditionalGeneration", deepseek_vl, square_image(6, False),
        processor=janus_processor, tower="vision_model",
    ),
    "janus": Family(
        "Janus", "JanusForConditionalGeneration", janus, square_image(6, False), processor=janus_processor,
        tower="vision_model",
    ),
}  # fmt: skip
