"""The contract of `crop.patch`: family x attention x padding x images x method against the oracle.

Where padding allows, a batch holds two samples with different images and one of text alone, so that equality with the
oracle, which knows one unpadded sample at a time, is also equality of batched and single.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, Method, PreLLMCompression
from tests.support.batches import standard_batch
from tests.support.cases import (
    ATOL,
    METHODS,
    assert_logits,
    assert_stats,
    assert_steps,
    cache_lengths,
    expected,
    expected_lengths,
    families,
    get_model,
    get_oracle,
    greedy,
    next_turn,
    patched,
    regions_for,
    regions_of,
    skip_what_transformers_cannot,
)
from tests.support.families.entry import ATTENTIONS, NUM_LAYERS, VIDEO
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import FAMILIES, SUPPORTED, THOROUGH, build_model, decoder_of

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
REFUSED = [(family, a) for family in FAMILIES for a in ATTENTIONS if a in FAMILIES[family].refuses]
# Where tests are thorough, all of these; elsewhere every pair of attention x padding, attention x images, padding x images.
ALL = (("single", 1), ("none", 2), ("left", 1), ("right", 2), ("single", 2), ("none", 1), ("left", 2))


def matrix_of_cases() -> list[Any]:
    """(family, attention, padding, images, method); the fast ones: a padded batch of the families that say so."""
    cases = []
    for family, attention in SUPPORTED:
        pairs = [
            (padding, 1 + (ATTENTIONS.index(attention) + j) % 2) for j, padding in enumerate(("left", "right", "none"))
        ]
        for padding, images in ALL if FAMILIES[family].thorough else pairs:
            for name in METHODS if FAMILIES[family].thorough else ("plc", "budget", "compose"):
                fast = FAMILIES[family].fast and attention == "sdpa" and (padding, images) == ("left", 1)
                cases.append(
                    pytest.param(family, attention, padding, images, name, marks=pytest.mark.fast if fast else ())
                )
    return cases


@matrix("family,attention,padding,images,name", matrix_of_cases())
def test_pruned_is_the_oracle(family, attention, padding, images, name):
    """Every row of the prefill, and decode with the pruned cache where the padding lets the model generate."""
    model, batch = get_model(family, attention), standard_batch(family, padding, images)
    wanted = expected(batch, name)
    decisions = [expect.decision for expect in wanted]
    with patched(model, METHODS[name], batch, regions_of(batch)) as stats:
        out = model(**batch.inputs)
    assert out.logits.shape[:2] == batch.inputs["input_ids"].shape
    assert_stats(stats, decisions)
    assert_logits(out.logits, batch, wanted, kept=name in ("budget", "strict"))
    assert cache_lengths(out.past_key_values) == expected_lengths(batch, decisions, 0)
    for expect in wanted:  # pruning must matter, or the comparison above shows nothing
        if expect.sample.images:
            assert (expect.plain[-1] - expect.logits[len(expect.sample.ids) - 1]).abs().max() > 1e-3
    if padding != "right":
        with patched(model, METHODS[name], batch, regions_of(batch)) as stats:
            out = greedy(model, batch)
        assert_steps(out, [expect.steps for expect in wanted])
        assert_stats(stats, decisions)
        taken = len(out.logits) - 1
        assert cache_lengths(out.past_key_values) == expected_lengths(batch, decisions, taken)
        assert out.past_key_values.get_seq_length() == batch.inputs["input_ids"].shape[1] + taken


KEEP_ALL = {
    "none": None,
    "base": Method(),
    "plc_keep": PreLLMCompression(keep=1.0),
    "plc_strides": PreLLMCompression(1, 1, 1),
    "ilp_keep": InnerLLMPruning(keep=1.0),
    "compose": Compose(PreLLMCompression(1, 1, 1), InnerLLMPruning(keep=1.0)),
    "strict_whole": InnerLLMPruning(mode="strict"),
}


@matrix("family,attention", SUPPORTED)
def test_keep_all_is_bit_identical(family, attention):
    for padding, images in (("left", 2), *((("single", 1), ("right", 1)) if family in THOROUGH else ())):
        model, batch = get_model(family, attention), standard_batch(family, padding, images)
        plain, generated = model(**batch.inputs).logits, greedy(model, batch, 2)
        inside = [layout.inside(Region.whole()) for sample in batch.samples for layout in sample.layouts()]
        for name, method in KEEP_ALL.items():
            if name == "strict_whole" and not all(tokens.all() for tokens in inside):
                continue  # what the processor padded is in no region
            regions = None if name == "strict_whole" else regions_of(batch)
            with patched(model, method, batch, regions) as stats:
                assert torch.equal(model(**batch.inputs).logits, plain), name
            tokens = [len(span) for sample in batch.samples for span in sample.spans()]
            assert list(stats.tokens_before) == list(stats.tokens_after_ilp) == tokens, name
            assert [kept.tolist() for kept in stats.kept] == [list(range(n)) for n in tokens], name
            if name in ("none", "compose", "strict_whole") and padding != "right":
                with patched(model, method, batch, regions):
                    out = greedy(model, batch, 2)
                assert torch.equal(out.sequences, generated.sequences), name
                assert all(torch.equal(a, b) for a, b in zip(out.logits, generated.logits, strict=True)), name
                assert cache_lengths(out.past_key_values) == cache_lengths(generated.past_key_values), name
        assert torch.equal(model(**batch.inputs).logits, plain)


@matrix("name", ["plc", "compose"])
@families()
def test_second_turn(family, name):
    """A question of several tokens to a pruned cache, padded on the left."""
    model, batch, question = get_model(family), standard_batch(family, "left", 1), (7, 21, 3, 40)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        out = greedy(model, batch, 2)
        again = next_turn(model, batch, out, question, 2)
    for row, expect in enumerate(expected(standard_batch(family, "left", 1), name)):
        sample = expect.sample.extended([*expect.steps.tokens[:2], *question])
        for got, logits in zip(again.logits, expect.oracle.greedy(sample, expect.decision, 2).logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)


@families()
def test_repeated_samples(family):
    """generate() repeats every sample for return sequences and beams; its caller gave each image, region and size once."""
    model, batch = get_model(family), standard_batch(family, "left", 1)
    skip_what_transformers_cannot(family, "repeat", model)
    torch.manual_seed(0)
    with patched(model, METHODS["compose"], batch, regions_of(batch)):
        out = greedy(model, batch, 2, do_sample=True, num_return_sequences=2)
    wanted, prompt = expected(standard_batch(family, "left", 1), "compose"), batch.inputs["input_ids"].shape[1]
    for row, tokens in enumerate(out.sequences[:, prompt:].tolist()):
        expect = wanted[row // 2]
        for number in range(2):
            logits = expect.oracle.forward(expect.sample.extended(tokens[:number]), expect.decision)[0][-1]
            torch.testing.assert_close(out.logits[number][row], logits, atol=ATOL, rtol=0)


@matrix("family,attention", REFUSED)
def test_unsupported_attention_is_refused(family, attention):
    model = build_model(family, attention)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{FAMILIES[family].refuses[attention]}, got '{attention}'"):
        patched(model, METHODS["budget"], standard_batch(family, "left", 1)).__enter__()
    assert_unchanged(before, model)


@families(fast=True)
def test_the_oracle_is_the_model(family):
    """What the comparisons above rest on: the oracle without pruning is the plain model."""
    model, oracle, batch = get_model(family, "eager"), get_oracle(family), standard_batch(family, "left", 2)
    plain = model(**batch.inputs).logits
    for row, sample in enumerate(batch.samples):
        logits, places = oracle.forward(sample, oracle.keep_all(sample))
        assert places == list(range(len(sample.ids)))
        end = batch.offsets[row] + len(sample.ids)
        torch.testing.assert_close(plain[row, batch.offsets[row] : end], logits, atol=ATOL, rtol=0)


@families()
def test_exit_restores_everything(family):
    """After a normal end and after an interrupt inside the decoder of a generation."""
    model, batch = get_model(family), standard_batch(family, "left", 2)
    plain, before = model(**batch.inputs).logits, snapshot(model)
    with patched(model, METHODS["compose"], batch, regions_of(batch)):
        greedy(model, batch, 3)
    assert_unchanged(before, model)
    calls = []

    def interrupt(module: Any, args: Any, output: Any) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = decoder_of(family, model).layers[NUM_LAYERS - 1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), patched(model, METHODS["compose"], batch, regions_of(batch)):
        greedy(model, batch)
    handle.remove()
    assert len(calls) == 2
    assert_unchanged(before, model)
    assert torch.equal(model(**batch.inputs).logits, plain)


@families(fast=True)
def test_every_vision_token_belongs_to_an_image(family):
    config = get_model(family).config
    for sample in standard_batch(family, "left", 2).samples:
        wanted = {p for p, token in enumerate(sample.ids) if token in (config.image_token_id, VIDEO)}
        spans = sample.spans()
        assert len(spans) == len(sample.images)
        assert wanted <= {p for span in spans for p in span}
        assert sum(map(len, spans)) == len({p for span in spans for p in span})


@matrix("name", list(METHODS))
@matrix("padding", ["none", "left", "right"])
@families(THOROUGH)
def test_batched_is_single(family, padding, name):
    """A sample does not notice its neighbours."""
    model, batch = get_model(family), standard_batch(family, padding, 2)
    with patched(model, METHODS[name], batch, regions_of(batch)) as stats:
        together = model(**batch.inputs).logits
    kept = iter(stats.kept)
    for row, sample in enumerate(batch.samples):
        single = batch.single(row)
        with patched(model, METHODS[name], single, regions_for(row, sample)) as alone_stats:
            alone = model(**single.inputs).logits[0]
        after = sample.spans()[-1][-1] + 1 if sample.images else 0
        last = batch.offsets[row] + len(sample.ids)
        assert (together[row, last - len(sample.ids) + after : last] - alone[after:]).abs().max() <= ATOL
        assert all(torch.equal(next(kept), mine) for mine in alone_stats.kept)


@matrix("name", list(METHODS))
@matrix("images", [1, 2])
@families(THOROUGH)
def test_flash_stays_dense(family, images, name, flash):
    """Batch 1 without padding: the dense kernel in every layer and step, with the lengths meant."""
    model, batch = get_model(family, "flash_attention_2"), standard_batch(family, "single", images)
    with patched(model, METHODS[name], batch, regions_of(batch)) as stats:
        flash.calls.clear()
        out = greedy(model, batch, 3)
    calls = flash.decoder()
    lengths = [n - 2 for n in cache_lengths(out.past_key_values)]
    assert {kernel for kernel, _, _ in calls} == {"dense"}
    assert [(q, k) for _, q, k in calls[: len(lengths)]] == [(n, n) for n in lengths]
    assert [(q, k) for _, q, k in calls[len(lengths) : 2 * len(lengths)]] == [(1, n + 1) for n in lengths]
    assert len(calls) == 3 * len(lengths)
    assert sum(stats.tokens_after_ilp) < sum(stats.tokens_before)


@pytest.mark.fast
@matrix("name", list(METHODS))
@families(THOROUGH)
def test_outputs_keep_their_shape(family, name):
    """Loss, sliced logits and tuples work as they do without a patch."""
    model, batch = get_model(family), standard_batch(family, "left", 1)
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels >= 90, -100)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        full = model(**batch.inputs, labels=labels)
        last = model(**batch.inputs, logits_to_keep=1).logits
        as_tuple = model(**batch.inputs, return_dict=False)
    assert full.logits.shape[:2] == labels.shape
    torch.testing.assert_close(last[:, 0], full.logits[:, -1], atol=ATOL, rtol=0)
    torch.testing.assert_close(as_tuple[0], full.logits, atol=0, rtol=0)
    shifted = torch.nn.functional.cross_entropy(
        full.logits[:, :-1].reshape(-1, full.logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    torch.testing.assert_close(full.loss, shifted)
