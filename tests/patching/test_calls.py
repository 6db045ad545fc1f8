"""State belongs to a call: calls inside calls and interleaved generations in one block; threads: `test_threads.py`."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor

from crop.methods import InnerLLMPruning
from crop.patching.patch import patch
from tests.support.batches import standard_batch
from tests.support.cases import METHODS, get_model, greedy
from tests.support.tiny_families import THOROUGH, decoder_of

pytestmark = pytest.mark.usefixtures("one_thread", "flash")
families = pytest.mark.parametrize("family", THOROUGH)
PLACES = ("vision", "layer", "attention", "cut", "norm")


def same(found, wanted) -> bool:
    logits = zip(found.logits, wanted.logits, strict=True)
    return torch.equal(found.sequences, wanted.sequences) and all(torch.equal(one, other) for one, other in logits)


def place_of(family, model, name):
    decoder = decoder_of(family, model)
    return {
        "vision": next(m for n, m in model.model.named_children() if n in ("visual", "vision_tower", "vision_model")),
        "layer": decoder.layers[0],
        "attention": decoder.layers[1].self_attn,
        "cut": decoder.layers[2].input_layernorm,
        "norm": decoder.norm,
    }[name]


@pytest.mark.parametrize("beams", [1, 2])
@families
def test_a_logits_processor_that_calls_the_model(family, beams):
    """Another prompt, and another generation, between the steps of one."""
    model = get_model(family, "sdpa")
    batch, other = standard_batch(family, "left", 1), standard_batch(family, "left", 2)
    seen: list[object] = []

    class Calls(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((model(**other.inputs).logits, greedy(model, other, steps=2)))
            return scores

    with patch(model, METHODS["compose"]):
        alone, forward, generated = (
            greedy(model, batch, num_beams=beams),
            model(**other.inputs).logits,
            greedy(model, other, steps=2),
        )
        found = greedy(model, batch, num_beams=beams, logits_processor=[Calls()])
    assert same(found, alone) and seen
    for logits, inner in seen:
        assert torch.equal(logits, forward) and same(inner, generated)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["plc", "budget", "compose"])
@families
def test_a_hook_that_calls_the_model(family, name, place):
    """The outer call goes on as if nothing had been, wherever in it the inner one is made; an error in that one, too."""
    model = get_model(family, "sdpa")
    batch, other = standard_batch(family, "left", 1), standard_batch(family, "left", 2)
    broken = {**other.inputs, "attention_mask": other.inputs["attention_mask"][:, :-1]}
    seen: list[torch.Tensor] = []
    busy = False

    def call(module, args, output):
        nonlocal busy
        if not busy:
            busy = True
            with pytest.raises(ValueError, match="attention_mask must be"):
                model(**broken)
            seen.append(model(**other.inputs).logits)
            busy = False

    with patch(model, METHODS[name]) as stats:
        wanted, inner = model(**batch.inputs).logits, model(**other.inputs).logits
        handle = place_of(family, model, place).register_forward_hook(call)
        try:
            found = model(**batch.inputs).logits
        finally:
            handle.remove()
        assert torch.equal(found, wanted) and len(seen) >= 1
        assert all(torch.equal(logits, inner) for logits in seen)
        assert len(stats.prefills) == 3 + len(seen)
        assert torch.equal(model(**batch.inputs).logits, wanted)


@families
def test_statistics_of_every_prefill(family):
    """In the order of their ends; the attributes of the block are those of the last one; a failed call leaves none."""
    model = get_model(family, "sdpa")
    batch, other = standard_batch(family, "left", 1), standard_batch(family, "left", 2)
    with patch(model, METHODS["compose"]) as stats:
        assert stats.tokens_before == [] and stats.seconds == {} and not stats.prefills
        model(**batch.inputs)
        first = stats.tokens_after_ilp, [kept.tolist() for kept in stats.kept]
        model(**other.inputs)
        greedy(model, batch)
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(**{**other.inputs, "attention_mask": other.inputs["attention_mask"][:, :-1]})
    assert len(stats.prefills) == 3
    for entry in (stats, stats.prefills[0], stats.prefills[2]):
        assert (entry.tokens_after_ilp, [kept.tolist() for kept in entry.kept]) == first
    assert stats.prefills[1].tokens_after_ilp != first[0]


def test_one_model_in_a_block_of_another(family="llava"):
    """Two models, one block around the other: each call is told by its model."""
    model, other = get_model(family, "sdpa"), get_model(family, "eager")
    batch = standard_batch(family, "left", 1)
    strict = InnerLLMPruning(mode="strict", layer=2)
    with patch(model, METHODS["plc"]) as outer, patch(other, METHODS["budget"]) as inner:
        wanted = model(**batch.inputs).logits, other(**batch.inputs).logits
        handle = model.model.language_model.layers[1].register_forward_hook(lambda *_: other(**batch.inputs) and None)
        assert torch.equal(model(**batch.inputs).logits, wanted[0])
        handle.remove()
        assert torch.equal(other(**batch.inputs).logits, wanted[1])
        assert len(outer.prefills) == 2 and len(inner.prefills) == 3
        with pytest.raises(RuntimeError, match="must not be patched already"):
            with patch(model, strict):
                pass
