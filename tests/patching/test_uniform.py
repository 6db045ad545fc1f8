"""Uniform caches: after the prefill every layer holds what the last one does, so that a static cache serves."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from crop.methods import Pyramid
from tests.support.contract import ATOL, METHODS, REGIONS, cache_lengths, greedy, layouts_of, patched, regions_of
from tests.support.pyramid import PyramidOracle, decide
from tests.support.tiny_models import FAMILIES, NUM_LAYERS, standard_batch, text_tokens

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
families = matrix("family", FAMILIES)
UNIFORM = {name: METHODS[name] for name in ("plc", "ilp_budget", "compose")}
UNIFORM["pyramid"] = Pyramid.steps((1, 3), keep=0.5)
QUESTION = text_tokens(4, 9)


def assert_two_turns(model, oracle, batch, method, out, again, images):
    """Steps of the first answer and of the second, against rows that see the same tokens in every layer."""
    for row, sample in enumerate(batch.samples):
        pyramid, decision = decide(oracle, sample, method, list(REGIONS[row][:images]), layouts_of(sample))
        uniform = PyramidOracle(oracle, pyramid.cuts, len(sample.ids))
        steps = uniform.greedy(sample, decision, 3)
        for got, logits in zip(out.logits, steps.logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)
        sample = sample.extended(steps.tokens + QUESTION)
        for got, logits in zip(again.logits, uniform.greedy(sample, decision, 2).logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)


def two_turns(model, batch, **more):
    out = greedy(model, batch, max_new_tokens=3, **more)
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones(len(batch.samples), 7).long()], 1)
    ids = torch.cat([out.sequences, torch.tensor([QUESTION] * len(batch.samples))], 1)
    cache = out.past_key_values
    again = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2, do_sample=False,
                           output_logits=True, return_dict_in_generate=True)  # fmt: skip
    return out, again


@matrix("attention,padding,images", [("sdpa", "left", 2), ("eager", "single", 1), ("flash_attention_2", "left", 1)])
@matrix("name", list(UNIFORM))
@families
def test_uniform_is_the_oracle(family, name, attention, padding, images, get_model, get_oracle):
    model, batch = get_model(family, attention), standard_batch(family, padding, images)
    with patched(model, UNIFORM[name], regions_of(batch), cache="uniform"):
        out, again = two_turns(model, batch)
    assert len(set(cache_lengths(again.past_key_values))) == 1
    assert again.past_key_values.get_seq_length() == again.sequences.shape[1] - 1
    assert_two_turns(model, get_oracle(family), batch, UNIFORM[name], out, again, images)


@matrix("attention,padding,images", [("sdpa", "left", 2), ("sdpa", "none", 1), ("eager", "single", 1)])
@matrix("name", list(UNIFORM))
@families
def test_static_cache(family, name, attention, padding, images, get_model, get_oracle):
    """The static tensors stay in place, hold the kept tokens in front, and serve a second turn."""
    model, batch = get_model(family, attention), standard_batch(family, padding, images)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=260)
    with patched(model, UNIFORM[name], regions_of(batch), cache="uniform") as stats:
        out, again = two_turns(model, batch, past_key_values=cache)
    assert_two_turns(model, get_oracle(family), batch, UNIFORM[name], out, again, images)
    used = {int(layer.cumulative_length) for layer in cache.layers}
    prompt = batch.inputs["input_ids"].shape[1]
    lost = [sum(stats.tokens_before[row * images :][:images]) - sum(stats.tokens_after_ilp[row * images :][:images])
            for row in range(len(batch.samples))]  # fmt: skip
    if padding == "single":
        assert used == {prompt - lost[0] + 2 + 1 + 4 + 1}
    assert len(used) == 1 and all(not layer.keys[:, :, max(used) :].any() for layer in cache.layers)


@matrix("name", ["plc", "ilp_budget"])
@families
def test_static_by_name(family, name, get_model):
    """cache_implementation="static" generates what a dynamic uniform cache does, and may be used again."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    with patched(model, METHODS[name], regions_of(batch), cache="uniform"):
        wanted = greedy(model, batch)
        for _ in range(2):
            out = greedy(model, batch, cache_implementation="static")
            assert torch.equal(out.sequences, wanted.sequences)
            torch.testing.assert_close(torch.stack(out.logits), torch.stack(wanted.logits), atol=ATOL, rtol=0)


def test_reset_forgets(get_model):
    """A static cache that was reset serves another prompt, also outside the block."""
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "single", 1)
    plain = model(**batch.inputs).logits
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with patched(model, METHODS["compose"], regions_of(batch), cache="uniform"):
        wanted = model(**batch.inputs, past_key_values=cache).logits
        cache.reset()
        torch.testing.assert_close(model(**batch.inputs, past_key_values=cache).logits, wanted, atol=ATOL, rtol=0)
    cache.reset()
    assert type(cache) is StaticCache and not hasattr(cache, "_crop_state")
    torch.testing.assert_close(model(**batch.inputs, past_key_values=cache).logits, plain, atol=ATOL, rtol=0)


@families
def test_beams_of_a_uniform_cache(family, get_model):
    """Pooling leaves nothing to make uniform: the same beams."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    found = []
    for policy in ("ragged", "uniform"):
        with patched(model, METHODS["plc"], regions_of(batch), cache=policy):
            found.append(greedy(model, batch, num_beams=3).sequences)
    assert torch.equal(*found)


def test_refused(get_model):
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "single", 1)
    with pytest.raises(ValueError, match="patch: cache must be one of ragged, uniform, got 'static'"):
        patched(model, METHODS["plc"], cache="static").__enter__()
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with patched(model, METHODS["plc"]), pytest.raises(ValueError, match="StaticCache: .* use patch.*cache='uniform'"):
        model(**batch.inputs, past_key_values=static)
    with patched(model, METHODS["plc"]), pytest.raises(ValueError, match="got 'static': .* cache='uniform'"):
        greedy(model, batch, cache_implementation="static")
    with patched(model, METHODS["plc"], cache="uniform"), pytest.raises(ValueError, match="'static', got 'quantized'"):
        greedy(model, batch, cache_implementation="quantized")
    flash = get_model("llava", "flash_attention_2")
    with patched(flash, METHODS["plc"], cache="uniform"), pytest.raises(ValueError, match="under flash attention"):
        flash(**batch.inputs, past_key_values=static)
    assert not static.is_initialized and NUM_LAYERS == len(static.layers)
