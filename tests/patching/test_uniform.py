"""Uniform caches: after the prefill every layer holds what the last one does, so that a static cache serves."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from crop.methods import Pyramid
from tests.support.batches import standard_batch
from tests.support.cases import (
    ATOL,
    METHODS,
    as_argument,
    cache_lengths,
    decide,
    expected,
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
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import FAMILIES, THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
UNIFORM = {name: METHODS[name] for name in ("plc", "budget", "compose")}
UNIFORM["pyramid"] = Pyramid.steps((1, 3), keep=0.5)
QUESTION = text_tokens(4, 9)


def assert_two_turns(batch, method, out, again):
    """Steps of the first answer and of the second, against rows that see the same tokens in every layer."""
    oracle = get_oracle(batch.family)
    for row, sample in enumerate(batch.samples):
        decision, prompt = decide(oracle, sample, method, regions_for(row, sample)), len(sample.ids)
        steps = oracle.greedy(sample, decision, 3, prompt)
        for got, logits in zip(out.logits, steps.logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)
        later = oracle.greedy(sample.extended(steps.tokens + QUESTION), decision, 2, prompt)
        for got, logits in zip(again.logits, later.logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)


def two_turns(model, batch, **more):
    out = greedy(model, batch, 3, **more)
    return out, next_turn(model, batch, out, QUESTION, 2)


@matrix("attention,padding,images", [("sdpa", "left", 2), ("eager", "single", 1), ("flash_attention_2", "left", 1)])
@matrix("name", list(UNIFORM))
@families(THOROUGH)
def test_uniform_is_the_oracle(family, name, attention, padding, images):
    model, batch = get_model(family, attention), standard_batch(family, padding, images)
    with patched(model, UNIFORM[name], batch, regions_of(batch), cache="uniform"):
        out, again = two_turns(model, batch)
    assert len(set(cache_lengths(again.past_key_values))) == 1
    assert again.past_key_values.get_seq_length() == again.sequences.shape[1] - 1
    assert_two_turns(batch, UNIFORM[name], out, again)


@matrix("attention,padding,images", [("sdpa", "left", 2), ("sdpa", "none", 1), ("eager", "single", 1)])
@matrix("name", list(UNIFORM))
@families(THOROUGH)
def test_static_cache(family, name, attention, padding, images):
    """The static tensors stay in place, hold the kept tokens in front, and serve a second turn."""
    model, batch = get_model(family, attention), standard_batch(family, padding, images)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=260)
    with patched(model, UNIFORM[name], batch, regions_of(batch), cache="uniform") as stats:
        out, again = two_turns(model, batch, **as_argument(model, cache))
    assert_two_turns(batch, UNIFORM[name], out, again)
    used = {int(layer.cumulative_length) for layer in cache.layers}
    if padding == "single":
        lost = sum(stats.tokens_before) - sum(stats.tokens_after_ilp)
        assert used == {batch.inputs["input_ids"].shape[1] - lost + 2 + 1 + 4 + 1}
    assert len(used) == 1 and all(not layer.keys[:, :, max(used) :].any() for layer in cache.layers)


@families(fast=True)
def test_static_by_name(family):
    """cache_implementation="static" generates what a dynamic uniform cache does, and may be used again."""
    model, batch = get_model(family), standard_batch(family, "left", 1)
    if "uniform" in FAMILIES[family].refuses:
        before = snapshot(model)
        with pytest.raises(ValueError, match=FAMILIES[family].refuses["uniform"]):
            patched(model, METHODS["budget"], batch, regions_of(batch), cache="uniform").__enter__()
        assert_unchanged(before, model)
        return
    for name in ("compose", "plc", "budget") if family in THOROUGH else ("compose",):
        with patched(model, METHODS[name], batch, regions_of(batch), cache="uniform"):
            wanted = greedy(model, batch, 3)
            for _ in range(2 if family in THOROUGH else 1):
                out = greedy(model, batch, 3, cache_implementation="static")
                assert torch.equal(out.sequences, wanted.sequences)
                torch.testing.assert_close(torch.stack(out.logits), torch.stack(wanted.logits), atol=ATOL, rtol=0)
        for row, expect in enumerate(expected(standard_batch(family, "left", 1), name)):
            steps = expect.oracle.greedy(expect.sample, expect.decision, 3, len(expect.sample.ids))
            for got, logits in zip(wanted.logits, steps.logits, strict=True):
                torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)


def test_reset_forgets():
    """A static cache that was reset serves another prompt, also outside the block."""
    model, batch = get_model("llava"), standard_batch("llava", "single", 1)
    plain = model(**batch.inputs).logits
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
    attributes = set(vars(cache))
    with patched(model, METHODS["compose"], batch, regions_of(batch), cache="uniform"):
        wanted = model(**batch.inputs, **as_argument(model, cache)).logits
        cache.reset()
        torch.testing.assert_close(model(**batch.inputs, **as_argument(model, cache)).logits, wanted, atol=ATOL, rtol=0)
    cache.reset()
    assert type(cache) is StaticCache and set(vars(cache)) == attributes
    torch.testing.assert_close(model(**batch.inputs, **as_argument(model, cache)).logits, plain, atol=ATOL, rtol=0)


@families(THOROUGH)
def test_beams_of_a_uniform_cache(family):
    """Pooling leaves nothing to make uniform: the same beams."""
    model, batch, found = get_model(family), standard_batch(family, "left", 1), []
    for policy in ("ragged", "uniform"):
        with patched(model, METHODS["plc"], batch, regions_of(batch), cache=policy):
            found.append(greedy(model, batch, num_beams=3).sequences)
    assert torch.equal(*found)


def test_refused():
    model, batch, plc = get_model("llava"), standard_batch("llava", "single", 1), METHODS["plc"]
    with pytest.raises(ValueError, match="patch: cache must be one of .*'ragged', 'uniform'.*, got 'static'"):
        patched(model, plc, batch, cache="static").__enter__()
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with patched(model, plc, batch), pytest.raises(ValueError, match="StaticCache: .* use patch.*cache='uniform'"):
        model(**batch.inputs, **as_argument(model, static))
    with patched(model, plc, batch), pytest.raises(ValueError, match="got 'static': .* cache='uniform'"):
        greedy(model, batch, cache_implementation="static")
    with patched(model, plc, batch, cache="uniform"), pytest.raises(ValueError, match="'static', got 'quantized'"):
        greedy(model, batch, cache_implementation="quantized")
    flash = get_model("llava", "flash_attention_2")
    with patched(flash, plc, batch, cache="uniform"), pytest.raises(ValueError, match="under flash attention"):
        flash(**batch.inputs, **as_argument(flash, static))
    assert not static.is_initialized and NUM_LAYERS == len(static.layers)
