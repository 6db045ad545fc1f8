"""`crop.patch` with several cuts: every stage of the decoder sees its own tokens."""

from __future__ import annotations

import pytest
import torch

from crop.methods import Compose, InnerLLMPruning, PreLLMCompression, Pyramid
from tests.support.batches import standard_batch
from tests.support.cases import (
    ATOL,
    REGIONS,
    as_argument,
    assert_kept,
    assert_stats,
    assert_steps,
    cache_lengths,
    decide,
    expected_lengths,
    families,
    get_model,
    get_oracle,
    greedy,
    next_turn,
    patched,
    regions_for,
    regions_of,
)
from tests.support.families.entry import NUM_LAYERS, text_tokens
from tests.support.tiny_families import FAMILIES, THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

METHODS = {
    "budget": Pyramid((InnerLLMPruning(0.5, layer=1), InnerLLMPruning(0.3, layer=2), InnerLLMPruning(0.1, layer=3))),
    "drop": Pyramid.steps((1, 2, 3), keep=0.5, rows="last"),
    "strict_last": Pyramid((InnerLLMPruning(0.4, layer=1), InnerLLMPruning(mode="strict", layer=3))),
    "pooled": Compose(PreLLMCompression(1, 2, 2, ring=1), Pyramid.steps((1, 3), keep=0.4)),
    "idle_first": Pyramid(
        (InnerLLMPruning(1.0, layer=1), InnerLLMPruning(0.3, layer=2), InnerLLMPruning(0.6, layer=3))
    ),
}
CASES = [("sdpa", "single", 1), ("sdpa", "left", 2), ("eager", "left", 2), ("flash_attention_2", "left", 1)]
QUESTION = text_tokens(4, 9)


@pytest.mark.parametrize("attention,padding,images", CASES)
@pytest.mark.parametrize("name", list(METHODS))
@families(THOROUGH)
def test_pyramid_is_the_oracle(family, name, attention, padding, images):
    model, oracle, method = get_model(family, attention), get_oracle(family), METHODS[name]
    batch = standard_batch(family, padding, images)
    decisions = [decide(oracle, sample, method, regions_for(row, sample)) for row, sample in enumerate(batch.samples)]
    with patched(model, method, batch, regions_of(batch)) as stats:
        out = greedy(model, batch, 3)
        assert_stats(stats, decisions)
        for layer in range(NUM_LAYERS):
            wanted = [d.kept_original(image, layer) for d in decisions for image in range(len(d.cells))]
            assert [kept.tolist() for kept in stats.kept_at(layer)] == wanted, layer
            assert stats.tokens_from[max(n for n in stats.tokens_from if n <= layer)] == list(map(len, wanted))
        again = next_turn(model, batch, out, QUESTION, 2)
    steps = [oracle.greedy(sample, d, 3) for sample, d in zip(batch.samples, decisions, strict=True)]
    assert_steps(out, steps)
    later = [s.extended(first.tokens + QUESTION) for s, first in zip(batch.samples, steps, strict=True)]
    assert_steps(again, [oracle.greedy(sample, d, 2) for sample, d in zip(later, decisions, strict=True)])


@families(fast=True)
def test_every_family_has_several_cuts(family):
    """At every layer where its scores may cut."""
    model, oracle, batch = get_model(family), get_oracle(family), standard_batch(family, "left", 1)
    method = Pyramid.steps(FAMILIES[family].cuts, keep=0.5)
    decisions = [decide(oracle, sample, method, regions_for(row, sample)) for row, sample in enumerate(batch.samples)]
    with patched(model, method, batch, regions_of(batch)) as stats:
        out = greedy(model, batch, 2)
    assert_kept(stats, decisions)
    assert_steps(out, [oracle.greedy(sample, d, 2) for sample, d in zip(batch.samples, decisions, strict=True)])
    assert cache_lengths(out.past_key_values) == expected_lengths(batch, decisions, 1)


@families(THOROUGH)
def test_stages_get_shorter(family):
    """The cache holds per layer what the stages say, and the layer average is theirs."""
    model, batch = get_model(family), standard_batch(family, "single", 1)
    (span,), length = batch.samples[0].spans(), batch.inputs["input_ids"].shape[1]
    count = len(span)
    with patched(model, METHODS["drop"], batch, regions_of(batch)) as stats:
        cache = model(**batch.inputs).past_key_values
    tokens = [count, round(count / 2), round(count / 4), round(count / 8)]
    assert cache_lengths(cache) == [length - count + n for n in tokens]
    assert stats.layer_average == [sum(tokens) / NUM_LAYERS]
    assert stats.tokens_from == {layer: [number] for layer, number in enumerate(tokens)}


@families(THOROUGH)
def test_keep_all_pyramid_is_bit_identical(family):
    model, batch = get_model(family), standard_batch(family, "left", 2)
    plain = model(**batch.inputs).logits
    with patched(model, Pyramid.steps((1, 3), keep=1.0), batch, regions_of(batch)):
        assert torch.equal(model(**batch.inputs).logits, plain)


@pytest.mark.parametrize("layers", [(3, 1), (2, 3)])
def test_second_image_is_cut_elsewhere(layers):
    """A pruned cache takes another method: an image cut at one layer, then one cut at another, then text."""
    model, oracle = get_model("llava"), get_oracle("llava")
    batch = standard_batch("llava", "single", 1)
    first, second = (InnerLLMPruning(0.3, layer=layer) for layer in layers)
    prompt = dict(input_ids=batch.inputs["input_ids"], pixel_values=batch.inputs["pixel_values"])
    question, kept = text_tokens(5, 3), []
    with patched(model, first, batch, REGIONS[0][0]) as stats:
        cache = model(**prompt).past_key_values
        kept.append(stats.kept[0].tolist())
    with patched(model, second, batch, REGIONS[1][0]) as stats:
        model(**prompt, **as_argument(model, cache))
        kept.append(stats.kept[0].tolist())
    with patched(model, None, batch):
        logits = model(torch.tensor([question]), **as_argument(model, cache)).logits[0]

    (once,) = batch.samples
    twice = once.joined(once)
    decision = decide(oracle, once, first, [REGIONS[0][0]])
    decision = decide(oracle, twice, second, [REGIONS[1][0]], previous=decision)
    assert kept == [decision.kept_original(0), decision.kept_original(1)]
    reference = oracle.forward(twice.extended(question), decision)[0][-5:]
    torch.testing.assert_close(logits, reference, atol=ATOL, rtol=0)
    cut = [sum(n >= layer for layer in layers) for n in range(NUM_LAYERS)]
    assert cache_lengths(cache) == [len(twice.ids) + 5 - (64 - len(kept[0])) * n for n in cut]


WRONG = {
    "auto": (ValueError, "stages must name their layers, got layer='auto'", (InnerLLMPruning(0.5),)),
    "no stage": (ValueError, "stages must have one or more layers that ascend, got \\[\\]", ()),
    "order": (ValueError, r"ascend, got \[3, 2\]", (InnerLLMPruning(0.5, layer=3), InnerLLMPruning(0.2, layer=2))),
    "twice": (ValueError, r"ascend, got \[2, 2\]", (InnerLLMPruning(0.5, layer=2), InnerLLMPruning(0.2, layer=2))),
    "no method": (TypeError, "methods of one cut each, got 0.5", (0.5,)),
    "pooling": (TypeError, "methods of one cut each, got PreLLM", (PreLLMCompression(),)),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_stages_that_cannot_be(case):
    error, message, stages = WRONG[case]
    with pytest.raises(error, match=message):
        Pyramid(stages)
