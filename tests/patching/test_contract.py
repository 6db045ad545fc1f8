"""Contract of `crop.patch`: family x attention x padding x images x method against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, Method, PreLLMCompression, Selection
from tests.support.contract import (
    ATOL,
    METHODS,
    REGIONS,
    STEPS,
    assert_logits,
    assert_stats,
    assert_steps,
    cache_lengths,
    expected,
    expected_lengths,
    greedy,
    layouts_of,
    patched,
    regions_of,
)
from tests.support.oracle import Oracle
from tests.support.tiny_models import (
    ATTENTIONS,
    FAMILIES,
    standard_batch,
)

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
families = matrix("family", FAMILIES)
attentions = matrix("attention", ATTENTIONS)
methods_ = matrix("name", list(METHODS))

KEEP_ALL = {
    "none": None,
    "base": Method(),
    "plc_keep": PreLLMCompression(keep=1.0),
    "plc_strides": PreLLMCompression(1, 1, 1),
    "ilp_keep": InnerLLMPruning(keep=1.0),
    "compose": Compose(PreLLMCompression(1, 1, 1), InnerLLMPruning(keep=1.0)),
    "strict_whole": InnerLLMPruning(mode="strict"),
}


@matrix("padding,images", [("single", 1), ("left", 2), ("right", 1)])
@attentions
@families
def test_keep_all_is_bit_identical(family, attention, images, padding, get_model):
    model = get_model(family, attention)
    batch = standard_batch(family, padding, images)
    plain = model(**batch.inputs).logits
    for name, method in KEEP_ALL.items():
        regions = None if name == "strict_whole" else regions_of(batch)
        with patched(model, method, regions) as stats:
            assert torch.equal(model(**batch.inputs).logits, plain), name
        tokens = [h * w for h, w in batch.grids]
        assert list(stats.tokens_before) == list(stats.tokens_after_ilp) == tokens, name
        assert [k.tolist() for k in stats.kept] == [list(range(n)) for n in tokens], name
    assert torch.equal(model(**batch.inputs).logits, plain)


@matrix("padding", ["single", "left"])
@attentions
@families
def test_keep_all_generates_bit_identically(family, attention, padding, get_model):
    model = get_model(family, attention)
    batch = standard_batch(family, padding, 2)
    plain = greedy(model, batch, max_new_tokens=3)
    for name in ("none", "compose", "strict_whole"):
        with patched(model, KEEP_ALL[name], None if name == "strict_whole" else regions_of(batch)):
            out = greedy(model, batch, max_new_tokens=3)
        assert torch.equal(out.sequences, plain.sequences), name
        assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True)), name
        assert cache_lengths(out.past_key_values) == cache_lengths(plain.past_key_values), name


@methods_
@matrix("padding,images", [("single", 1), ("none", 2), ("left", 1), ("right", 2)])
@attentions
@families
def test_forward_is_the_oracle(family, attention, images, padding, name, get_model, get_oracle):
    model = get_model(family, attention)
    batch = standard_batch(family, padding, images)
    wanted = expected(get_oracle, batch, name)
    with patched(model, METHODS[name], regions_of(batch)) as stats:
        out = model(**batch.inputs)
    assert out.logits.shape[:2] == batch.inputs["input_ids"].shape
    assert_stats(stats, wanted)
    assert_logits(out.logits, batch, wanted, kept=name.startswith("ilp"))
    assert cache_lengths(out.past_key_values) == expected_lengths(batch, wanted, 0)
    for expect in wanted:  # pruning must matter, or the comparison above shows nothing
        assert (expect.plain[-1] - expect.logits[len(expect.sample.ids) - 1]).abs().max() > 1e-2


@methods_
@matrix("padding,images", [("single", 2), ("none", 1), ("left", 2)])
@attentions
@families
def test_generate_is_the_oracle(family, attention, images, padding, name, get_model, get_oracle):
    model = get_model(family, attention)
    batch = standard_batch(family, padding, images)
    wanted = expected(get_oracle, batch, name)
    with patched(model, METHODS[name], regions_of(batch)) as stats:
        out = greedy(model, batch)
    assert_steps(out, batch, [expect.steps for expect in wanted])
    assert_stats(stats, wanted)
    cache = out.past_key_values
    assert cache_lengths(cache) == expected_lengths(batch, wanted, STEPS - 1)
    assert cache.get_seq_length() == batch.inputs["input_ids"].shape[1] + STEPS - 1


@methods_
@matrix("padding", ["none", "left", "right"])
@families
def test_batched_is_single(family, padding, name, get_model):
    """A sample does not notice its neighbours."""
    model = get_model(family, "sdpa")
    batch = standard_batch(family, padding, 2)
    with patched(model, METHODS[name], regions_of(batch)) as stats:
        together = model(**batch.inputs).logits
    for row, sample in enumerate(batch.samples):
        with patched(model, METHODS[name], list(REGIONS[row])) as alone_stats:
            alone = model(**batch.single(row).inputs).logits[0]
        last = batch.offsets[row] + len(sample.ids)
        after = sample.spans()[-1].stop
        error = (together[row, last - (len(sample.ids) - after) : last] - alone[after:]).abs().max()
        assert error <= ATOL
        for image, kept in enumerate(alone_stats.kept):
            assert torch.equal(kept, stats.kept[2 * row + image])


@methods_
@matrix("images", [1, 2])
@families
def test_flash_stays_dense(family, images, name, get_model, flash):
    """Batch 1 without padding: the dense kernel in every layer and step, with the lengths meant."""
    model = get_model(family, "flash_attention_2")
    batch = standard_batch(family, "single", images)
    with patched(model, METHODS[name], regions_of(batch)) as stats:
        flash.calls.clear()
        out = greedy(model, batch, max_new_tokens=3)
    calls = flash.decoder()
    lengths = [n - 2 for n in cache_lengths(out.past_key_values)]
    assert {kernel for kernel, _, _ in calls} == {"dense"}
    assert [(q, k) for _, q, k in calls[: len(lengths)]] == [(n, n) for n in lengths]
    assert [(q, k) for _, q, k in calls[len(lengths) : 2 * len(lengths)]] == [(1, n + 1) for n in lengths]
    assert len(calls) == 3 * len(lengths)
    assert sum(stats.tokens_after_ilp) < sum(stats.tokens_before)


VARIANTS = {
    "layer_1": InnerLLMPruning(keep=0.2, layer=1),
    "last_layer": InnerLLMPruning(keep=0.2, layer=5),
    "rows_last": InnerLLMPruning(keep=0.2, rows="last"),
    "fastv": InnerLLMPruning(keep=9, rows="last", floor=0),
    "one_token": InnerLLMPruning(keep=1),
    "soft": InnerLLMPruning(keep=0.3, mode="soft", region_weight=4.0),
    "max_pool": PreLLMCompression(1, 2, 4, ring=1, mode="max"),
    "plc_budget": PreLLMCompression(keep=0.3),
    "plc_tiny": PreLLMCompression(keep=2),
    "compose_strict": Compose(PreLLMCompression(2, 2, 3), InnerLLMPruning(mode="strict", layer=4)),
    "compose_max": Compose(PreLLMCompression(1, 3, 3, mode="max"), InnerLLMPruning(keep=0.1, rows="last")),
}


@matrix("variant", list(VARIANTS))
@families
def test_variants(family, variant, get_model, get_oracle):
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    batch = standard_batch(family, "left", 2)
    with patched(model, VARIANTS[variant], regions_of(batch)) as stats:
        logits = model(**batch.inputs).logits[:, -1]
        generated = greedy(model, batch, max_new_tokens=3)
    for row, sample in enumerate(batch.samples):
        decision = oracle.decide(sample, VARIANTS[variant], list(REGIONS[row]), layouts_of(sample))
        assert not decision.near_tie
        for image in range(2):
            assert stats.kept[2 * row + image].tolist() == decision.kept_original(image)
        steps = oracle.greedy(sample, decision, 3)
        torch.testing.assert_close(logits[row], steps.logits[0], atol=ATOL, rtol=0)
        for number in range(3):
            torch.testing.assert_close(generated.logits[number][row], steps.logits[number], atol=ATOL, rtol=0)


class Anything(Method):
    """A method without geometry: random cells (some tokens in none), priorities and weights."""

    def __init__(self, seed: int, *, layer: int, rows: str, pool_mode: str) -> None:
        self.seed, self.layer, self.rows, self.pool_mode = seed, layer, rows, pool_mode

    def draw(self, region: Region, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(100 * round(1e4 * region.area) + 10 * self.seed + salt)

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan:
        label = torch.randint(-len(layout) // 6, len(layout) // 2, (len(layout),), generator=self.draw(region, 0))
        return PoolPlan.from_labels(label, layout.row, layout.col, torch.zeros(len(layout), dtype=torch.uint8))

    def select(self, layout: VisionLayout, region: Region) -> Selection:
        priority = torch.randint(-1, 3, (len(layout),), generator=self.draw(region, 1), dtype=torch.int8)
        weight = torch.rand(len(layout), generator=self.draw(region, 2)) + 0.1
        return Selection(int((priority >= 0).sum()) // 2, priority, weight)


@matrix("seed", range(4))
@families
def test_any_method(family, seed, get_model, get_oracle):
    """What a method may say is not limited to what the package's own methods say."""
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    method = Anything(seed, layer=seed + 1, rows=("text", "last")[seed % 2], pool_mode=("mean", "max")[seed // 2])
    batch = standard_batch(family, "left", 2)
    with patched(model, method, regions_of(batch)) as stats:
        out = greedy(model, batch, max_new_tokens=3)
    kept = iter(stats.kept)
    for row, sample in enumerate(batch.samples):
        decision = oracle.decide(sample, method, list(REGIONS[row]), layouts_of(sample))
        assert not decision.near_tie
        assert decision.counts()[0][0] < sample.grids[0][0] * sample.grids[0][1]  # some are in no cell
        assert [next(kept).tolist() for _ in range(2)] == [decision.kept_original(image) for image in range(2)]
        steps = oracle.greedy(sample, decision, 3)
        for number in range(3):
            torch.testing.assert_close(out.logits[number][row], steps.logits[number], atol=ATOL, rtol=0)


@matrix("wrong", ["region", "order", "layer", "rows", "image"])
@families
def test_a_wrong_expectation_is_noticed(family, wrong, get_model, get_oracle):
    """The comparison can fail: the oracle gets another region, layer, rows, or swapped regions."""
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    batch = standard_batch(family, "single", 2)
    (sample,) = batch.samples
    method = InnerLLMPruning(keep=0.25, layer=2)
    with patched(model, method, regions_of(batch)):
        logits = model(**batch.inputs).logits[0, -1]
    regions, told = list(REGIONS[0]), method
    if wrong == "region":
        regions[0] = Region.box(0.6, 0.6, 0.9, 0.9)
    elif wrong == "order":
        regions = regions[::-1]
    elif wrong == "layer":
        told = InnerLLMPruning(keep=0.25, layer=3)
    elif wrong == "rows":
        told = InnerLLMPruning(keep=0.25, rows="last")
    decision = oracle.decide(sample, told, regions, layouts_of(sample))
    if wrong == "image":  # the second image's choice made from the first one's scores
        kept = (decision.kept[0], tuple(k for k in decision.kept[0] if k < len(decision.cells[1])))
        decision = replace(decision, kept=kept)
    error = (oracle.forward(sample, decision)[0][-1] - logits).abs().max()
    assert error > 1e-3


@families
def test_positions_are_original(family, get_model, get_oracle):
    """Renumbering the kept tokens would be seen: the oracle with closed gaps differs."""
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    batch = standard_batch(family, "single", 1)
    (expect,) = expected(get_oracle, batch, "plc")
    with patched(model, METHODS["plc"], regions_of(batch)):
        logits = model(**batch.inputs).logits[0, -1]
    closed = Oracle(oracle.model)
    closed.positions = lambda sample: torch.arange(len(sample.ids)).expand(oracle.positions(sample).shape) // 2
    renumbered = closed.forward(expect.sample, expect.decision)[0][-1]
    assert (renumbered - logits).abs().max() > 1e-3
    torch.testing.assert_close(logits, expect.steps.logits[0], atol=ATOL, rtol=0)


@methods_
@families
def test_outputs_keep_their_shape(family, name, get_model):
    """Loss, sliced logits and tuples work as they do without a patch."""
    model = get_model(family, "sdpa")
    batch = standard_batch(family, "left", 1)
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels >= 90, -100)
    with patched(model, METHODS[name], regions_of(batch)):
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
