"""What tests over all families share: methods, models, batches, and what the oracle says of them, each made once."""

from __future__ import annotations

import functools
from typing import Any

from crop.methods import Compose, InnerLLMPruning, PreLLMCompression
from crop.patching.patch import patch
from tests.support.contract import REGIONS
from tests.support.oracle import Oracle

from .batches import Batch, standard_batch
from .families import FAMILIES, build_model

STEPS = 3
METHODS = {
    "plc": PreLLMCompression(inside=1, context=2, outside=3, ring=1),
    "ilp": InnerLLMPruning(keep=0.3, layer=2, ring=1, floor=3),
    "both": Compose(PreLLMCompression(inside=1, context=2, outside=2, ring=1), InnerLLMPruning(keep=0.2, layer=2)),
}
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
SUPPORTED = [(family, attention) for family in FAMILIES for attention in FAMILIES[family].attentions]


@functools.cache
def get_model(family: str, attention: str) -> Any:
    model = build_model(family, attention)
    model(**standard_batch(family, "left", 1).inputs)  # the first forward installs transformers' own recording hooks
    return model


@functools.cache
def get_oracle(family: str) -> Oracle:
    return Oracle(build_model(family, "eager"))


@functools.cache
def get_batch(family: str, padding: str, images: int) -> Batch:
    return standard_batch(family, padding, images)


def regions_of(batch: Batch) -> list:
    return [region for row, sample in enumerate(batch.samples) for region in REGIONS[row % 2][: len(sample.images)]]


def sizes_of(batch: Batch) -> list[tuple[int, int]]:
    return [image.size for sample in batch.samples for image in sample.images]


def patched(model: Any, method: Any, batch: Batch, regions: Any = None, **more: Any) -> Any:
    """`crop.patch` with what the family's geometry needs."""
    make = FAMILIES[batch.family].processor
    processor = None if make is None else make()
    return patch(model, method, regions, processor=processor, image_size=sizes_of(batch), **more)


@functools.cache
def decided(family: str, padding: str, images: int, name: str) -> list:
    oracle, batch, found = get_oracle(family), get_batch(family, padding, images), []
    for row, sample in enumerate(batch.samples):
        regions = list(REGIONS[row % 2][: len(sample.images)])
        decision = oracle.keep_all(sample)
        if sample.images:
            decision = oracle.decide(sample, METHODS[name], regions, sample.layouts())
            assert not decision.near_tie, "the test's own data is too close to call: change a seed"
        found.append(decision)
    return found


@functools.cache
def greedy_steps(family: str, padding: str, images: int, name: str) -> list:
    oracle, batch = get_oracle(family), get_batch(family, padding, images)
    decisions = decided(family, padding, images, name)
    return [oracle.greedy(s, d, STEPS) for s, d in zip(batch.samples, decisions, strict=True)]


def greedy(model: Any, batch: Batch, steps: int = STEPS, **more: Any) -> Any:
    return model.generate(
        **batch.inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
    )
