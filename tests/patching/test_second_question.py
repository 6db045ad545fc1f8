"""A second question about another region: cached vision features and a fresh prefill over the whole conversation."""

from __future__ import annotations

from dataclasses import replace

import pytest

import crop
from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, PreLLMCompression, Pyramid
from tests.support.batches import make_batch, make_sample, standard_batch
from tests.support.cases import (
    METHODS,
    REGIONS,
    assert_kept,
    assert_steps,
    count_vision_calls,
    decide,
    elsewhere,
    families,
    get_model,
    get_oracle,
    greedy,
    patched,
    regions_for,
)
from tests.support.families.entry import text_tokens
from tests.support.tiny_families import FAMILIES, THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

QUESTIONS = (text_tokens(6, 31), text_tokens(3, 32))


def ask(model, method, batch, regions):
    """Answer of three tokens, checked against the oracle; the kept tokens, and the samples with the answer."""
    oracle, samples = get_oracle(batch.family), batch.samples
    with patched(model, method, batch, [region for mine in regions for region in mine]) as stats:
        out = greedy(model, batch, 3)
    decisions = [decide(oracle, sample, method, mine) for sample, mine in zip(samples, regions, strict=True)]
    assert_kept(stats, decisions)
    steps = [oracle.greedy(sample, decision, 3) for sample, decision in zip(samples, decisions, strict=True)]
    assert_steps(out, steps)
    kept = [index.tolist() for index in stats.kept]
    return kept, [sample.extended(answer.tokens) for sample, answer in zip(samples, steps, strict=True)]


def with_question(samples, question):
    """A prompt of everything that was said, and the question."""
    longer = [sample.extended(question) for sample in samples]
    return make_batch([replace(sample, prompt_length=len(sample.ids)) for sample in longer], "left")


def converse(family, attention, method, batch, regions):
    """Three questions, the second about other regions: only the first runs the vision tower, and tokens come back."""
    model = get_model(family, attention)
    with count_vision_calls(family, model) as calls, crop.cache_vision(model):
        first, samples = ask(model, method, batch, regions)
        once = len(calls)
        second, samples = ask(model, method, with_question(samples, QUESTIONS[0]), list(map(elsewhere, regions)))
        third, _ = ask(model, method, with_question(samples, QUESTIONS[1]), regions)
    assert once == len(calls) > 0
    assert any(set(b) - set(a) for a, b in zip(first, second, strict=True))
    assert any(set(c) - set(b) for b, c in zip(second, third, strict=True))


@families(fast=True)
def test_every_family(family):
    size = FAMILIES[family].sizes[0]  # one kind of picture: the cache keeps the last call of the tower
    samples = [make_sample(family, pieces, 21) for pieces in ([5, size, 12], [3, size, 6], [9])]
    regions = [regions_for(row, sample) for row, sample in enumerate(samples)]
    converse(family, "sdpa", METHODS["budget"], make_batch(samples, "left"), regions)


AGAIN = {
    "strict": METHODS["strict"],
    "last": InnerLLMPruning(0.2, layer=1, rows="last"),
    "pyramid": Pyramid.steps((1, 3), keep=0.4),
    "composed": Compose(PreLLMCompression(1, 2, 3), InnerLLMPruning(0.25)),
}


@pytest.mark.parametrize(
    "attention,padding,images", [("sdpa", "left", 2), ("eager", "single", 1), ("flash_attention_2", "left", 1)]
)
@pytest.mark.parametrize("name", list(AGAIN))
@families(THOROUGH)
def test_every_method(family, name, attention, padding, images):
    batch = standard_batch(family, padding, images)
    regions = [regions_for(row, sample) for row, sample in enumerate(batch.samples)]
    converse(family, attention, AGAIN[name], batch, regions)


DEEPSTACK = {
    "all behind": InnerLLMPruning(0.3, layer=1),
    "one behind": InnerLLMPruning(0.3, layer=2),
    "none behind": InnerLLMPruning(0.3, layer=3),
    "pyramid": Pyramid((InnerLLMPruning(0.4, layer=1), InnerLLMPruning(0.2, layer=2))),
}


@pytest.mark.parametrize("name", list(DEEPSTACK))
def test_deepstack(name):
    """Levels of vision features that are added behind the cut are cached, too."""
    batch = standard_batch("qwen3_vl", "left", 1)
    regions = [regions_for(row, sample) for row, sample in enumerate(batch.samples)]
    converse("qwen3_vl", "sdpa", DEEPSTACK[name], batch, regions)


@families(THOROUGH)
def test_everything_may_come_back(family):
    """The second question needs the whole image."""
    model, batch = get_model(family), standard_batch(family, "left", 1)
    with crop.cache_vision(model):
        regions = [regions_for(row, sample) for row, sample in enumerate(batch.samples)]
        _, samples = ask(model, METHODS["strict"], batch, regions)
        whole = [[Region.whole()] * len(sample.images) for sample in samples]
        kept, _ = ask(model, METHODS["strict"], with_question(samples, QUESTIONS[0]), whole)
    assert kept == [list(range(len(span))) for sample in samples for span in sample.spans()]


@families(THOROUGH)
def test_a_second_image(family):
    """The later turn brings an image of its own: both run through the tower, regions are given for both."""
    model, batch = get_model(family), standard_batch(family, "single", 1)
    turn = make_sample(family, [4, FAMILIES[family].sizes[1], 5], seed=12)
    with crop.cache_vision(model):
        _, (sample,) = ask(model, METHODS["budget"], batch, [REGIONS[0][:1]])
        ask(model, METHODS["budget"], make_batch([sample.joined(turn)], "none"), [[REGIONS[1][1], REGIONS[1][0]]])
