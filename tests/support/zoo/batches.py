"""Samples of a family, and padded batches of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.models import ADAPTERS, Prompt
from tests.support import tiny_models
from tests.support.tiny_models import text_tokens

from .entry import Image
from .families import FAMILIES, get_config


@dataclass(frozen=True)
class Sample:
    """One sample without padding."""

    family: str
    ids: tuple[int, ...]
    images: tuple[Image, ...]
    prompt_length: int

    def spans(self) -> list[tuple[int, ...]]:
        """Positions of each image's vision tokens."""
        return [tuple(layout.position.tolist()) for layout in self.layouts()]

    def layouts(self) -> list[VisionLayout]:
        """Geometry by the package's adapter, which tests of its own hold to the processors."""
        return list(_layouts(self.family, self.ids, self.images))

    def vision_key(self) -> tuple:
        return self.family, self.ids[: self.prompt_length], tuple(id(image) for image in self.images)

    def inputs(self, family: str) -> dict[str, Tensor]:
        """What the model takes for this sample alone."""
        return make_batch([self], "none").inputs

    def cut(self, stop: int) -> Sample:
        return replace(self, ids=self.ids[:stop])

    def extended(self, tokens: list[int]) -> Sample:
        return replace(self, ids=self.ids + tuple(int(token) for token in tokens))


@functools.cache
def _layouts(name: str, ids: tuple[int, ...], images: tuple[Image, ...]) -> tuple[VisionLayout, ...]:
    if not images:
        return ()
    family, config = FAMILIES[name], get_config(name)
    processor = None if family.processor is None else family.processor()
    inputs = Sample(name, ids, images, len(ids)).inputs(name)
    prompt = Prompt(config, inputs["input_ids"], inputs, processor, [image.size for image in images])
    return tuple(layout for _, layout in ADAPTERS[config.model_type].images(prompt))


@dataclass
class Batch:
    """Samples plus the padded tensors that a model takes."""

    family: str
    samples: list[Sample]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)  # column of each sample's first real token


def make_sample(family: str, pieces: list[int | tuple[int, int]], seed: int) -> Sample:
    """A sample from `pieces`: an int is that many text tokens, a (width, height) is an image."""
    ids: list[int] = []
    images = []
    for number, piece in enumerate(pieces):
        if isinstance(piece, int):
            ids += text_tokens(piece, 17 * seed + number)
            continue
        more = {} if family != "llava_onevision" else {"alone": sum(isinstance(p, tuple) for p in pieces) == 1}
        images.append(FAMILIES[family].image(piece, 17 * seed + number, **more))
        ids += images[-1].ids
    return Sample(family, tuple(ids), tuple(images), len(ids))


def make_batch(samples: list[Sample], padding: str) -> Batch:
    """Pad `samples` ("none" needs equal lengths, "left", "right") and build the model's inputs."""
    name = samples[0].family
    family, longest = FAMILIES[name], max(len(sample.ids) for sample in samples)
    assert padding != "none" or all(len(sample.ids) == longest for sample in samples)
    ids = torch.full((len(samples), longest), tiny_models.PAD)
    mask, offsets = torch.zeros_like(ids), []
    for row, sample in enumerate(samples):
        first = longest - len(sample.ids) if padding == "left" else 0
        ids[row, first : first + len(sample.ids)] = torch.tensor(sample.ids)
        mask[row, first : first + len(sample.ids)] = 1
        offsets.append(first)
    inputs = {"input_ids": ids, "attention_mask": mask}
    images = [list(sample.images) for sample in samples]
    if any(images):
        inputs |= (family.join or concatenated)(images)
    if family.types is not None:
        inputs |= family.types(ids)
    return Batch(name, samples, inputs, offsets)


def concatenated(images: list[list[Image]]) -> dict[str, Tensor]:
    flat = [image for row in images for image in row]
    keys = dict.fromkeys(key for image in flat for key in image.arguments)
    return {key: torch.cat([image.arguments[key] for image in flat if key in image.arguments]) for key in keys}


def standard_batch(family: str, padding: str, images: int) -> Batch:
    """Two samples with 1 or 2 images each and, where padding allows, one of text alone."""
    wide, tall = FAMILIES[family].sizes
    grids = [(wide, tall)[:images], (tall, wide)[:images]]
    samples = []
    for row, (before, after) in enumerate(((3, 12), (2, 5))):
        pieces: list[int | tuple[int, int]] = [before]
        for number, size in enumerate(grids[row]):
            pieces += [size, 2 + number]
        pieces[-1] = after
        samples.append(make_sample(family, pieces, seed=10 * images + row))
    if padding == "none":
        longest = max(len(sample.ids) for sample in samples)
        samples = [
            replace(longer, prompt_length=len(longer.ids))
            for longer in (s.extended(text_tokens(longest - len(s.ids), 77)) for s in samples)
        ]
        return make_batch(samples, padding)
    return make_batch([*samples, make_sample(family, [9], seed=5)], padding)
