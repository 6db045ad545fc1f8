"""Contract of `crop.patch`: family x attention x padding x images x method against the oracle."""

from __future__ import annotations

import pytest
import torch
from contract import (
    ATOL,
    METHODS,
    REGIONS,
    STEPS,
    assert_logits,
    assert_stats,
    assert_steps,
    assert_unchanged,
    cache_lengths,
    expected,
    expected_lengths,
    greedy,
    layouts_of,
    patched,
    regions_of,
    snapshot,
)
from crop.methods import Compose, InnerLLMPruning, Method, PreLLMCompression
from crop.region import Region, VisionLayout
from oracle import Oracle, Steps
from tiny_models import (
    ATTENTIONS,
    FAMILIES,
    LLAVA_GRID,
    image_processor,
    make_batch,
    make_sample,
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
@attentions
@families
def test_generate_without_a_cache(family, attention, name, get_model, get_oracle):
    """Each step is a prefill of its own, so the decision is taken anew: text rows have been added."""
    model, oracle = get_model(family, attention), get_oracle(family)
    batch = standard_batch(family, "left", 2)
    with patched(model, METHODS[name], regions_of(batch)):
        out = greedy(model, batch, use_cache=False, max_new_tokens=3)
    steps = []
    for row, sample in enumerate(batch.samples):
        steps.append(Steps())
        for _ in range(3):
            decision = oracle.decide(sample, METHODS[name], list(REGIONS[row]), layouts_of(sample))
            assert not decision.near_tie
            steps[row].logits.append(oracle.forward(sample, decision)[0][-1])
            steps[row].tokens.append(int(steps[row].logits[-1].argmax()))
            sample = sample.extended(steps[row].tokens[-1:])
    assert_steps(out, batch, steps)


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
@matrix("padding,use_cache", [("single", True), ("single", False), ("none", False)])
@matrix("attention", ["sdpa", "flash_attention_2"])
@families
def test_no_attention_mask(family, attention, use_cache, padding, name, get_model, get_oracle):
    """Gaps in the position ids must not be taken for packed sequences."""
    model = get_model(family, attention)
    batch = standard_batch(family, padding, 1)
    wanted = expected(get_oracle, batch, name)
    inputs = {k: v for k, v in batch.inputs.items() if k != "attention_mask"}
    with patched(model, METHODS[name], regions_of(batch)) as stats:
        logits = model(**inputs, use_cache=use_cache).logits
    assert_stats(stats, wanted)
    assert_logits(logits, batch, wanted, kept=name.startswith("ilp"))


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
    assert [(q, k) for _, q, k in calls[len(lengths) : 2 * len(lengths)]] == [(1, n + 1) for n in lengths]  # fmt: skip
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
}  # fmt: skip


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
            torch.testing.assert_close(generated.logits[number][row], steps.logits[number], atol=ATOL, rtol=0)  # fmt: skip


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
        decision = type(decision)(decision.layer, decision.mode, decision.cells, kept)
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
    closed.positions = lambda sample: torch.arange(len(sample.ids)).expand(
        oracle.positions(sample).shape
    ) // 2
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
    )  # fmt: skip
    torch.testing.assert_close(full.loss, shifted)


@matrix("kind", ["resize", "crop", "pad"])
@matrix("size", [(50, 40), (40, 60)])
def test_llava_processors(kind, size, get_model, get_oracle):
    """Regions live in the original image, whatever the processor does to it."""
    model, oracle = get_model("llava", "sdpa"), get_oracle("llava")
    batch = standard_batch("llava", "single", 1)
    (sample,) = batch.samples
    width, height = size
    seen = {"resize": (width, height), "crop": (min(size),) * 2, "pad": (max(size),) * 2}[kind]
    half_x, half_y = seen[0] / width / 2, seen[1] / height / 2  # of what the model sees
    box = (0.5 - half_x, 0.5 - half_y, 0.5 + half_x, 0.5 + half_y)
    layout = VisionLayout.grid(8, 8, box=box, start=sample.starts[0])
    region = Region.box(0.2, 0.2, 0.6, 0.7)
    method = InnerLLMPruning(mode="strict")
    decision = oracle.decide(sample, method, [region], [layout])
    with patched(model, method, region, processor=image_processor(kind), image_size=size) as stats:
        logits = model(**batch.inputs).logits[0, -1]
    assert stats.kept[0].tolist() == decision.kept_original(0)
    wanted = oracle.forward(sample, decision)[0][-1]
    torch.testing.assert_close(logits, wanted, atol=ATOL, rtol=0)


@attentions
def test_adjacent_images(attention, get_model, get_oracle):
    """Two LLaVA images without a token between them are still two images."""
    model, oracle = get_model("llava", attention), get_oracle("llava")
    sample = make_sample("llava", [3, LLAVA_GRID, LLAVA_GRID, 5], seed=5)
    batch = make_batch("llava", [sample], "none")
    for name, method in METHODS.items():
        decision = oracle.decide(sample, method, list(REGIONS[1]), layouts_of(sample))
        with patched(model, method, list(REGIONS[1])) as stats:
            logits = model(**batch.inputs).logits[0, -1]
        assert [k.tolist() for k in stats.kept] == [decision.kept_original(i) for i in range(2)], name
        wanted = oracle.forward(sample, decision)[0][-1]
        torch.testing.assert_close(logits, wanted, atol=ATOL, rtol=0)


@matrix("attention,padding", [("sdpa", "right"), ("eager", "left"), ("flash_attention_2", "left")])
@methods_
@families
def test_image_counts_may_differ(family, attention, name, padding, get_model, get_oracle):
    """No image, two images, one image in one batch."""
    model, oracle = get_model(family, attention), get_oracle(family)
    grid = (8, 8) if family == "llava" else (5, 7)
    samples = [
        make_sample(family, [23], seed=7),
        make_sample(family, [2, grid, 1, grid, 9], seed=8),
        make_sample(family, [grid, 6], seed=9),
    ]
    batch = make_batch(family, samples, padding)
    regions = [[], list(REGIONS[0]), [REGIONS[1][1]]]
    method = METHODS[name]
    with patched(model, method, [r for rs in regions for r in rs]) as stats:
        logits = model(**batch.inputs).logits
    kept = iter(stats.kept)
    for row, sample in enumerate(samples):
        if sample.grids:
            decision = oracle.decide(sample, method, regions[row], layouts_of(sample))
        else:
            decision = oracle.keep_all(sample)
        for image in range(len(sample.grids)):
            assert next(kept).tolist() == decision.kept_original(image)
        wanted = oracle.forward(sample, decision)[0][-1]
        last = batch.offsets[row] + len(sample.ids) - 1
        torch.testing.assert_close(logits[row, last], wanted, atol=ATOL, rtol=0)


@methods_
@families
def test_prompt_that_ends_with_the_image(family, name, get_model, get_oracle):
    """The row that predicts the next token must not be a token that may leave: dropping refuses it.

    Qwen closes an image with a marker, which is text; pooling drops nothing.
    """
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    sample = make_sample(family, [6, (8, 8) if family == "llava" else (5, 7)], seed=3)
    batch, other = make_batch(family, [sample], "none"), standard_batch(family, "single", 1)
    method, regions = METHODS[name], [REGIONS[0][0]]
    if family == "llava" and name != "plc":
        before = snapshot(model)
        with patched(model, method, regions):
            with pytest.raises(ValueError, match="text must follow the last image of a prompt"):
                model(**batch.inputs)
            after = model(**other.inputs).logits
        assert_unchanged(before, model)
        (expect,) = expected(get_oracle, other, name)
        assert_logits(after, other, [expect], kept=False)
        return
    decision = oracle.decide(sample, method, regions, layouts_of(sample))
    with patched(model, method, regions) as stats:
        out = greedy(model, batch, max_new_tokens=2)
    assert stats.kept[0].tolist() == decision.kept_original(0)
    assert_steps(out, batch, [oracle.greedy(sample, decision, 2)])
