"""`crop.patch` over several turns: a pruned cache keeps working, alone, batched, copied, reordered."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from crop.methods import InnerLLMPruning
from crop.patching.hf import cache_of
from tests.support.batches import make_batch, make_sample, standard_batch
from tests.support.cases import (
    ATOL,
    METHODS,
    REGIONS,
    as_argument,
    assert_steps,
    cache_lengths,
    decide,
    expected,
    families,
    get_model,
    get_oracle,
    greedy,
    next_turn,
    patched,
    position_arguments,
    regions_of,
)
from tests.support.families.entry import ATTENTIONS, IMAGE, text_tokens
from tests.support.tiny_families import THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

attentions = pytest.mark.parametrize("attention", ATTENTIONS)
methods_ = pytest.mark.parametrize("name", list(METHODS))
QUESTION = text_tokens(6, 31)  # the second turn


def assert_turn(out, prompt, oracle, samples, decisions):
    """Three greedy steps after `samples`, the earlier decisions still in force."""
    for row, (sample, decision) in enumerate(zip(samples, decisions, strict=True)):
        steps = oracle.greedy(sample, decision, 3)
        for number in range(3):
            torch.testing.assert_close(out.logits[number][row], steps.logits[number], atol=ATOL, rtol=0)
        assert out.sequences[row, prompt:].tolist() == steps.tokens


@pytest.mark.parametrize(
    "attention,second_block",
    [("sdpa", False), ("eager", False), ("flash_attention_2", True), ("sdpa", True)],
)
@methods_
@families(THOROUGH)
def test_second_question(family, attention, name, second_block):
    """Text turns on a pruned cache; also when the first block was left and another one entered."""
    model, oracle = get_model(family, attention), get_oracle(family)
    batch = standard_batch(family, "left", 2) if second_block else standard_batch(family, "single", 1)
    wanted = expected(batch, name)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        first = greedy(model, batch)
        if not second_block:
            lengths = cache_lengths(first.past_key_values)
            out = next_turn(model, batch, first, QUESTION)
            third = next_turn(model, batch, out, QUESTION[:2])
    if second_block:
        lengths = cache_lengths(first.past_key_values)
        with patched(model, METHODS[name], batch, regions_of(batch)):
            out = next_turn(model, batch, first, QUESTION)
            third = next_turn(model, batch, out, QUESTION[:2])
    samples = [e.sample.extended(e.steps.tokens + QUESTION) for e in wanted]
    decisions = [e.decision for e in wanted]
    assert_turn(out, first.sequences.shape[1] + len(QUESTION), oracle, samples, decisions)
    samples = [sample.extended(out.sequences[row, -3:].tolist() + QUESTION[:2]) for row, sample in enumerate(samples)]
    assert_turn(third, out.sequences.shape[1] + 2, oracle, samples, decisions)
    # after turn 1 one token is not in the cache; 6 + 3 and 2 + 3 more follow, one short again
    assert cache_lengths(third.past_key_values) == [n + 14 for n in lengths]
    assert third.past_key_values.get_seq_length() == third.sequences.shape[1] - 1


@pytest.mark.parametrize("attention,padding", [("sdpa", "left"), ("eager", "right"), ("flash_attention_2", "left")])
@methods_
@families(THOROUGH)
def test_pads_in_the_middle(family, attention, padding, name):
    """The samples' second questions differ in length: padding comes to lie behind a pruned prompt."""
    model, oracle = get_model(family, attention), get_oracle(family)
    batch = standard_batch(family, padding, 1)
    wanted = expected(batch, name)
    questions = [text_tokens(3, 51), text_tokens(6, 52), text_tokens(4, 53)]
    samples = [sample.extended(question) for sample, question in zip(batch.samples, questions, strict=True)]
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    places = [oracle.positions(sample) for sample in samples]
    positions = torch.zeros(*places[0].shape[:-1], 3, 6, dtype=torch.long)
    for row, question in enumerate(questions):
        ids[row, -len(question) :] = torch.tensor(question)
        mask[row, -len(question) :] = 1
        positions[..., row, -len(question) :] = places[row][..., -len(question) :]
    # A forward with one axis of positions counts the padding.
    start = torch.tensor(batch.offsets)[:, None] if positions.dim() == 2 else 0
    with patched(model, METHODS[name], batch, regions_of(batch)):
        cache = model(**batch.inputs).past_key_values
        logits = model(
            input_ids=ids,
            attention_mask=torch.cat([batch.inputs["attention_mask"], mask], 1),
            position_ids=positions + start,
            **as_argument(model, cache),
        ).logits
    for row, expect in enumerate(wanted):
        count = len(questions[row])
        reference = oracle.forward(samples[row], expect.decision)[0][-count:]
        torch.testing.assert_close(logits[row, -count:], reference, atol=ATOL, rtol=0)


@methods_
@attentions
@families(THOROUGH)
def test_chunk_by_forward(family, attention, name):
    """The same without generate: forward calls on one cache, several tokens at a time."""
    model, oracle = get_model(family, attention), get_oracle(family)
    batch = standard_batch(family, "left", 1)
    wanted = expected(batch, name)
    mask = batch.inputs["attention_mask"]
    with patched(model, METHODS[name], batch, regions_of(batch)):
        cache, samples = model(**batch.inputs).past_key_values, batch.samples
        for size in (4, 1, 3):
            mask = torch.cat([mask, mask.new_ones(len(mask), size)], 1)
            added = text_tokens(size, size)
            samples = [sample.extended(added) for sample in samples]
            logits = model(
                input_ids=torch.tensor([added] * len(mask)),
                attention_mask=mask,
                **as_argument(model, cache),
                **position_arguments(oracle, samples, size),
            ).logits
            assert logits.shape[1] == size
    for row, expect in enumerate(wanted):
        reference = oracle.forward(samples[row], expect.decision)[0][-3:]
        torch.testing.assert_close(logits[row], reference, atol=ATOL, rtol=0)


@pytest.mark.parametrize("attention,second_block", [("sdpa", False), ("eager", True), ("flash_attention_2", True)])
@methods_
def test_second_image(attention, name, second_block):
    """LLaVA: the second turn brings a new image into the pruned cache."""
    model, oracle = get_model("llava", attention), get_oracle("llava")
    method = METHODS[name]
    regions = [REGIONS[0][0], REGIONS[1][0] if second_block else REGIONS[0][0]]
    batch = standard_batch("llava", "single", 1)
    (expect,) = expected(batch, name)
    turn = make_sample("llava", [4, (48, 32), 5], seed=12)

    def second(first):
        ids = torch.cat([first.sequences, torch.tensor([turn.ids])], 1)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=turn.images[0].arguments["pixel_values"],
            **as_argument(model, cache_of(first)),
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return ids.shape[1], out

    with patched(model, method, batch, regions[0]) as stats:
        first = greedy(model, batch)
        if not second_block:  # its picture has the size of the first one
            prompt, out = second(first)
    if second_block:
        with patched(model, method, make_batch([turn], "none"), regions[1]) as stats:
            prompt, out = second(first)

    sample = batch.samples[0].extended(expect.steps.tokens).joined(turn)
    decision = decide(oracle, sample, method, [regions[1]], previous=expect.decision)
    assert stats.kept[-1].tolist() == decision.kept_original(1)
    assert_turn(out, prompt, oracle, [sample], [decision])
    # What a third turn would be told of the cache: both images are counted whole.
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


@methods_
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_image_after_a_text_turn(attention, name):
    """LLaVA: the cache already holds a text-only turn when the first image comes."""
    model, oracle = get_model("llava", attention), get_oracle("llava")
    text = make_sample("llava", [9], seed=21)
    turn = make_sample("llava", [2, (48, 32), 5], seed=22)
    with patched(model, METHODS[name], make_batch([turn], "none"), REGIONS[0][0]) as stats:
        cache = model(torch.tensor([text.ids])).past_key_values
        logits = model(
            torch.tensor([turn.ids]), pixel_values=turn.images[0].arguments["pixel_values"], **as_argument(model, cache)
        ).logits
    sample = text.joined(turn)
    decision = decide(oracle, sample, METHODS[name], [REGIONS[0][0]])
    assert stats.kept[0].tolist() == decision.kept_original(0)
    reference = oracle.forward(sample, decision)[0][-5:]
    torch.testing.assert_close(logits[0, -5:], reference, atol=ATOL, rtol=0)


@methods_
@pytest.mark.parametrize("padding", ["single", "left"])
@families(THOROUGH)
def test_copied_cache(family, padding, name):
    """A copied cache (one prefix, several questions) carries its pruning along."""
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    batch = standard_batch(family, padding, 1)
    wanted = expected(batch, name)
    questions = [text_tokens(5, 41), text_tokens(5, 42)]
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones(len(batch.samples), 5).long()], 1)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        prefix = model(**batch.inputs).past_key_values
        for question in questions:
            cache = copy.deepcopy(prefix)
            ids = torch.tensor([question] * len(batch.samples))
            samples = [sample.extended(question) for sample in batch.samples]
            more = position_arguments(oracle, samples, 5)
            logits = model(input_ids=ids, attention_mask=mask, **as_argument(model, cache), **more).logits
            logits = logits[:, -1]
            for row, expect in enumerate(wanted):
                reference = oracle.forward(samples[row], expect.decision)[0][-1]
                torch.testing.assert_close(logits[row], reference, atol=ATOL, rtol=0)


@methods_
@families(THOROUGH, fast=True)
def test_repeated_cache(family, name):
    """One prefix answers several questions at once: the cache's own batch operations carry the pruning along."""
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    batch = standard_batch(family, "left", 1)
    wanted = expected(batch, name)
    question = text_tokens(5, 43)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        cache = model(**batch.inputs).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 1]))  # first sample, second, first
        cache.reorder_cache(torch.tensor([1, 0, 2]))
        order = [1, 0, 0]
        samples = [batch.samples[row].extended(question) for row in order]
        mask = torch.cat([batch.inputs["attention_mask"][order], torch.ones(3, 5).long()], 1)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None
        logits = model(
            input_ids=torch.tensor([question] * 3),
            attention_mask=mask,
            **as_argument(model, cache),
            **position_arguments(oracle, samples, 5),
        ).logits[:, -1]
    for row, sample in enumerate(samples):
        reference = oracle.forward(sample, wanted[order[row]].decision)[0][-1]
        torch.testing.assert_close(logits[row], reference, atol=ATOL, rtol=0)


@methods_
@families(THOROUGH)
def test_another_method_for_the_second_question(family, name):
    """A pruned cache goes on under no method or another one: it prunes nothing without an image."""
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    batch = standard_batch(family, "single", 1)
    (expect,) = expected(batch, name)
    for method in (None, METHODS["plc"], InnerLLMPruning(keep=0.5, layer=3)):
        with patched(model, METHODS[name], batch, regions_of(batch)):
            first = greedy(model, batch)
        with patched(model, method, batch):
            out = next_turn(model, batch, first, QUESTION)
        sample = expect.sample.extended(expect.steps.tokens + QUESTION)
        assert_turn(out, first.sequences.shape[1] + len(QUESTION), oracle, [sample], [expect.decision])


@methods_
@families(THOROUGH)
def test_own_cache_object(family, name):
    """An empty cache passed in by the caller is filled like the model's own."""
    model = get_model(family, "sdpa")
    batch = standard_batch(family, "single", 1)
    wanted = expected(batch, name)
    cache = DynamicCache(config=model.config.get_text_config())
    with patched(model, METHODS[name], batch, regions_of(batch)):
        out = greedy(model, batch, **as_argument(model, cache))
    assert_steps(out, [e.steps for e in wanted])
    assert out.past_key_values is cache


@methods_
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@families(THOROUGH)
def test_a_placeholder_among_the_answers(family, attention, name):
    """An image token that comes without pixels after the prompt is a token like any other."""
    model, oracle = get_model(family, attention), get_oracle(family)
    batch = standard_batch(family, "single", 1)
    (expect,) = expected(batch, name)
    sample = batch.samples[0]
    with patched(model, METHODS[name], batch, regions_of(batch)):
        cache = model(**batch.inputs).past_key_values
        for chunk in ([IMAGE], [5, IMAGE, 7]):
            sample = sample.extended(chunk)
            logits = model(
                input_ids=torch.tensor([chunk]),
                attention_mask=torch.ones(1, len(sample.ids)).long(),
                **as_argument(model, cache),
                **position_arguments(oracle, [sample], len(chunk)),
            ).logits[0, -1]
            reference = oracle.forward(sample, expect.decision)[0][-1]
            torch.testing.assert_close(logits, reference, atol=ATOL, rtol=0)


@methods_
@families(THOROUGH)
def test_a_pruned_cache_is_not_cut(family, name):
    """Shortening by logical positions cannot be right on layers of different lengths."""
    model = get_model(family, "sdpa")
    batch = standard_batch(family, "single", 1)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        cache = model(**batch.inputs).past_key_values
    lengths = cache_lengths(cache)
    with pytest.raises(NotImplementedError, match="cannot be shortened"):
        cache.crop(-1)
    assert cache_lengths(cache) == lengths
