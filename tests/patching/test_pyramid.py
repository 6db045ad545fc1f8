"""`crop.patch` with several cuts: every stage of the decoder sees its own tokens."""

from __future__ import annotations

import pytest
import torch

from crop.methods import Compose, InnerLLMPruning, PreLLMCompression, Pyramid
from tests.support.contract import ATOL, REGIONS, cache_lengths, greedy, layouts_of, patched, regions_of
from tests.support.pyramid import PyramidOracle, decide
from tests.support.tiny_models import FAMILIES, NUM_LAYERS, standard_batch, text_tokens

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

families = pytest.mark.parametrize("family", FAMILIES)
METHODS = {
    "budget": Pyramid((InnerLLMPruning(0.5, layer=1), InnerLLMPruning(0.3, layer=3), InnerLLMPruning(0.1, layer=4))),
    "drop": Pyramid.steps((2, 3, 5), keep=0.5, rows="last", floor=0),
    "strict_last": Pyramid((InnerLLMPruning(0.4, mode="soft", layer=2), InnerLLMPruning(mode="strict", layer=4))),
    "pooled": Compose(PreLLMCompression(1, 2, 2, ring=1), Pyramid.steps((1, 4), keep=0.4)),
    "idle_first": Pyramid(
        (InnerLLMPruning(1.0, layer=1), InnerLLMPruning(0.3, layer=3), InnerLLMPruning(0.6, layer=4))
    ),
}
CASES = [("sdpa", "single", 1), ("sdpa", "left", 2), ("eager", "left", 2), ("flash_attention_2", "left", 1)]


@pytest.mark.parametrize("attention,padding,images", CASES)
@pytest.mark.parametrize("name", list(METHODS))
@families
def test_pyramid_is_the_oracle(family, name, attention, padding, images, get_model, get_oracle):
    model, oracle, method = get_model(family, attention), get_oracle(family), METHODS[name]
    batch = standard_batch(family, padding, images)
    with patched(model, method, regions_of(batch)) as stats:
        out = greedy(model, batch, max_new_tokens=3)
        first = dict(enumerate(stats.kept)), {n: stats.kept_at(n) for n in range(NUM_LAYERS)}, dict(stats.tokens_from)
        question = text_tokens(4, 9)
        mask = torch.cat([batch.inputs["attention_mask"], torch.ones(len(batch.samples), 7).long()], 1)
        extra = torch.tensor([question] * len(batch.samples))
        again = model.generate(
            torch.cat([out.sequences, extra], 1), attention_mask=mask, past_key_values=out.past_key_values,
            max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    kept, kept_at, tokens_from = first
    number = 0
    for row, sample in enumerate(batch.samples):
        pyramid, decision = decide(oracle, sample, method, list(REGIONS[row][:images]), layouts_of(sample))
        for image in range(images):
            cells = decision.cells[image]
            assert kept[number].tolist() == [cells[k][1] for k in decision.kept[image]]
            for layer in range(NUM_LAYERS):
                alive = [keep[image] for first, keep in pyramid.cuts if first <= layer][-1:] or [range(len(cells))]
                assert kept_at[layer][number].tolist() == [cells[k][1] for k in alive[0]], layer
                assert tokens_from[max(n for n in tokens_from if n <= layer)][number] == len(alive[0])
            number += 1
        steps = pyramid.greedy(sample, decision, 3)
        for got, logits in zip(out.logits, steps.logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)
        later = pyramid.greedy(sample.extended(steps.tokens + question), decision, 2)
        for got, logits in zip(again.logits, later.logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)


@families
def test_stages_get_shorter(family, get_model):
    """The cache holds per layer what the stages say, and the layer average is theirs."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "single", 1)
    (grid,) = batch.grids
    count, length = grid[0] * grid[1], batch.inputs["input_ids"].shape[1]
    with patched(model, METHODS["drop"], regions_of(batch)) as stats:
        cache = model(**batch.inputs).past_key_values
    tokens = [count, count, round(count / 2), round(count / 4), round(count / 4), round(count / 8)]
    assert cache_lengths(cache) == [length - count + n for n in tokens]
    assert stats.layer_average == [sum(tokens) / NUM_LAYERS]
    assert stats.tokens_from == {0: [count], 2: [tokens[2]], 3: [tokens[3]], 5: [tokens[5]]}


@families
def test_keep_all_pyramid_is_bit_identical(family, get_model):
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 2)
    plain = model(**batch.inputs).logits
    with patched(model, Pyramid.steps((1, 3), keep=1.0), regions_of(batch)):
        assert torch.equal(model(**batch.inputs).logits, plain)


@pytest.mark.parametrize("layers", [(3, 1), (2, 4)])
def test_second_image_is_cut_elsewhere(layers, get_model, get_oracle):
    """A pruned cache takes another method: an image cut at one layer, then one cut at another, then text."""
    model, oracle = get_model("llava", "sdpa"), get_oracle("llava")
    batch = standard_batch("llava", "single", 1)
    first, second = (InnerLLMPruning(0.3, layer=layer) for layer in layers)
    prompt = dict(input_ids=batch.inputs["input_ids"], pixel_values=batch.inputs["pixel_values"])
    question, kept = text_tokens(5, 3), []
    with patched(model, first, [REGIONS[0][0]]) as stats:
        cache = model(**prompt).past_key_values
        kept.append(tuple(stats.kept[0].tolist()))
    with patched(model, second, [REGIONS[1][0]]) as stats:
        model(**prompt, past_key_values=cache)
        kept.append(tuple(stats.kept[0].tolist()))
    with patched(model, None):
        logits = model(torch.tensor([question]), past_key_values=cache).logits[0]

    (once,) = batch.samples
    twice, every = once.joined(once), tuple(range(64))
    start = oracle.keep_all(twice)
    before = PyramidOracle(oracle, [(layers[0], (kept[0], every))])
    (masses,) = before._masses(twice, start, second, [1], len(once.ids), len(twice.ids))
    wanted, near_tie = oracle._choose(masses, second.select(layouts_of(twice)[1], REGIONS[1][0]))
    assert not near_tie and wanted == kept[1]
    stages = {layers[0]: (kept[0], every), layers[1]: (every, kept[1]), max(layers): tuple(kept)}
    pyramid = PyramidOracle(oracle, sorted(stages.items()))
    reference = pyramid.forward(twice.extended(question), start)[0][-5:]
    torch.testing.assert_close(logits, reference, atol=ATOL, rtol=0)
    cut = [sum(n >= layer for layer in layers) for n in range(NUM_LAYERS)]
    assert cache_lengths(cache) == [len(twice.ids) + 5 - (64 - len(kept[0])) * n for n in cut]


WRONG = {
    "no stage": (ValueError, "stages must have one or more layers that ascend, got \\[\\]", ()),
    "order": (ValueError, r"ascend, got \[3, 2\]", (InnerLLMPruning(0.5, layer=3), InnerLLMPruning(0.2))),
    "twice": (ValueError, r"ascend, got \[2, 2\]", (InnerLLMPruning(0.5), InnerLLMPruning(0.2))),
    "no method": (TypeError, "methods of one cut each, got 0.5", (0.5,)),
    "pooling": (TypeError, "methods of one cut each, got PreLLM", (PreLLMCompression(),)),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_stages_that_cannot_be(case):
    error, message, stages = WRONG[case]
    with pytest.raises(error, match=message):
        Pyramid(stages)
