"""Tiny models that cut a picture into tiles."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.llava_next import modeling_llava_next as llava_next_code

from tests.support.families.entry import (
    HIDDEN,
    IMAGE,
    MARK,
    MASKS,
    PATCH,
    TEXT,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Family,
    Image,
    pixels,
)

SIDE = 4 * PATCH  # of a tile, pixels
ANYRES = [[SIDE * rows, SIDE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]


def llava_next() -> Any:
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=SIDE),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=ANYRES,
    )


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=SIDE, vision_use_head=False),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=ANYRES,
        vision_aspect_ratio="anyres_max_2",  # so that three tiles are interpolated
    )


def anyres_image(config: Callable[[], Any], always: bool) -> Callable[[tuple[int, int], int, bool], Image]:
    """As many tiles and tokens as the model itself expects; `always`: also where a sample has several images."""

    def image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
        base = getattr(transformers, type(config()).__name__.replace("Config", "Model"))
        tiles = 1
        if alone or always:
            pinpoints = config().image_grid_pinpoints
            tiles = llava_next_code.image_size_to_num_patches(list(size[::-1]), pinpoints, SIDE)
        features = [torch.zeros(tiles, (SIDE // PATCH) ** 2, 1)]
        more = dict(vision_feature_select_strategy="default") if "Next" in base.__name__ else {}
        if not more:
            more = dict(vision_aspect_ratio=config().vision_aspect_ratio)
        (packed,), _ = base.pack_image_features(
            SimpleNamespace(config=config()), features, [size[::-1]], image_newline=torch.zeros(1), **more
        )
        arguments = {
            "pixel_values": pixels(1, tiles, 3, SIDE, SIDE, seed=seed),
            "image_sizes": torch.tensor([size[::-1]]),
        }
        return Image((IMAGE,) * len(packed), arguments, size)

    return image


def tiles_padded(images: list[list[Image]]) -> dict[str, Tensor]:
    """Images of different numbers of tiles, padded to the most."""
    flat = [image.arguments["pixel_values"] for row in images for image in row]
    most = max(tiles.shape[1] for tiles in flat)
    full = [torch.nn.functional.pad(tiles, (0, 0) * 3 + (0, most - tiles.shape[1])) for tiles in flat]
    sizes = [image.arguments["image_sizes"] for row in images for image in row]
    return {"pixel_values": torch.cat(full), "image_sizes": torch.cat(sizes)}


def tiles_counted(images: list[list[Image]]) -> dict[str, Tensor]:
    return tiles_padded(images) | {"batch_num_images": torch.tensor([len(row) for row in images if row])}


def internvl() -> Any:
    vision = {key: value for key, value in TOWER.items() if key != "patch_size"}
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision, image_size=[32, 32], patch_size=[4, 4]),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def internvl3_5() -> Any:
    config = internvl()
    config.text_config = transformers.Qwen3Config(**TEXT, head_dim=8)
    return config


def internvl_processor() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=3)


def internvl_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    tiles = internvl_processor().get_number_of_image_patches(size[1], size[0])
    ids = (VISION_START, *[IMAGE] * (16 * tiles), VISION_END)
    return Image(ids, {"pixel_values": pixels(tiles, 3, 32, 32, seed=seed)}, size)


def cohere2_text() -> Any:
    """Sliding and full layers in turn, the full ones without a rotary embedding; the window is shorter than the prompts."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return transformers.Cohere2Config(**TEXT, layer_types=kinds, sliding_window=20, tie_word_embeddings=False)


def cohere2_vision() -> Any:
    return transformers.Cohere2VisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=32, vision_use_head=False),
        text_config=cohere2_text(),
        image_token_id=IMAGE,
        alignment_intermediate_size=48,
        tie_word_embeddings=False,
    )


def aya_vision() -> Any:
    return transformers.AyaVisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=32, vision_use_head=False),
        text_config=cohere2_text(),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def marked_image(before: tuple[int, ...], behind: tuple[int, ...]) -> Callable[[tuple[int, int], int, bool], Image]:
    """Tiles, each with markers around it, then the whole."""

    def image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
        tiles = internvl_processor().get_number_of_image_patches(size[1], size[0])
        ids = (VISION_START, *(*before, *[IMAGE] * 16, *behind) * tiles, VISION_END)
        return Image(ids, {"pixel_values": pixels(tiles, 3, 32, 32, seed=seed)}, size)

    return image


def ovis2() -> Any:
    vision = {key: value for key, value in TOWER.items() if key != "initializer_range"}
    return transformers.Ovis2Config(
        vision_config=transformers.Ovis2VisionConfig(**vision, image_size=32, hidden_stride=2, vocab_size=40),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        visual_indicator_token_ids=OVIS2_MARKERS,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        tie_word_embeddings=False,
    )


OVIS2_MARKERS = [VISION_START, MARK, 82, 83, VISION_END]  # start, behind the whole, column, row, end


def ovis2_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """The whole, then two tiles beside each other or one above the other; a marker between any two."""
    start, whole, column, row, end = OVIS2_MARKERS
    tile = [IMAGE] * 16
    ids = [start, *tile, whole, *tile, column if size[0] > size[1] else row, *tile, end]
    return Image(tuple(ids), {"pixel_values": pixels(3, 3, 32, 32, seed=seed)}, size)


def perception_lm() -> Any:
    """A CLIP tower in the place of timm's, which may be missing."""
    vision = transformers.CLIPVisionConfig(**TOWER, image_size=32)
    vision.model_args = {"embed_dim": vision.hidden_size}
    return transformers.PerceptionLMConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def perception_processor() -> Any:
    """What the family reads of its processor, which needs torchvision: a tile beside or above another."""

    def resize(image: Tensor, tile_size: int, max_num_tiles: int) -> tuple[Tensor, tuple[int, int]]:
        return image, (2, 1) if image.shape[-1] > image.shape[-2] else (1, 2)

    return SimpleNamespace(do_resize=True, tile_size=32, max_num_tiles=2, resize=resize)


def perception_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """The whole, then two tiles."""
    return Image((IMAGE,) * 48, {"pixel_values": pixels(1, 3, 3, 32, 32, seed=seed)}, size)


def idefics3() -> Any:
    vision = transformers.Idefics3VisionConfig(**TOWER, image_size=32)
    return transformers.Idefics3Config(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT),
                                       image_token_id=IMAGE, scale_factor=2, pad_token_id=0)  # fmt: skip


def smolvlm() -> Any:
    vision = transformers.SmolVLMVisionConfig(**TOWER, image_size=32)
    return transformers.SmolVLMConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT),
                                      image_token_id=IMAGE, scale_factor=2, pad_token_id=0)  # fmt: skip


def idefics3_image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
    """Two tiles and the whole, beside each other or one above the other: a marker and a tag before each, a line end behind
    each row (two are one token), the marker behind the whole."""
    tile, line = [IMAGE] * 16, 95
    first, second, whole = ((VISION_START, tag, *tile) for tag in (82, 83, MARK))
    tiles = (*first, *second, line) if size[0] > size[1] else (*first, line, *second, line)
    return Image((*tiles, *whole, VISION_START), {"pixel_values": pixels(1, 3, 3, 32, 32, seed=seed)}, size)


def images_per_sample(images: list[list[Image]]) -> dict[str, Tensor]:
    """(samples, most tiles, 3, height, width), as Idefics3's processor pads with black images."""
    rows = [torch.cat([image.arguments["pixel_values"][0] for image in row]) for row in images if row]
    most = max(map(len, rows))
    full = [torch.nn.functional.pad(row, (0, 0) * 3 + (0, most - len(row))) for row in rows]
    return {"pixel_values": torch.stack(full)}


def repeats_tiles(model: Any) -> str | None:
    """Before `generate()` encoded images once for all copies of a sample."""
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        return None
    return "this transformers repeats images or their tiles one by one"


FAMILIES = {
    "llava_next": Family(
        "LLaVA-NeXT: tiles, unpadding, newlines", "LlavaNextForConditionalGeneration", llava_next,
        anyres_image(llava_next, always=True), sizes=((44, 10), (10, 44)), join=tiles_padded,
    ),
    "llava_onevision": Family(
        "LLaVA-OneVision, images", "LlavaOnevisionForConditionalGeneration", llava_onevision,
        anyres_image(llava_onevision, always=False), sizes=((52, 20), (14, 30)), join=tiles_counted,
    ),
    "internvl": Family(
        "InternVL 2.5 and 3: tiles", "InternVLForConditionalGeneration", internvl, internvl_image,
        sizes=((70, 30), (20, 30)), processor=internvl_processor, unable={"repeat": repeats_tiles}, fast=True,
    ),
    "internvl3_5": Family(
        "InternVL 3.5: tiles", "InternVLForConditionalGeneration", internvl3_5, internvl_image,
        sizes=((70, 30), (20, 30)), processor=internvl_processor, unable={"repeat": repeats_tiles},
    ),
    "cohere2_vision": Family(
        "Command A Vision: tiles, sliding windows", "Cohere2VisionForConditionalGeneration", cohere2_vision,
        marked_image((), (MARK,)), sizes=((70, 30), (20, 30)), processor=internvl_processor, cuts=(2,),
        refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'cohere2_vision'"},
        unable={"repeat": repeats_tiles},
    ),
    "aya_vision": Family(
        "Aya Vision: tiles, sliding windows", "AyaVisionForConditionalGeneration", aya_vision,
        marked_image((MARK, 82), ()), sizes=((70, 30), (20, 30)), processor=internvl_processor, cuts=(2,),
        refuses=MASKS | {"flash_attention_2": "must be eager or sdpa for 'aya_vision'"},
        unable={"repeat": repeats_tiles},
    ),
    "ovis2": Family(
        "Ovis2: tiles", "Ovis2ForConditionalGeneration", ovis2, ovis2_image, sizes=((48, 24), (20, 40)),
        beside=("visual_embeddings_table",), unable={"repeat": repeats_tiles},
    ),
    "perception_lm": Family(
        "Perception LM, images: tiles", "PerceptionLMForConditionalGeneration", perception_lm, perception_image,
        sizes=((48, 24), (20, 40)), processor=perception_processor,
    ),
    "idefics3": Family(
        "Idefics3: tiles", "Idefics3ForConditionalGeneration", idefics3, idefics3_image, sizes=((48, 24), (20, 40)),
        join=images_per_sample, tower="vision_model", decoder="text_model",
    ),
    "smolvlm": Family(
        "SmolVLM, images: tiles", "SmolVLMForConditionalGeneration", smolvlm, idefics3_image,
        sizes=((48, 24), (20, 40)), join=images_per_sample, tower="vision_model", decoder="text_model",
    ),
}  # fmt: skip
