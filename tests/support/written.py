"""Prompts of families that write markers, as their own processors write them, of which only the text is needed, no tokenizer."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace
from typing import Any

import transformers
from transformers.models.ovis2.processing_ovis2 import Ovis2Processor

_SIGLIP = transformers.SiglipVisionConfig(image_size=70, patch_size=7)
TILES = {  # of 5 x 5 tokens
    "AyaVision": transformers.AyaVisionConfig(vision_config=_SIGLIP),
    "Cohere2Vision": transformers.Cohere2VisionConfig(vision_config=_SIGLIP),
    "Idefics3": transformers.Idefics3Config(vision_config=dict(image_size=70, patch_size=7), scale_factor=2),
    "SmolVLM": transformers.SmolVLMConfig(vision_config=dict(image_size=70, patch_size=7), scale_factor=2),
}


WRITERS = {  # what the families' processors know; "@" stands for a vision token, all else is text, letter by letter
    "aya_vision": dict(
        start_of_img_token="S", end_of_img_token="E", tile_token="TILE", tile_global_token="TILE_GLOBAL",
        img_patch_token="@", img_size=70, patch_size=14,
    ),
    "cohere2_vision": dict(boi_token="S", eoi_token="E", img_line_break_token="L", image_token="@", patch_size=5),
    "gemma4": dict(boi_token="S", eoi_token="E", image_token="@"),
    "gemma4_unified": dict(boi_token="S", eoi_token="E", image_token="@"),
    "idefics3": dict(fake_image_token="F", global_image_tag="<global-img>", image_token="@", image_seq_len=25),
    "smolvlm": dict(fake_image_token="F", global_image_token="<global-img>", image_token="@", image_seq_len=25),
}  # fmt: skip


def written(config: Any, out: Any, number: int = 0) -> list[int]:
    """The tokens of one image and a word behind it, as its family's processor writes them."""
    family = config.model_type
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
    (kind,) = (value for name, value in vars(module).items() if name.lower() == family.replace("_", "") + "processor")
    text = kind.replace_image_token(SimpleNamespace(**WRITERS[family]), out, number) + "."
    return [config.image_token_id if letter == "@" else ord(letter) for letter in text]


def ovis2_markers(out: Any, config: Any) -> list[int]:
    """The tokens of one image, as Ovis2's processor writes them around its grid."""
    rows, columns = out["grids"][0].tolist()
    texts = Ovis2Processor.replace_image_token(SimpleNamespace(image_seq_length=25), {"grids": out["grids"]}, 0)
    ids = [config.image_token_id, *config.visual_indicator_token_ids]
    names = dict(zip(("ATOM", "START", "GRID", "COL", "ROW", "END"), ids, strict=True))
    assert texts.count("ATOM") == 25 * (1 + rows * columns * (rows * columns > 1))
    return [names[name] for name in re.findall("<IMG_([A-Z]+)>", texts)]
