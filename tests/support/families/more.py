"""Tiny models of further families whose token grid follows the size of the picture, or is one square."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import PIL.Image
import torch
import transformers
from torch import Tensor

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
)
from tests.support.families.grids import (
    GLM_MARKERS,
    GLM_TOWER,
    STATES,
    hybrid_text,
    patches_image,
    qwen2_5_vl,
    vision_types,
)
from tests.support.families.squares import square_image
from tests.support.families.tiles import (
    ANYRES,
    SIDE,
    anyres_image,
    internvl_image,
    internvl_processor,
    repeats_tiles,
    tiles_padded,
)


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
    text = transformers.HyperCLOVAXConfig(**TEXT, head_dim=8, attention_multiplier=0.2)
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


def kimi_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Its patches are single pictures, (channels, height, width) each."""
    image = patches_image(size, seed)
    patches = image.arguments["pixel_values"][:, : 3 * PATCH * PATCH].reshape(-1, 3, PATCH, PATCH)
    return Image(image.ids, image.arguments | {"pixel_values": patches}, size)


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


def lfm2_vl() -> Any:
    """Short convolutions and full attention in turn."""
    kinds = ["conv", "full_attention"] * 2
    return transformers.Lfm2VlConfig(
        vision_config=transformers.Siglip2VisionConfig(**TOWER, num_patches=64, vision_use_head=False),
        text_config=transformers.Lfm2Config(**TEXT, layer_types=kinds, block_auto_adjust_ff_dim=False),
        image_token_id=IMAGE,
        downsample_factor=2,
        projector_hidden_size=24,
        tie_word_embeddings=False,
    )


def hunyuan_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Placeholders alone: a begin, rows with a newline each, an end."""
    rows, columns = size[1] // (2 * PATCH), size[0] // (2 * PATCH)
    arguments = {
        "pixel_values": pixels(4 * rows * columns, 3 * PATCH * PATCH, seed=seed),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }
    return Image((IMAGE,) * (rows * (columns + 1) + 2), arguments, size)


def lfm2_processor() -> Any:
    """What the family reads of its processor, which needs torchvision: two tiles beside or above each other."""

    def resize_and_split(images: Any) -> tuple:
        height, width = images.shape[-2:]
        rows, columns = (1, 2) if width > height else (2, 1)
        return None, [rows], [columns], None

    return SimpleNamespace(
        do_resize=True, do_image_splitting=True, use_thumbnail=True, resize_and_split=resize_and_split
    )


def lfm2_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Two tiles of 4 x 4 tokens with a marker before each, then the whole in its own shape."""
    whole = (2, 3) if size[0] > size[1] else (3, 2)
    shapes = torch.tensor([[8, 8], [8, 8], [2 * side for side in whole]])
    tile = (MARK, *[IMAGE] * 16)
    seen = torch.arange(64)[None] < shapes.prod(-1)[:, None]
    arguments = {
        "pixel_values": pixels(3, 64, 3 * PATCH * PATCH, seed=seed),
        "spatial_shapes": shapes,
        "pixel_attention_mask": seen.int(),
    }
    return Image((VISION_START, *tile, *tile, 95, *[IMAGE] * 6, VISION_END), arguments, size)


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


def got_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    tiles = got_processor().get_number_of_image_patches(size[1], size[0])
    return Image(
        (VISION_START, *[IMAGE] * (16 * tiles), VISION_END), {"pixel_values": pixels(tiles, 3, 64, 64, seed=seed)}, size
    )


def got_processor() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}, crop_to_patches=True, max_patches=3)


def pp_chart2table() -> Any:
    return transformers.PPChart2TableConfig(**got_ocr2().to_dict() | {"model_type": "pp_chart2table"})


def qianfan_ocr() -> Any:
    vision = {key: value for key, value in TOWER.items() if key != "patch_size"}
    return transformers.QianfanOCRConfig(
        vision_config=transformers.QianfanOCRVisionConfig(
            **vision, image_size=[32, 32], patch_size=[4, 4], drop_path_rate=0.0
        ),
        text_config=transformers.Qwen3Config(**TEXT, head_dim=8),
        image_token_id=IMAGE,
        image_seq_length=16,
    )


def llava_next_video() -> Any:
    return transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=SIDE),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=ANYRES,
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


def minicpm_text() -> Any:
    return transformers.Qwen3_5TextConfig(**hybrid_text(), tie_word_embeddings=False)


def minicpm(name: str, **more: Any) -> Callable[[], Any]:
    """A tiny model of transformers' class of that name; patches are merged four by four."""

    def config() -> Any:
        vision = dict(TOWER, image_size=32, window_kernel_size=(2, 2))
        vision.pop("initializer_range")
        return getattr(transformers, f"{name}Config")(
            text_config=minicpm_text(), vision_config=vision, insert_layer_id=0, downsample_mode="16x",
            image_token_id=IMAGE, video_token_id=VIDEO, tie_word_embeddings=False, **more,
        )  # fmt: skip

    return config


def minicpm_processor() -> Any:
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    return MiniCPMV4_6ImageProcessorPil(max_slice_nums=2, scale_resolution=24, patch_size=PATCH)


def minicpm_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """The whole, then two slices beside or above each other; all between markers, and a line end between rows."""
    out = minicpm_processor()(PIL.Image.new("RGB", size), return_tensors="pt")
    counts = (out["target_sizes"].prod(-1) // 16).tolist()
    ids = [VISION_START, *[IMAGE] * counts[0], VISION_END]
    for number, count in enumerate(counts[1:]):
        ids += [82] * (number > 0 and size[0] < size[1]) + [MARK, *[IMAGE] * count, 95]
    patches = pixels(*out["pixel_values"].shape, seed=seed)
    return Image(tuple(ids), {"pixel_values": patches, "target_sizes": out["target_sizes"]}, size)


def packed(images: list[list[Image]]) -> dict[str, Tensor]:
    """The patches of all images beside each other."""
    flat = [image.arguments for row in images for image in row]
    return {
        "pixel_values": torch.cat([arguments["pixel_values"] for arguments in flat], -1),
        "target_sizes": torch.cat([arguments["target_sizes"] for arguments in flat]),
    }


def granite_docling() -> Any:
    vision = transformers.GraniteDoclingVisionConfig(
        **TOWER, image_size=32, out_hidden_size=HIDDEN, scale_factor=2, deepstack_visual_indexes=[0, 1],
        use_fine_route=False,
    )  # fmt: skip
    text = transformers.GraniteDoclingTextConfig(
        **TEXT, embedding_multiplier=2.0, logits_scaling=1.0, residual_multiplier=0.5, attention_multiplier=0.3,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.GraniteDoclingConfig(text_config=text, vision_config=vision, image_token_id=IMAGE,
                                             pad_token_id=0, tie_word_embeddings=False)  # fmt: skip


def docling_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Two tiles, beside each other or one above the other, and the whole; a marker and a tag before each, a line end per row."""
    first, second, whole = ((VISION_START, tag, *[IMAGE] * 16) for tag in (MARK, 95, 82))
    end = (84,)
    tiles = (*first, *second, *end) if size[0] > size[1] else (*first, *end, *second, *end)
    return Image((*tiles, *end, *whole, VISION_START), {"pixel_values": pixels(1, 3, 3, 32, 32, seed=seed)}, size)


def docling_tiles(images: list[list[Image]]) -> dict[str, Tensor]:
    """A row of tiles per sample, one without images among them."""
    counts = [sum(image.arguments["pixel_values"].shape[1] for image in row) for row in images]
    full = torch.zeros(len(images), max(counts), 3, 32, 32)
    for place, row in zip(full, images, strict=True):
        if row:
            tiles = torch.cat([image.arguments["pixel_values"][0] for image in row])
            place[: len(tiles)] = tiles
    return {
        "pixel_values": full,
        "pixel_attention_mask": torch.arange(max(counts))[None] < torch.tensor(counts)[:, None],
    }


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
        beside=("vqmodel", "generation_embeddings", "generation_aligner", "generation_head",),
    ),
    "kimi_k25": Family(
        "Kimi K2.5 and K2.6, images: latent attention", "Kimi_K25ForConditionalGeneration", kimi_k25, kimi_image,
    ),
    "qwen2_5_omni": Family(
        "Qwen2.5-Omni thinker, images", "Qwen2_5OmniThinkerForConditionalGeneration", qwen2_5_omni, patches_image,
        tower="visual", beside=("audio_tower",),
    ),
    "qwen3_omni_moe": Family(
        "Qwen3-Omni thinker, images, DeepStack", "Qwen3OmniMoeThinkerForConditionalGeneration", qwen3_omni_moe,
        patches_image, tower="visual", beside=("audio_tower",),
    ),
    "hunyuan_vl": Family(
        "HunYuan-OCR", "HunYuanVLForConditionalGeneration", hunyuan_vl, hunyuan_image, types=vision_types,
        refuses={"compact": "positions must be 'original' for videos and for images with text among their tokens"},
    ),
    "lfm2_vl": Family(
        "LFM2-VL: tiles", "Lfm2VlForConditionalGeneration", lfm2_vl, lfm2_image, sizes=((48, 24), (20, 40)),
        processor=lfm2_processor, cuts=(2,), refuses=STATES,
    ),
    "lfm3_vl": Family(
        "LFM3-VL, images: sliding windows", "Lfm3VlForConditionalGeneration", lfm3_vl, patches_image, cuts=(2,),
        refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'lfm3_vl'"},
    ),
    "got_ocr2": Family(
        "GOT-OCR 2: tiles", "GotOcr2ForConditionalGeneration", got_ocr2, got_image, sizes=((140, 60), (40, 60)),
        processor=got_processor,
    ),
    "pp_chart2table": Family(
        "PP-Chart2Table", "GotOcr2ForConditionalGeneration", pp_chart2table, got_image, sizes=((64, 60), (40, 60)),
        processor=got_processor,
    ),
    "qianfan_ocr": Family(
        "Qianfan-OCR: tiles", "QianfanOCRForConditionalGeneration", qianfan_ocr, internvl_image,
        sizes=((70, 30), (20, 30)), processor=internvl_processor, unable={"repeat": repeats_tiles},
    ),
    "llava_next_video": Family(
        "LLaVA-NeXT-Video, images: tiles, unpadding, newlines", "LlavaNextVideoForConditionalGeneration",
        llava_next_video, anyres_image(llava_next_video, always=True), sizes=((44, 10), (10, 44)), join=tiles_padded,
        beside=("vision_resampler",),
    ),
    "deepseek_vl_hybrid": Family(
        "DeepSeek-VL 7B", "DeepseekVLHybridForConditionalGeneration", deepseek_vl_hybrid, hybrid_image,
        processor=janus_processor, tower="vision_model",
        beside=("high_res_vision_model", "high_res_vision_neck", "high_res_vision_proj",),
    ),
    "granite_docling": Family(
        "Granite-Docling: tiles, DeepStack", "GraniteDoclingForConditionalGeneration", granite_docling, docling_image,
        sizes=((48, 24), (20, 40)), join=docling_tiles, tower="vision_model",
        decoder="text_model",
    ),
    "minicpmv4_6": Family(
        "MiniCPM-V 4.6, images: tiles", "MiniCPMV4_6ForConditionalGeneration", minicpm("MiniCPMV4_6"), minicpm_image,
        sizes=((48, 24), (20, 40)), join=packed, cuts=(2,), refuses=STATES,
    ),
    "minicpmv4_7": Family(
        "MiniCPM-V 4.7, images: tiles", "MiniCPMV4_7ForConditionalGeneration",
        minicpm("MiniCPMV4_7", image_start_id=VISION_START, image_end_id=VISION_END, slice_start_id=MARK,
                slice_end_id=95, newline_id=82),
        minicpm_image, types=vision_types, sizes=((48, 24), (20, 40)), join=packed, cuts=(2,), refuses=STATES,
    ),
    "minicpm_ocr": Family(
        "MiniCPM-OCR, images: tiles", "MiniCPMOcrForConditionalGeneration", minicpm("MiniCPMOcr"), minicpm_image,
        sizes=((48, 24), (20, 40)), join=packed, cuts=(2,), refuses=STATES,
    ),
}  # fmt: skip
