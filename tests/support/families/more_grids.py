"""Tiny models of further families whose token grid follows the size of the picture."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.support.families.entry import (
    HIDDEN,
    IMAGE,
    INIT,
    MARK,
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
    text_tokens,
)
from tests.support.families.grids import (
    GLM_MARKERS,
    GLM_TOWER,
    film,
    glm46v,
    paddle_image,
    patches_image,
    qwen2_5_vl,
    qwen3_vl,
    vision_types,
)
from tests.support.families.tiles import repeats_tiles


def exaone4_5() -> Any:
    """Sliding and full layers in turn, on either side of a cut; the window is shorter than the prompts."""
    vision = dict(QWEN_TOWER, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, window_size=4 * 2 * PATCH,
                  fullatt_block_indexes=[1], num_key_value_heads=1)  # fmt: skip
    kinds = ["sliding_attention", "full_attention"] * 2
    text = transformers.Exaone4Config(**TEXT, head_dim=8, layer_types=kinds, sliding_window=20)
    return transformers.Exaone4_5_Config(text_config=text, vision_config=vision, image_token_id=IMAGE,
                                         video_token_id=VIDEO)  # fmt: skip


def cosmos3_omni() -> Any:
    config = qwen3_vl()
    return transformers.Cosmos3OmniConfig(text_config=config.text_config, vision_config=config.vision_config, **MARKERS)


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
    text = transformers.HyperCLOVAXConfig(**TEXT, head_dim=8, attention_multiplier=0.2)
    return transformers.HyperCLOVAXVisionV2Config(
        text_config=text, vision_config=qwen2_5_vl().vision_config, image_token_id=IMAGE, video_token_id=VIDEO,
        tie_word_embeddings=False,
    )  # fmt: skip


def glmga() -> Any:
    text, vision = transformers.Glm4vTextConfig(**MROPE), transformers.Glm4vVisionConfig(**GLM_TOWER)
    return transformers.GlmgaConfig(text_config=text, vision_config=vision, **GLM_MARKERS)


class KimiProcessor:
    """What the family reads of its processor, which needs torchvision."""

    do_resize, patch_size, merge_size, max_patches, size = True, PATCH, 2, 64, {"max_height": 64}


def navit_resize(height: int, width: int, **_: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes before and after padding: the tiny pictures are whole tokens."""
    return (height, width), (height, width)


def kimi_k25() -> Any:
    """Multi-head latent attention, then experts."""
    vision = dict(patch_size=PATCH, pos_emb_height=8, pos_emb_width=8, num_attention_heads=2, num_hidden_layers=2,
                  hidden_size=16, intermediate_size=24)  # fmt: skip
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    text = transformers.DeepseekV3Config(
        **text, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8,
    )  # fmt: skip
    return transformers.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=16, tie_word_embeddings=False, **MARKERS
    )


AUDIO = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=8,
             output_dim=HIDDEN)  # fmt: skip
SOUNDS = dict(audio_start_token_id=82, audio_end_token_id=83)


def qwen2_5_omni() -> Any:
    vision = dict(QWEN_TOWER, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, window_size=4 * 2 * PATCH,
                  fullatt_block_indexes=[1])  # fmt: skip
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config=dict(MROPE, tie_word_embeddings=False), vision_config=vision, audio_config=AUDIO, **SOUNDS,
        audio_token_index=84, image_token_index=IMAGE, video_token_index=VIDEO, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )  # fmt: skip


def qwen3_omni_moe() -> Any:
    vision = dict(QWEN_TOWER, depth=3, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN,
                  num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])  # fmt: skip
    text = dict(MROPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    return transformers.Qwen3OmniMoeThinkerConfig(
        text_config=text, vision_config=vision, audio_config=AUDIO | dict(downsample_hidden_size=8), **SOUNDS,
        audio_token_id=84, **MARKERS,
    )  # fmt: skip


def hunyuan_vl() -> Any:
    """The last three of four axes are a token's column, row and image.

    transformers counts images over the batch, so that with frequencies for the last axis no batch equals its samples.
    """
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1, 0])
    vision = dict(TOWER, spatial_merge_size=2, text_hidden_size=HIDDEN, image_size=64, max_image_size=64)
    text = dict(TEXT, rope_parameters=rope, head_dim=8)
    return transformers.HunYuanVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE,
                                        tie_word_embeddings=False)  # fmt: skip


def hunyuan_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Placeholders alone: a begin, rows with a newline each, an end."""
    rows, columns = size[1] // (2 * PATCH), size[0] // (2 * PATCH)
    arguments = {
        "pixel_values": pixels(4 * rows * columns, 3 * PATCH * PATCH, seed=seed),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }
    return Image((IMAGE,) * (rows * (columns + 1) + 2), arguments, size)


def lfm3_vl() -> Any:
    """A short convolution, full attention, and a sliding window shorter than the prompts."""
    kinds = ["conv", "full_attention", "sliding_attention", "full_attention"]
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        patch_size=PATCH, initializer_range=INIT,
    )  # fmt: skip
    return transformers.Lfm3VlConfig(
        vision_config=vision,
        text_config=transformers.Lfm3Config(**TEXT, head_dim=8, layer_types=kinds, sliding_window=20),
        projector_hidden_size=24,
        tie_word_embeddings=False,
        **MARKERS,
    )


def omni_film(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """A video in one run; it has another word for the seconds of a frame."""
    image = film(False)(size, seed, alone)
    if "second_per_grid_ts" in image.arguments:
        image.arguments["video_second_per_grid"] = image.arguments.pop("second_per_grid_ts")
    return image


def glm_film(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Two frames of image tokens, markers around each and a time behind it, all between markers of a video."""
    rows, columns = size[1] // (4 * PATCH), size[0] // (4 * PATCH)
    ids = [95]
    for number in range(2):
        ids += [VISION_START, *[IMAGE] * (rows * columns), VISION_END, *text_tokens(2, seed + number)]
    arguments = {
        "pixel_values_videos": pixels(8 * rows * columns, 6 * PATCH * PATCH, seed=seed),
        "video_grid_thw": torch.tensor([[2, 2 * rows, 2 * columns]]),
    }
    return Image((*ids, MARK), arguments, size)


FAMILIES = {
    "exaone4_5": Family(
        "EXAONE 4.5, images: sliding windows", "Exaone4_5_ForConditionalGeneration", exaone4_5, patches_image,
        tower="visual", cuts=(2,), refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'exaone4_5'"}, unable={"repeat": repeats_tiles},
    ),
    "cosmos3_omni": Family(
        "Cosmos3, images, DeepStack", "Cosmos3OmniForConditionalGeneration", cosmos3_omni, patches_image,
        types=vision_types, tower="visual",
    ),
    "cosmos3_edge": Family(
        "Cosmos3-Edge, images", "Cosmos3EdgeForConditionalGeneration", cosmos3_edge, edge_image, types=vision_types,
        tower="visual",
    ),
    "cohere_compass": Family(
        "North-Micro-Vision, images, DeepStack: sliding windows", "CohereCompassForConditionalGeneration",
        cohere_compass, patches_image, types=vision_types, tower="visual", cuts=(2,),
        refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'cohere_compass'"},
    ),
    "video_llama_3": Family(
        "VideoLLaMA 3, images", "VideoLlama3ForConditionalGeneration", video_llama_3, llama3_image,
        sizes=((24, 16), (16, 20)), tower="vision_model",
    ),
    "hyperclovax_vision_v2": Family(
        "HyperCLOVAX-SEED-Think, images", "HyperCLOVAXVisionV2ForConditionalGeneration", hyperclovax_vision_v2,
        patches_image, tower="vision_model",
    ),
    "glmga": Family(
        "GLM-GA", "Glm46VForConditionalGeneration", glmga, patches_image, types=vision_types, tower="visual",
    ),
    "kimi_k25": Family(
        "Kimi-K2.5 and Kimi-K2.6, images: latent attention", "Kimi_K25ForConditionalGeneration", kimi_k25, paddle_image,
        processor=KimiProcessor, unable={"repeat": repeats_tiles},
    ),
    "qwen2_5_omni": Family(
        "Qwen2.5-Omni, images", "Qwen2_5OmniThinkerForConditionalGeneration", qwen2_5_omni, patches_image,
        tower="visual", beside=("audio_tower",), since="5.24",
    ),
    "qwen3_omni_moe": Family(
        "Qwen3-Omni, images, DeepStack", "Qwen3OmniMoeThinkerForConditionalGeneration", qwen3_omni_moe,
        patches_image, tower="visual", beside=("audio_tower",), since="5.24",
    ),
    "hunyuan_vl": Family(
        "HunYuan-OCR", "HunYuanVLForConditionalGeneration", hunyuan_vl, hunyuan_image, types=vision_types,
        refuses={"compact": "positions must be 'original' for videos and for images with text among their tokens"}, unable={"repeat": repeats_tiles},
    ),
    "lfm3_vl": Family(
        "LFM3-VL, images: sliding windows", "Lfm3VlForConditionalGeneration", lfm3_vl, patches_image, cuts=(2,),
        refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'lfm3_vl'"},
    ),
    "glm46v_video": Family(
        "GLM-4.6V-Flash, video", "Glm46VForConditionalGeneration", glm46v, glm_film, sizes=((48, 32), (32, 48)),
        types=lambda ids: {"mm_token_type_ids": 2 * (ids == IMAGE).int()}, tower="visual",
        unable={"repeat": lambda _: "transformers looks for the frames of a video under another id"},
    ),
    "exaone4_5_video": Family(
        "EXAONE 4.5, video: sliding windows", "Exaone4_5_ForConditionalGeneration", exaone4_5, film(True),
        tower="visual", cuts=(2,), refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'exaone4_5'"}, unable={"repeat": repeats_tiles},
    ),
    "qwen2_5_omni_video": Family(
        "Qwen2.5-Omni, video", "Qwen2_5OmniThinkerForConditionalGeneration", qwen2_5_omni, omni_film,
        tower="visual", beside=("audio_tower",), since="5.24",
    ),
}  # fmt: skip
