"""Tiny models of further families that cut a picture into tiles."""

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
    PATCH,
    TEXT,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    Image,
    before,
    pixels,
)
from tests.support.families.grids import STATES, hybrid_text, vision_types
from tests.support.families.tiles import (
    ANYRES,
    SIDE,
    anyres_image,
    internvl_image,
    internvl_processor,
    repeats_tiles,
    tiles_padded,
)


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


def got_ocr2() -> Any:
    vision = transformers.GotOcr2VisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, mlp_dim=24, image_size=64,
        patch_size=PATCH, window_size=2, global_attn_indexes=[1], initializer_range=INIT,
    )  # fmt: skip
    text = transformers.Qwen2Config(**TEXT)
    return transformers.GotOcr2Config(text_config=text, vision_config=vision, image_token_index=IMAGE,
                                      tie_word_embeddings=False)  # fmt: skip


def got_processor() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}, crop_to_patches=True, max_patches=3)


def got_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    tiles = got_processor().get_number_of_image_patches(size[1], size[0])
    return Image(
        (VISION_START, *[IMAGE] * (16 * tiles), VISION_END), {"pixel_values": pixels(tiles, 3, 64, 64, seed=seed)}, size
    )


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


def minicpm(name: str, **more: Any) -> Callable[[], Any]:
    """A tiny model of transformers' class of that name; patches are merged four by four."""

    def config() -> Any:
        vision = dict(TOWER, image_size=32, window_kernel_size=(2, 2))
        vision.pop("initializer_range")
        return getattr(transformers, f"{name}Config")(
            text_config=transformers.Qwen3_5TextConfig(**hybrid_text(), tie_word_embeddings=False), vision_config=vision, insert_layer_id=0, downsample_mode="16x",
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
    "lfm2_vl": Family(
        "LFM2-VL: tiles", "Lfm2VlForConditionalGeneration", lfm2_vl, lfm2_image, sizes=((48, 24), (20, 40)),
        processor=lfm2_processor, cuts=(2,), refuses=STATES, unable={"repeat": repeats_tiles, "projector": before("5.24", "it is called for every tile")},
    ),
    "got_ocr2": Family(
        "GOT-OCR 2: tiles", "GotOcr2ForConditionalGeneration", got_ocr2, got_image, sizes=((140, 60), (40, 60)),
        processor=got_processor, unable={"repeat": repeats_tiles},
    ),
    "pp_chart2table": Family(
        "PP-Chart2Table", "GotOcr2ForConditionalGeneration", pp_chart2table, got_image, sizes=((64, 60), (40, 60)),
        processor=got_processor, unable={"repeat": repeats_tiles},
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
    "granite_docling": Family(
        "Granite-Docling: tiles, DeepStack", "GraniteDoclingForConditionalGeneration", granite_docling, docling_image,
        sizes=((48, 24), (20, 40)), join=docling_tiles, tower="vision_model",
        decoder="text_model",
    ),
    "minicpmv4_6": Family(
        "MiniCPM-V 4.6, images: tiles", "MiniCPMV4_6ForConditionalGeneration", minicpm("MiniCPMV4_6"), minicpm_image,
        sizes=((48, 24), (20, 40)), join=packed, cuts=(2,), refuses=STATES, since="5.24",
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
