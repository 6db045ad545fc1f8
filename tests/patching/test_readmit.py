"""A second question about other regions: the conversation is cut anew, as a fresh run over all of it would be."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, PreLLMCompression, Pyramid
from crop.patching.patch import patch
from tests.support import zoo
from tests.support.contract import ATOL, METHODS, REGIONS, cache_lengths, greedy, layouts_of, patched, regions_of
from tests.support.pyramid import decide
from tests.support.tiny_models import FAMILIES, LLAVA_GRID, make_sample, standard_batch, text_tokens
from tests.support.zoo import cases

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
families = matrix("family", FAMILIES)
AGAIN = {**{name: METHODS[name] for name in ("ilp_budget", "ilp_strict")},
         "last": InnerLLMPruning(0.2, layer=1, rows="last"), "pyramid": Pyramid.steps((2, 4), keep=0.4)}  # fmt: skip
QUESTIONS = (text_tokens(6, 31), text_tokens(3, 32))


def other(regions):
    """Elsewhere in the same images."""
    return [Region.box(1 - x1, 1 - y1, 1 - x0, 1 - y0) for region in regions for x0, y0, x1, y1 in region.boxes[:1]]


def ask(model, batch, out, question):
    ids = torch.cat([out.sequences, torch.tensor([question] * len(out.sequences))], 1)
    mask = torch.ones_like(ids)
    mask[:, : batch.inputs["attention_mask"].shape[1]] = batch.inputs["attention_mask"]
    return model.generate(ids, attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=3,
                          do_sample=False, output_logits=True, return_dict_in_generate=True)  # fmt: skip


def assert_fresh(out, stats, oracle, method, samples, regions):
    """Kept tokens and the logits of every step are those of a run over the whole conversation."""
    kept, found = iter(stats.kept), []
    for row, (sample, mine) in enumerate(zip(samples, regions, strict=True)):
        pyramid, decision = decide(oracle, sample, method, mine, layouts_of(sample))
        for image in range(len(mine)):
            assert next(kept).tolist() == decision.kept_original(image)
        steps = pyramid.greedy(sample, decision, 3)
        for got, logits in zip(out.logits, steps.logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)
        found.append(sample.extended(steps.tokens))
    return found


@matrix("attention,padding,images", [("sdpa", "left", 2), ("eager", "single", 1), ("flash_attention_2", "left", 1)])
@matrix("name", list(AGAIN))
@families
def test_three_questions(family, name, attention, padding, images, get_model, get_oracle):
    model, oracle, method = get_model(family, attention), get_oracle(family), AGAIN[name]
    batch = standard_batch(family, padding, images)
    regions = [[r for r in REGIONS[row][:images]] for row in range(len(batch.samples))]
    with patched(model, method, regions_of(batch), readmit=True) as stats:
        out = greedy(model, batch, max_new_tokens=3)
    first = stats.kept
    samples = assert_fresh(out, stats, oracle, method, batch.samples, regions)
    for question, now in zip(QUESTIONS, ([other(mine) for mine in regions], regions), strict=True):
        with patched(model, method, [r for mine in now for r in mine], readmit=True) as stats:
            out = ask(model, batch, out, question)
        samples = [sample.extended(question) for sample in samples]
        if now is not regions:
            assert any(set(b.tolist()) - set(a.tolist()) for a, b in zip(first, stats.kept, strict=True))
        samples = assert_fresh(out, stats, oracle, method, samples, now)
    text = [len(sample.ids) - sum(h * w for h, w in sample.grids) - 1 for sample in samples]
    kept = [sum(len(k) for k in stats.kept[row * images :][:images]) for row in range(len(samples))]
    late = max(t + k for t, k in zip(text, kept, strict=True))
    assert cache_lengths(out.past_key_values)[-1] == late
    assert cache_lengths(out.past_key_values)[0] == out.sequences.shape[1] - 1


@families
def test_everything_may_come_back(family, get_model, get_oracle):
    """The second question needs the whole image: nothing is dropped any more, nor was anything lost."""
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    batch, method = standard_batch(family, "left", 1), METHODS["ilp_strict"]
    with patched(model, method, regions_of(batch), readmit=True):
        out = greedy(model, batch, max_new_tokens=3)
    with patched(model, method, readmit=True) as stats:
        again = ask(model, batch, out, QUESTIONS[0])
    prompt = batch.inputs["input_ids"].shape[1]
    samples = [
        sample.extended(out.sequences[row, prompt:].tolist() + QUESTIONS[0]) for row, sample in enumerate(batch.samples)
    ]
    assert_fresh(again, stats, oracle, method, samples, [[Region.whole()]] * 2)
    assert len(set(cache_lengths(again.past_key_values))) == 1


def test_a_second_image(get_model, get_oracle):
    """The later turn brings an image of its own: regions are given for both."""
    model, oracle, method = get_model("llava", "sdpa"), get_oracle("llava"), METHODS["ilp_budget"]
    batch, turn = standard_batch("llava", "single", 1), make_sample("llava", [4, LLAVA_GRID, 5], seed=12)
    with patched(model, method, regions_of(batch), readmit=True):
        out = greedy(model, batch, max_new_tokens=3)
    ids = torch.cat([out.sequences, torch.tensor([turn.ids])], 1)
    regions = [REGIONS[1][1], REGIONS[1][0]]
    with patched(model, method, regions, readmit=True) as stats:
        again = model.generate(ids, attention_mask=torch.ones_like(ids), pixel_values=turn.pixels[0], max_new_tokens=3,
                               past_key_values=out.past_key_values, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    sample = batch.samples[0].extended(out.sequences[0, -3:].tolist()).joined(turn)
    assert_fresh(again, stats, oracle, method, [sample], [regions])


@families
def test_one_prefix_many_questions(family, get_model, get_oracle):
    """A copied cache carries the memory; so do the cache's own operations on the batch."""
    model, oracle, method = get_model(family, "sdpa"), get_oracle(family), METHODS["ilp_budget"]
    batch = standard_batch(family, "left", 1)
    with patched(model, method, regions_of(batch), readmit=True):
        out = greedy(model, batch, max_new_tokens=3)
    prompt = batch.inputs["input_ids"].shape[1]
    out.past_key_values = copy.deepcopy(out.past_key_values)
    out.past_key_values.batch_select_indices(torch.tensor([1, 0]))
    out.sequences = out.sequences[[1, 0]]
    swapped = type(batch)(family, batch.samples[::-1], batch.padding,
                          {"attention_mask": batch.inputs["attention_mask"][[1, 0]]})  # fmt: skip
    regions = [[REGIONS[0][1]], [REGIONS[1][1]]]
    if family == "qwen2_5_vl":
        model.model.rope_deltas = model.model.rope_deltas[[1, 0]]
    with patched(model, method, [r for mine in regions for r in mine], readmit=True) as stats:
        again = ask(model, swapped, out, QUESTIONS[0])
    samples = [
        sample.extended(out.sequences[row, prompt:].tolist() + QUESTIONS[0])
        for row, sample in enumerate(swapped.samples)
    ]
    assert_fresh(again, stats, oracle, method, samples, regions)


DEEPSTACK = {
    "all behind": InnerLLMPruning(0.3, layer=1),
    "one behind": InnerLLMPruning(0.3, layer=2),
    "none behind": InnerLLMPruning(0.3, layer=3),
    "pyramid": Pyramid((InnerLLMPruning(0.4, layer=1), InnerLLMPruning(0.2, layer=2))),
}


@matrix("method", DEEPSTACK.values(), ids=DEEPSTACK)
def test_deepstack(method):
    """Levels of vision features that are added behind the cut come back with the tokens, also in a batch whose rows
    changed places."""
    model, batch = cases.get_model("qwen3_vl", "sdpa"), zoo.standard_batch("qwen3_vl", "left", 1)
    batch = zoo.make_batch(batch.samples[:2], "left")
    more = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)

    def run(inputs, regions, **readmit):
        with patch(model, method, regions, **readmit) as stats:
            return model.generate(**inputs, **more), [index.tolist() for index in stats.kept]

    def assert_as_fresh(samples, regions, found):
        wanted, kept = run(zoo.make_batch(samples, "left").inputs, regions)
        assert found[1] == kept
        torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(wanted.logits), atol=ATOL, rtol=0)

    regions = [REGIONS[row][0] for row in (0, 1)]
    out, first = run(batch.inputs, regions, readmit=True)
    # Turn 2: the rows change places.
    out.past_key_values.batch_select_indices(torch.tensor([1, 0]))
    model.model.rope_deltas = model.model.rope_deltas[[1, 0]]
    prompt = batch.inputs["input_ids"].shape[1]
    said = [row + QUESTIONS[0] for row in out.sequences[[1, 0], prompt:].tolist()]
    ids = torch.cat([batch.inputs["input_ids"][[1, 0]], torch.tensor(said)], 1)
    mask = torch.nn.functional.pad(batch.inputs["attention_mask"][[1, 0]], (0, len(said[0])), value=1)
    samples = [sample.extended(words) for sample, words in zip(batch.samples[::-1], said, strict=True)]
    elsewhere = other(regions[::-1])
    again = run(dict(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values), elsewhere, readmit=True)
    assert any(set(b) - set(a) for a, b in zip(first[::-1], again[1], strict=True))
    assert_as_fresh(samples, elsewhere, again)


@matrix("method", DEEPSTACK.values(), ids=DEEPSTACK)
@torch.no_grad()
def test_deepstack_and_a_second_image(method):
    """Levels of the image that comes now stand beside those of the one before."""
    model, first = cases.get_model("qwen3_vl", "sdpa"), zoo.make_sample("qwen3_vl", [3, (48, 24), 6], seed=11)
    turn = zoo.make_sample("qwen3_vl", [4, (24, 48), 5], seed=12)
    whole = replace(first, ids=first.ids + turn.ids, images=first.images + turn.images)
    regions, past = [REGIONS[1][0], REGIONS[1][1]], len(first.ids)
    given, more = zoo.make_batch([whole], "none").inputs, zoo.make_batch([turn], "none").inputs
    ids, _ = model.model.get_rope_index(
        given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"], attention_mask=given["attention_mask"]
    )
    with patch(model, method, REGIONS[0][0], readmit=True):
        cache = model(**zoo.make_batch([first], "none").inputs, use_cache=True).past_key_values
    with patch(model, method, regions, readmit=True) as stats:
        more |= dict(attention_mask=given["attention_mask"], position_ids=ids[..., past:], past_key_values=cache)
        logits = model(**more).logits
    with patch(model, method, regions) as fresh:
        wanted = model(**given).logits[:, past:]
    assert [index.tolist() for index in stats.kept] == [index.tolist() for index in fresh.kept]
    torch.testing.assert_close(logits[:, -1], wanted[:, -1], atol=ATOL, rtol=0)


def test_refused(get_model):
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "single", 1)
    ilp, plc = METHODS["ilp_budget"], PreLLMCompression(1, 2, 2)
    entry = {
        "cache must be 'ragged' to readmit": dict(method=ilp, cache="uniform"),
        "positions must be 'original' to readmit": dict(method=ilp, positions="compact"),
        "method must prune inside the decoder to readmit": dict(method=plc),
    }
    for message, arguments in entry.items():
        with pytest.raises(ValueError, match=f"patch: {message}.*fresh cache"):
            patched(model, **arguments, readmit=True).__enter__()
    with patched(model, Compose(plc, ilp), regions_of(batch), readmit=True):
        with pytest.raises(ValueError, match="readmit must be False with Pre-LLM Compression.*fresh cache"):
            model(**batch.inputs)
    with patched(model, ilp, regions_of(batch)):
        out = greedy(model, batch, max_new_tokens=3)
    with patched(model, ilp, regions_of(batch), readmit=True):
        with pytest.raises(ValueError, match="readmit must be False for a cache that was made without.*fresh cache"):
            ask(model, batch, out, QUESTIONS[0])
    with patched(model, ilp, regions_of(batch), readmit=True):
        out = greedy(model, batch, max_new_tokens=3)
    with patched(model, InnerLLMPruning(layer=3), regions_of(batch), readmit=True):
        with pytest.raises(ValueError, match="layer must be 2, where this cache was pruned before, got 3"):
            ask(model, batch, out, QUESTIONS[0])
    with patched(model, ilp, regions_of(batch)):  # a turn that nobody remembers
        out = ask(model, batch, out, QUESTIONS[0])
    with patched(model, ilp, regions_of(batch), readmit=True):
        with pytest.raises(ValueError, match="readmit must be False for a cache that was made without"):
            ask(model, batch, out, QUESTIONS[0])
