"""Real checkpoints of every supported family: published sizes, which stand in published.json, as models without weights.

An entry is keyed by model type, ``model_type, variant`` where a family has several:

    name         of the checkpoint on the Hugging Face hub
    parameters   in billions, tied weights once; of the text model where ``tower`` names a library that is not needed here,
                 for which another tower of the same width stands in
    config       its config.json as far as it tells sizes, and the ids of image tokens
    processor    "module.Class" of the image processor, and what its preprocessor_config.json sets
    tokens       vision tokens of a picture of ``PICTURE`` pixels, by the checkpoint's own processor
    rows         rows of tokens with a break between any two
    tiles        rows and columns of tiles, where the prompt or the processor tells them
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from PIL import Image

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())
PICTURE = (1024, 768)  # width, height
BEFORE, AFTER = 20, 30  # text tokens around it


def model_type(key: str) -> str:
    """The model type that an entry is about."""
    return key.partition(",")[0]


def build(key: str) -> Any:
    """The unmodified class at full size, on the meta device."""
    config = transformers.AutoConfig.for_model(model_type(key), **PUBLISHED[key]["config"])
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
    if not name.endswith("Pil"):
        rows, columns = PUBLISHED[key]["tiles"]
        return SimpleNamespace(
            do_resize=True, tile_size=448, max_num_tiles=36, resize=lambda x, *_: (x, (columns, rows))
        )
    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    return getattr(module, name)(**entry)


def inputs(key: str, config: Any, processor: Any) -> dict[str, torch.Tensor]:
    """What the model would be called with: text, the picture, text."""
    tokens = torch.tensor(_image_ids(PUBLISHED[key], config))
    text = torch.arange(BEFORE + AFTER) + 1000
    ids = torch.cat([text[:BEFORE], tokens, text[BEFORE:]])[None]
    if isinstance(processor, SimpleNamespace):
        rows, columns = PUBLISHED[key]["tiles"]
        seen: Any = {"pixel_values": torch.empty(1, rows * columns + 1, 3, 1, 1)}
    else:
        seen = processor(Image.new("RGB", PICTURE), return_tensors="pt")
    return {"input_ids": ids, "mm_token_type_ids": (ids == config.image_token_id).int(), **seen}


def _image_ids(entry: dict[str, Any], config: Any) -> list[int]:
    """The image's tokens, with what stands between them."""
    image, count = config.image_token_id, entry["tokens"]
    if "rows" in entry:
        columns = (count + 1) // entry["rows"] - 1
        return (([image] * columns + [image + 1]) * entry["rows"])[:-1]
    if hasattr(config, "visual_indicator_token_ids"):
        start, whole, column, row, end = config.visual_indicator_token_ids
        rows, columns = entry["tiles"]
        tile = [image] * (count // (rows * columns + 1))
        between = [column if (n + 1) % columns else row for n in range(rows * columns)]
        tiles = [token for mark in between for token in [*tile, mark]][:-1]
        return [start, *tile, whole, *tiles, end]
    return [image] * count
