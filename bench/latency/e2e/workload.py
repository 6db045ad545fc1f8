"""A model and one batch of questions for it, as the image processor and the data make them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from bench.common import data_folder
from bench.latency.e2e.geometries import Geometry, Shrink, build
from crop.geometry.region import Region
from crop.models import family_of

BEFORE, AFTER = 10, 50  # text tokens around the picture
REAL = data_folder() / "question_regions" / "regions.jsonl"
FIXED = ((0.30, 0.25, 0.70, 0.55), (0.1, 0.1, 0.35, 0.2), (0.0, 0.5, 1.0, 0.75), (0.6, 0.6, 0.9, 0.95))


@dataclass(frozen=True)
class Model:
    """A model on its device, and how its pictures become pixels.

    Args:
        model, processor: unmodified Hugging Face objects.
        geometry: what they were made from.
        weights: bytes of all parameters and buffers.
    """

    model: Any
    processor: Any
    geometry: Geometry
    weights: int

    @staticmethod
    def build(geometry: Geometry, shrink: Shrink, device: str, dtype: torch.dtype) -> Model:
        torch.manual_seed(0)
        model = build(geometry.config(shrink), device, dtype)
        held = [*model.parameters(), *model.buffers()]
        return Model(model, geometry.processor(), geometry, sum(t.numel() * t.element_size() for t in held))

    @property
    def base(self) -> Any:
        return family_of(self.model).base(self.model)

    @property
    def tower(self) -> Any:
        return family_of(self.model).vision_tower(self.base)

    @property
    def decoder(self) -> Any:
        return family_of(self.model).language_model(self.model)


@dataclass(frozen=True)
class Workload:
    """A batch of prompts, one picture and one region each.

    Args:
        model: that they are for.
        inputs: of the model, on its device; equal lengths, so that no mask is needed.
        regions: what each question needs.
        preprocess: seconds that the image processor took for one picture.
    """

    model: Model
    inputs: Mapping[str, Any]
    regions: list[Region]
    preprocess: float

    @property
    def where(self) -> dict[str, Any]:
        """What ``patch`` must be told about the pictures."""
        sizes = [self.model.geometry.image] * len(self.regions)
        return {"processor": self.model.processor, "image_size": sizes}


def make(model: Model, batch: int) -> Workload:
    """Random text around one picture, repeated with other text for every sample.

    Raises:
        RuntimeError: the picture does not become the tokens that the geometry names.
    """
    picture = Image.effect_mandelbrot(model.geometry.image, (-2.2, -1.5, 1.0, 1.5), 60).convert("RGB")
    model.processor(picture, return_tensors="pt")  # the first call imports
    start = time.perf_counter()
    seen = dict(model.processor(picture, return_tensors="pt"))
    preprocess = time.perf_counter() - start
    seen.pop("num_patches", None)
    config, device = model.model.config, model.model.device
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, config.text_config.vocab_size - 8, (batch, BEFORE + AFTER), generator=generator)
    text[text == config.image_token_id] = 1  # no further images
    image = torch.full((batch, model.geometry.tokens), config.image_token_id)
    ids = torch.cat([text[:, :BEFORE], image, text[:, BEFORE:]], 1)
    inputs: dict[str, Any] = {"input_ids": ids.to(device)}
    for name, value in seen.items():
        value = torch.as_tensor(value)
        value = value.repeat(batch, *[1] * (value.dim() - 1)).to(device)
        inputs[name] = value.to(model.model.dtype) if value.is_floating_point() else value
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    return Workload(model, inputs, regions(batch), preprocess)


def regions(count: int) -> list[Region]:
    """Regions of real questions, the same ones at every call; fixed fractions where the data is absent."""
    boxes: list[Any] = list(FIXED)
    if REAL.exists():
        boxes = [json.loads(line)["box"] for line in REAL.read_text().splitlines()]
        random.Random(0).shuffle(boxes)
    return [Region.box(*boxes[number % len(boxes)]) for number in range(count)]


def regions_source() -> str:
    """Where they come from, for the tables."""
    return "of real questions" if REAL.exists() else "fixed boxes, the data is absent"
