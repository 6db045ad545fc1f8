"""`crop.patch` under the other ways to generate: no cache, beams, several draws, another thread."""

from __future__ import annotations

import pytest
import torch

from tests.support.batches import standard_batch
from tests.support.cases import (
    ATOL,
    METHODS,
    assert_steps,
    decide,
    expected,
    families,
    get_model,
    get_oracle,
    greedy,
    patched,
    regions_for,
    regions_of,
)
from tests.support.decision import Steps
from tests.support.families.entry import ATTENTIONS
from tests.support.tiny_families import THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

attentions = pytest.mark.parametrize("attention", ATTENTIONS)
methods_ = pytest.mark.parametrize("name", list(METHODS))


@methods_
@attentions
@families(THOROUGH)
def test_generate_without_a_cache(family, attention, name):
    """Each step is a prefill of its own, so the decision is taken anew: text rows have been added."""
    model, oracle = get_model(family, attention), get_oracle(family)
    batch = standard_batch(family, "left", 2)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        out = greedy(model, batch, use_cache=False, max_new_tokens=3)
    steps = []
    for row, sample in enumerate(batch.samples):
        steps.append(Steps())
        for _ in range(3):
            decision = decide(oracle, sample, METHODS[name], regions_for(row, sample))
            steps[row].logits.append(oracle.forward(sample, decision)[0][-1])
            steps[row].tokens.append(int(steps[row].logits[-1].argmax()))
            sample = sample.extended(steps[row].tokens[-1:])
    assert_steps(out, steps)


def search(model, batch, **more):
    return model.generate(
        **batch.inputs,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **more,
    )


@pytest.mark.parametrize("name", ["plc", "strict"])
@pytest.mark.parametrize("padding", ["single", "left"])
@families(THOROUGH)
def test_beams(family, padding, name):
    """Reordering a pruned cache gives what no cache gives (these decide alike at every step)."""
    model = get_model(family, "sdpa")
    batch = standard_batch(family, padding, 1)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        cached = search(model, batch, num_beams=3)
        fresh = search(model, batch, num_beams=3, use_cache=False)
    assert torch.equal(cached.sequences, fresh.sequences)
    torch.testing.assert_close(cached.sequences_scores, fresh.sequences_scores, atol=ATOL, rtol=0)


@methods_
@pytest.mark.parametrize("padding", ["single", "left"])
@families(THOROUGH)
def test_beams_contain_the_oracles_scores(family, padding, name):
    """The score of each returned beam, recomputed by the oracle along its tokens."""
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    batch = standard_batch(family, padding, 1)
    wanted = expected(batch, name)
    prompt = batch.inputs["input_ids"].shape[1]
    with patched(model, METHODS[name], batch, regions_of(batch)):
        out = search(model, batch, num_beams=3, num_return_sequences=2)
    for row, score in enumerate(out.sequences_scores.tolist()):
        expect, total = wanted[row // 2], 0.0
        tokens = out.sequences[row, prompt:].tolist()
        for number, token in enumerate(tokens):
            sample = expect.sample.extended(tokens[:number])
            total += float(oracle.forward(sample, expect.decision)[0][-1].log_softmax(-1)[token])
        assert abs(total / len(tokens) - score) < ATOL  # length penalty 1
