"""Real checkpoints of every supported family: published sizes, which stand in published.json, as models without weights.

An entry is keyed by model type, ``model_type, variant`` where a family has several:

    name         of the checkpoint on the Hugging Face hub
    parameters   in billions, tied weights once; of the text model where ``tower`` names a library that is not needed here,
                 for which another tower of the same width stands in
    rounded      how far ``parameters`` may be off, in billions, where only a rounded number is published
    config       its config.json as far as it tells sizes, and the ids of image tokens
    processor    "module.Class" of the image processor, and what its preprocessor_config.json sets
    call         what the checkpoint's processor calls it with beside
    tokens       vision tokens of a picture of ``PICTURE`` pixels, by the checkpoint's own processor
    rows         rows of tokens with a break between any two
    writer       what the processor that writes the prompt knows of sizes, see written.py
    tiles        rows and columns of tiles, where the image processor is stood in for
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from tests.support.written import ovis2_markers, written

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())
UNKNOWN = {  # families without an entry: what of their checkpoint could not be looked up
    "glmga": "no checkpoint has been named",
    "hyperclovax_vision_v2": "the width of its tower's MLPs, and whether its embeddings are tied",
    "minicpm_ocr": "all of it",
    "minicpmv4_7": "the vocabulary and the tower",
    "qianfan_ocr": "the vocabulary",
}
PICTURE = (1024, 768)  # width, height
BEFORE, AFTER = 20, 30  # text tokens around it


def model_type(key: str) -> str:
    """The model type that an entry is about."""
    return key.partition(",")[0]


class Missing(Exception):
    """This version of transformers does not know the model."""


def build(key: str) -> Any:
    """The unmodified class at full size, on the meta device. Missing: transformers is too old for it."""
    if Version(Version(transformers.__version__).base_version) < Version(PUBLISHED[key].get("since", "5.17")):
        raise Missing(f"transformers {transformers.__version__} lays out {model_type(key)} otherwise")
    if model_type(key) not in transformers.CONFIG_MAPPING:
        raise Missing(f"transformers {transformers.__version__} has no {model_type(key)}")
    sizes = dict(PUBLISHED[key]["config"])
    if "tower" in PUBLISHED[key]:
        vision = dict(sizes["vision_config"])
        sizes["vision_config"] = transformers.AutoConfig.for_model(vision.pop("model_type"), **vision)
    config = transformers.AutoConfig.for_model(model_type(key), **sizes)
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config).eval()


def parameters(key: str, model: Any) -> float:
    """In billions, counted as the entry says."""
    part = model
    if "tower" in PUBLISHED[key]:
        part = torch.nn.ModuleList([model.model.language_model, model.lm_head])
    return sum(p.numel() for p in dict.fromkeys(part.parameters())) / 1e9


def image_processor(key: str) -> Any:
    """The checkpoint's image processor; where it needs torchvision, what crop reads of it."""
    entry = dict(PUBLISHED[key]["processor"])
    folder, name = entry.pop("class").split(".")
    if "tiles" in PUBLISHED[key] and not name.endswith("Pil"):
        rows, columns = PUBLISHED[key]["tiles"]
        return SimpleNamespace(
            do_resize=True, tile_size=448, max_num_tiles=36, resize=lambda x, *_: (x, (columns, rows))
        )
    kind = "image_processing_pil" if name.endswith("Pil") else "image_processing"
    if kind == "image_processing":
        pytest.importorskip("torchvision", reason=f"transformers has no other image processor for {key}")
    module = importlib.import_module(f"transformers.models.{folder}.{kind}_{folder}")
    return getattr(module, name)(**entry)


def inputs(key: str, config: Any, processor: Any) -> dict[str, Any]:
    """What the model would be called with: text, the picture, text."""
    entry = PUBLISHED[key]
    if isinstance(processor, SimpleNamespace):
        seen: Any = {"pixel_values": torch.empty(1, math.prod(entry["tiles"]) + 1, 3, 1, 1)}
    else:
        seen = processor(Image.new("RGB", PICTURE), return_tensors="pt", **entry.get("call", {}))
    text = torch.arange(BEFORE + AFTER) + 1000
    ids = torch.cat([text[:BEFORE], torch.tensor(_image_ids(entry, config, processor, seen)), text[BEFORE:]])[None]
    return {"input_ids": ids, "mm_token_type_ids": (ids == config.image_token_id).int(), **seen}


def _image_ids(entry: dict[str, Any], config: Any, processor: Any, seen: Any) -> list[int]:
    """The image's tokens, with what stands between them."""
    image, count = config.image_token_id, entry["tokens"]
    if "rows" in entry:
        columns = (count + 1) // entry["rows"] - 1
        return (([image] * columns + [image + 1]) * entry["rows"])[:-1]
    if "writer" in entry:
        return written(config, seen, image_processor=processor, **entry["writer"])
    if config.model_type == "ovis2":
        return ovis2_markers(seen, config, 256)
    return [image] * count
