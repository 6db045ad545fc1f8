"""The contract of `crop.patch` for every family: pairs of attention x padding x images, each with every method.

Batches hold two samples with different images and one of text alone, so that equality with the oracle, which knows one
unpadded sample at a time, is also equality of batched and single.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from crop.methods import Compose, InnerLLMPruning, PreLLMCompression
from tests.support import zoo
from tests.support.contract import ATOL, assert_unchanged, snapshot
from tests.support.zoo import FAMILIES, NUM_LAYERS
from tests.support.zoo.cases import (
    ATTENTIONS,
    METHODS,
    SUPPORTED,
    decided,
    get_batch,
    get_model,
    get_oracle,
    greedy,
    greedy_steps,
    patched,
    regions_of,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
families = matrix("family", list(FAMILIES))
REFUSED = [(family, a) for family in FAMILIES for a in ATTENTIONS if a not in FAMILIES[family].attentions]
# Every pair of attention x padding, attention x images and padding x images.
PAIRS = [
    (family, attention, padding, 1 + (ATTENTIONS.index(attention) + j) % 2)
    for family, attention in SUPPORTED
    for j, padding in enumerate(("left", "right", "none"))
]


@matrix("name", list(METHODS))
@matrix("family,attention,padding,images", PAIRS)
def test_pruned_is_the_oracle(family, attention, padding, images, name):
    """Prefill, and decode with the pruned cache where the padding lets the model generate."""
    model, batch = get_model(family, attention), get_batch(family, padding, images)
    decisions = decided(family, padding, images, name)
    with patched(model, METHODS[name], batch, regions_of(batch)) as stats:
        out = model(**batch.inputs) if padding == "right" else greedy(model, batch)
    kept = iter(stats.kept)
    counts = []
    for row, (sample, decision) in enumerate(zip(batch.samples, decisions, strict=True)):
        counts += decision.counts()
        for image in range(len(sample.images)):
            assert next(kept).tolist() == decision.kept_original(image)
        if padding == "right":
            wanted = get_oracle(family).text_logits(sample, decision)
            text = [p for p in wanted if not any(p in span for span in sample.spans())]
            reference = torch.stack([wanted[p] for p in text])
            torch.testing.assert_close(out.logits[row, text], reference, atol=ATOL, rtol=0)
        else:
            steps = greedy_steps(family, padding, images, name)[row]
            for number, logits in enumerate(steps.logits):
                torch.testing.assert_close(out.logits[number][row], logits, atol=ATOL, rtol=0)
    assert list(zip(stats.tokens_before, stats.tokens_after_plc, stats.tokens_after_ilp, strict=True)) == counts
    assert sum(stats.tokens_after_ilp) < sum(stats.tokens_before)


KEEP_ALL = {
    "none": None,
    "ilp": InnerLLMPruning(keep=1.0),
    "both": Compose(PreLLMCompression(1, 1, 1), InnerLLMPruning(keep=1.0)),
}


@matrix("family,attention", SUPPORTED)
def test_keep_all_is_bit_identical(family, attention):
    model, batch = get_model(family, attention), get_batch(family, "left", 2)
    plain, generated = model(**batch.inputs).logits, greedy(model, batch, 2)
    for method in KEEP_ALL.values():
        with patched(model, method, batch, regions_of(batch)):
            assert torch.equal(model(**batch.inputs).logits, plain)
        with patched(model, method, batch, regions_of(batch)):
            out = greedy(model, batch, 2)
        assert torch.equal(out.sequences, generated.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, generated.logits, strict=True))


@matrix("name", ["plc", "both"])
@families
def test_second_turn(family, name):
    """A question of several tokens to a pruned cache, padded on the left."""
    model, batch, question = get_model(family, "sdpa"), get_batch(family, "left", 1), (7, 21, 3, 40)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        cache = model(**batch.inputs).past_key_values
        ids = torch.tensor([question] * len(batch.samples))
        mask = torch.cat([batch.inputs["attention_mask"], torch.ones_like(ids)], 1)
        more = {}
        if hasattr(model.model, "rope_deltas"):  # what generate() would give
            text = (mask.cumsum(1) - 1)[:, -len(question) :]
            more["position_ids"] = (text + model.model.rope_deltas).expand(3, -1, -1)
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, **more).logits
    decisions = decided(family, "left", 1, name)
    for row, (sample, decision) in enumerate(zip(batch.samples, decisions, strict=True)):
        wanted = get_oracle(family).forward(sample.extended(list(question)), decision)[0][-len(question) :]
        torch.testing.assert_close(logits[row], wanted, atol=ATOL, rtol=0)


@families
def test_repeated_samples(family):
    """generate() repeats every sample for return sequences and beams; its caller gave each image, region and size once."""
    model, batch = get_model(family, "sdpa"), get_batch(family, "left", 1)
    if family == "internvl" and "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers repeats the tiles of an image one by one: wrong without a patch, too")
    torch.manual_seed(0)
    with patched(model, METHODS["both"], batch, regions_of(batch)):
        out = model.generate(
            **batch.inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    decisions, prompt = decided(family, "left", 1, "both"), batch.inputs["input_ids"].shape[1]
    for row, tokens in enumerate(out.sequences[:, prompt:].tolist()):
        sample, decision = batch.samples[row // 2], decisions[row // 2]
        for number in range(2):
            wanted = get_oracle(family).forward(sample.extended(tokens[:number]), decision)[0][-1]
            torch.testing.assert_close(out.logits[number][row], wanted, atol=ATOL, rtol=0)


@matrix("family,attention", REFUSED)
def test_unsupported_attention_is_refused(family, attention):
    model = zoo.build_model(family, attention)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"must be eager or sdpa for '{model.config.model_type}', got '{attention}'"):
        patched(model, METHODS["ilp"], get_batch(family, "left", 1)).__enter__()
    assert_unchanged(before, model)


@families
def test_pruning_matters_and_the_oracle_is_the_model(family):
    """What the comparisons above rest on: the oracle without pruning is the plain model, and pruning changes it."""
    model, oracle, batch = get_model(family, "eager"), get_oracle(family), get_batch(family, "left", 2)
    plain = model(**batch.inputs).logits
    for row, sample in enumerate(batch.samples):
        logits = oracle.forward(sample, oracle.keep_all(sample))[0]
        torch.testing.assert_close(plain[row, batch.offsets[row] :], logits, atol=ATOL, rtol=0)
    for name in METHODS:
        for row, decision in enumerate(decided(family, "left", 2, name)[:2]):
            pruned = oracle.forward(batch.samples[row], decision)[0][-1]
            assert (pruned - plain[row, batch.offsets[row] + len(batch.samples[row].ids) - 1]).abs().max() > 1e-3


@families
def test_exit_restores_everything(family):
    """After a normal end and after an interrupt inside the decoder of a generation."""
    model, batch = get_model(family, "sdpa"), get_batch(family, "left", 2)
    plain, before = model(**batch.inputs).logits, snapshot(model)
    with patched(model, METHODS["both"], batch, regions_of(batch)):
        greedy(model, batch)
    assert_unchanged(before, model)
    decoder = getattr(model.model, "language_model", None) or model.model.text_model
    calls = []

    def interrupt(module: Any, args: Any, output: Any) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = decoder.layers[NUM_LAYERS - 1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), patched(model, METHODS["both"], batch, regions_of(batch)):
        greedy(model, batch)
    handle.remove()
    assert len(calls) == 2
    assert_unchanged(before, model)
    assert torch.equal(model(**batch.inputs).logits, plain)


@families
def test_every_vision_token_belongs_to_an_image(family):
    for sample in get_batch(family, "left", 2).samples:
        config = get_model(family, "sdpa").config
        wanted = {p for p, token in enumerate(sample.ids) if token in (config.image_token_id, zoo.VIDEO)}
        spans = sample.spans()
        assert len(spans) == len(sample.images)
        assert wanted <= {p for span in spans for p in span}
        assert sum(map(len, spans)) == len({p for span in spans for p in span})
