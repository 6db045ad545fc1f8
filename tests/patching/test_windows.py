"""Text models with a sliding window in every layer (Mistral): their configurations tell the window, not the kinds of layers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import transformers

from tests.support.batches import standard_batch
from tests.support.cases import METHODS, assert_steps, decide, greedy, next_turn, patched, regions_for, regions_of
from tests.support.families.entry import TEXT, text_tokens
from tests.support.oracle import Oracle
from tests.support.tiny_families import FAMILIES, build_as

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY, SHORT, LONG = "pixtral", 20, 61  # the long one covers the prompts, not what follows
QUESTION = text_tokens(4, 9)


@functools.cache
def model_of(window: int, attention: str) -> Any:
    config = FAMILIES[FAMILY].config()
    config.text_config = transformers.MistralConfig(**TEXT, sliding_window=window)
    return build_as(FAMILY, config, attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["single", "left"])
@pytest.mark.parametrize(
    "window,name", [(SHORT, "plc"), (SHORT, "strict"), (LONG, "plc"), (LONG, "budget"), (LONG, "compose")]
)
def test_pruned_is_the_oracle(window, name, padding, attention):
    """The prompt, answers past the window, a second question."""
    model, oracle = model_of(window, attention), Oracle(model_of(window, "eager"), FAMILIES[FAMILY])
    batch, method = standard_batch(FAMILY, padding, 1), METHODS[name]
    assert batch.inputs["input_ids"].shape[1] <= LONG
    decisions = [decide(oracle, sample, method, regions_for(row, sample)) for row, sample in enumerate(batch.samples)]
    with patched(model, method, batch, regions_of(batch)) as stats:
        out = greedy(model, batch, 6)
        assert sum(stats.tokens_after_ilp) < sum(stats.tokens_before)
        again = next_turn(model, batch, out, QUESTION, 2)
    steps = [oracle.greedy(sample, d, 6) for sample, d in zip(batch.samples, decisions, strict=True)]
    assert_steps(out, steps)
    later = [s.extended(first.tokens + QUESTION) for s, first in zip(batch.samples, steps, strict=True)]
    assert_steps(again, [oracle.greedy(sample, d, 2) for sample, d in zip(later, decisions, strict=True)])


def test_a_window_that_does_not_cover_the_prompt_cannot_score():
    model, batch = model_of(SHORT, "sdpa"), standard_batch(FAMILY, "single", 1)
    wanted = r"sees all \d+ tokens, which none does \(prune by PreLLMCompression instead\), got 2: .* window of 20"
    with patched(model, METHODS["budget"], batch, regions_of(batch)), pytest.raises(ValueError, match=wanted):
        model(**batch.inputs)
