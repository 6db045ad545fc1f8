"""Samples of a family, and padded batches of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Pieces
from crop.models import Prompt
from crop.models.registry import families
from tests.support.families.entry import PAD, Image, text_tokens
from tests.support.tiny_families import FAMILIES, get_config

Size = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One sample without padding.

    Attributes:
        ids: token ids, placeholders included.
        prompt_length: tokens that came with the images; what follows is text whatever its ids.
    """

    family: str
    ids: tuple[int, ...]
    images: tuple[Image, ...]
    prompt_length: int

    def layouts(self) -> list[VisionLayout]:
        """Geometry of each image by the package's adapter, which tests of its own hold to the processors."""
        return list(_layouts(self.prompt()))

    def pieces(self) -> list[Pieces]:
        """What the family's encoder can leave out of each image; tests of their own hold it to the encoder."""
        encoder = families()[get_config(self.family).model_type].encoder
        return encoder.pieces(_prompt(self.prompt()), self.layouts())

    def spans(self) -> list[tuple[int, ...]]:
        """Positions of each image's vision tokens."""
        return [tuple(layout.position.tolist()) for layout in self.layouts()]

    def inputs(self) -> dict[str, Tensor]:
        """What the model takes for this sample alone."""
        return make_batch([self], "none").inputs

    def prompt(self) -> Sample:
        """The sample without what followed."""
        return replace(self, ids=self.ids[: self.prompt_length])

    def extended(self, tokens: list[int]) -> Sample:
        """The same sample followed by more text tokens."""
        return replace(self, ids=self.ids + tuple(int(token) for token in tokens))

    def joined(self, other: Sample) -> Sample:
        """This sample followed by `other` (its images come after)."""
        ids = self.ids + other.ids
        return replace(self, ids=ids, images=self.images + other.images, prompt_length=len(ids))


@functools.cache
def _layouts(prompt: Sample) -> tuple[VisionLayout, ...]:
    if not prompt.images:
        return ()
    config = get_config(prompt.family)
    if config.model_type not in families():
        raise ValueError(
            f"{prompt.family}: model_type must be registered in crop/models/registry.py, got {config.model_type!r}"
        )
    return tuple(layout for _, layout in families()[config.model_type].images(_prompt(prompt)))


def _prompt(prompt: Sample) -> Prompt:
    family, inputs = FAMILIES[prompt.family], prompt.inputs()
    processor, sizes = None if family.processor is None else family.processor(), [image.size for image in prompt.images]
    return Prompt(get_config(prompt.family), inputs["input_ids"], inputs, processor, sizes)


@dataclass
class Batch:
    """Samples plus the padded tensors that a model takes."""

    family: str
    samples: list[Sample]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)  # column of each sample's first real token

    def single(self, row: int) -> Batch:
        """One sample of the batch, alone and without padding."""
        return make_batch([self.samples[row]], "none")

    def rows(self) -> list[int]:
        """The sample of each image, in prompt order."""
        return [row for row, sample in enumerate(self.samples) for _ in sample.images]


def make_sample(family: str, pieces: list[int | Size], seed: int = 0) -> Sample:
    """A sample from `pieces`: an int is that many text tokens, a (width, height) in pixels is an image."""
    ids: list[int] = []
    images, alone = [], sum(isinstance(piece, tuple) for piece in pieces) == 1
    for number, piece in enumerate(pieces):
        if isinstance(piece, int):
            ids += text_tokens(piece, 17 * seed + number)
            continue
        images.append(FAMILIES[family].image(piece, 17 * seed + number, alone))
        ids += images[-1].ids
    return Sample(family, tuple(ids), tuple(images), len(ids))


def make_batch(samples: list[Sample], padding: str) -> Batch:
    """Pad `samples` ("none" needs equal lengths, "left", "right") and build the model's inputs."""
    family, longest = FAMILIES[samples[0].family], max(len(sample.ids) for sample in samples)
    assert padding != "none" or all(len(sample.ids) == longest for sample in samples)
    ids = torch.full((len(samples), longest), PAD)
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
    return Batch(samples[0].family, samples, inputs, offsets)


def concatenated(images: list[list[Image]]) -> dict[str, Tensor]:
    """The arguments of all images, one after the other."""
    flat = [image for row in images for image in row]
    keys = dict.fromkeys(key for image in flat for key in image.arguments)
    found = {}
    for key in keys:
        values = [image.arguments[key] for image in flat if key in image.arguments]
        if len({value.shape[1:] for value in values}) > 1:
            raise ValueError(
                f"{key} must have equal shapes behind the first axis, got {[tuple(value.shape) for value in values]}; "
                "set `join` of the family"
            )
        found[key] = torch.cat(values)
    return found


@functools.cache
def standard_batch(family: str, padding: str, images: int) -> Batch:
    """Two samples with 1 or 2 images each, of different sizes, and where padding allows one of text alone.

    "single" is the first sample, "none" the two with the shorter prompt lengthened. Much padding, so that scores which
    see it go wrong. Batches are shared: whoever changes one copies it first.
    """
    wide, tall = FAMILIES[family].sizes
    samples = []
    for row, (before, sizes, after) in enumerate(((5, (wide, tall), 20), (3, (tall, wide), 6))):
        pieces: list[int | Size] = [before]
        for number, size in enumerate(sizes[:images]):
            pieces += [size, 4 + number]
        samples.append(make_sample(family, [*pieces[:-1], after], seed=10 * images + row))
    if padding == "single":
        return make_batch(samples[:1], "none")
    if padding == "none":
        longest = max(len(sample.ids) for sample in samples)
        longer = [sample.extended(text_tokens(longest - len(sample.ids), 77)) for sample in samples]
        return make_batch([replace(sample, prompt_length=longest) for sample in longer], "none")
    return make_batch([*samples, make_sample(family, [9], seed=5)], padding)
