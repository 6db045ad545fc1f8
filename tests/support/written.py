"""Prompts of families that write markers, as their own processors write them, of which only the text is needed, no tokenizer."""

from __future__ import annotations

import re
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers.models.ovis2.processing_ovis2 import Ovis2Processor

_SIGLIP = transformers.SiglipVisionConfig(image_size=70, patch_size=7)
TILES = {  # of 5 x 5 tokens
    "AyaVision": transformers.AyaVisionConfig(vision_config=_SIGLIP),
    "Cohere2Vision": transformers.Cohere2VisionConfig(vision_config=_SIGLIP),
    "Idefics3": transformers.Idefics3Config(vision_config=dict(image_size=70, patch_size=7), scale_factor=2),
    "SmolVLM": transformers.SmolVLMConfig(vision_config=dict(image_size=70, patch_size=7), scale_factor=2),
}
_OF_SLICES = dict(image_token_id=1, video_token_id=2, downsample_mode="16x")
_SHAPED: dict[str, dict[str, Any]] = {  # whose tiles have shapes of their own, or which need no view of the whole
    "GraniteDocling": dict(
        vision_config=dict(image_size=70, patch_size=7, scale_factor=2, out_hidden_size=1024), text_config={}
    ),
    "Lfm2Vl": {},
    "MiniCPMV4_6": _OF_SLICES,
    "MiniCPMV4_7": _OF_SLICES,
    "MiniCPMOcr": _OF_SLICES,
}
SHAPED = {  # those that this transformers has
    kind: getattr(transformers, f"{kind}Config")(**given)
    for kind, given in _SHAPED.items()
    if hasattr(transformers, f"{kind}Config")
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
    "granite_docling": dict(
        fake_image_token="F", global_image_tag="<global-img>", image_token="@", image_seq_len=25,
    ),
    "lfm2_vl": dict(
        image_token="@", image_start_token="S", image_end_token="E", image_thumbnail_token="T",
        image_processor=SimpleNamespace(use_thumbnail=True, tile_size=70, encoder_patch_size=7, downsample_factor=2),
    ),
    "smolvlm": dict(fake_image_token="F", global_image_token="<global-img>", image_token="@", image_seq_len=25),
}  # fmt: skip
WRITERS |= dict.fromkeys(
    ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
    dict(image_token="@", image_start_token="I", image_end_token="J", slice_start_token="S", slice_end_token="E",
         slice_mode=True),
)  # fmt: skip
TAGS = "granite_docling", "lfm2_vl"  # what stands in angle brackets is one token of theirs
GIVEN = dict(image_token_divisor=16, use_image_special_tokens=True)  # what their processors call the writer with


def written(config: Any, out: Any, number: int = 0, **sizes: Any) -> list[int]:
    """The tokens of one image and a word behind it, as its family's processor writes them; ``sizes``: what it knows."""
    family = config.model_type
    # In older transformers some of these files need torchvision.
    module = pytest.importorskip(f"transformers.models.{family}.processing_{family}")
    wanted = family.replace("_", "") + "processor"
    (kind,) = (value for name, value in vars(module).items() if name.lower().replace("_", "") == wanted)
    writer = kind.__new__(kind)
    vars(writer).update(WRITERS[family] | sizes)
    text = writer.replace_image_token(out, number, **GIVEN) + "."
    tokens = re.findall(r"<[^<>]*>|." if family in TAGS else ".", text, re.DOTALL)
    return [config.image_token_id if token == "@" else zlib.crc32(token.encode()) for token in tokens]


def ovis2_markers(out: Any, config: Any, tile: int = 25) -> list[int]:
    """The tokens of one image, as Ovis2's processor writes them around its grid; ``tile``: tokens of one."""
    rows, columns = out["grids"][0].tolist()
    texts = Ovis2Processor.replace_image_token(SimpleNamespace(image_seq_length=tile), {"grids": out["grids"]}, 0)
    ids = [config.image_token_id, *config.visual_indicator_token_ids]
    names = dict(zip(("ATOM", "START", "GRID", "COL", "ROW", "END"), ids, strict=True))
    assert texts.count("ATOM") == tile * (1 + rows * columns * (rows * columns > 1))
    return [names[name] for name in re.findall("<IMG_([A-Z]+)>", texts)]
