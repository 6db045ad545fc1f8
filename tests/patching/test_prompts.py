"""`crop.patch` on prompts of every kind: processors, adjacent images, uneven batches, no mask, no text behind."""

from __future__ import annotations

import pytest
import torch

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods import InnerLLMPruning
from crop.patching.patch import patch
from tests.support.batches import make_batch, make_sample, standard_batch
from tests.support.cases import (
    ATOL,
    METHODS,
    REGIONS,
    assert_kept,
    assert_logits,
    assert_stats,
    assert_steps,
    decide,
    expected,
    families,
    get_model,
    get_oracle,
    greedy,
    patched,
    regions_of,
)
from tests.support.families.entry import ATTENTIONS
from tests.support.processors import image_processor
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import FAMILIES, THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
attentions = matrix("attention", ATTENTIONS)
methods_ = matrix("name", list(METHODS))


@pytest.mark.fast
@matrix("kind", ["resize", "crop", "pad"])
@matrix("size", [(50, 40), (40, 60)])
def test_llava_processors(kind, size):
    """Regions live in the original image, whatever the processor does to it."""
    model, oracle = get_model("llava", "sdpa"), get_oracle("llava")
    batch = standard_batch("llava", "single", 1)
    (sample,) = batch.samples
    width, height = size
    seen = {"resize": (width, height), "crop": (min(size),) * 2, "pad": (max(size),) * 2}[kind]
    half_x, half_y = seen[0] / width / 2, seen[1] / height / 2  # of what the model sees
    box = (0.5 - half_x, 0.5 - half_y, 0.5 + half_x, 0.5 + half_y)
    layout = VisionLayout.grid(8, 8, box=box, start=sample.spans()[0][0])
    region = Region.box(0.2, 0.2, 0.6, 0.7)
    method = InnerLLMPruning(mode="strict")
    decision = oracle.decide(sample, method, [region], [layout])
    with patch(model, method, region, processor=image_processor(kind), image_size=size) as stats:
        logits = model(**batch.inputs).logits[0, -1]
    assert stats.kept[0].tolist() == decision.kept_original(0)
    wanted = oracle.forward(sample, decision)[0][-1]
    torch.testing.assert_close(logits, wanted, atol=ATOL, rtol=0)


@attentions
def test_adjacent_images(attention):
    """Two LLaVA images without a token between them are still two images."""
    model, oracle = get_model("llava", attention), get_oracle("llava")
    sample = make_sample("llava", [3, (48, 32), (24, 40), 5], seed=5)
    batch = make_batch([sample], "none")
    for name, method in METHODS.items():
        decision = decide(oracle, sample, method, REGIONS[1])
        with patched(model, method, batch, list(REGIONS[1])) as stats:
            logits = model(**batch.inputs).logits[0, -1]
        assert [k.tolist() for k in stats.kept] == [decision.kept_original(i) for i in range(2)], name
        wanted = oracle.forward(sample, decision)[0][-1]
        torch.testing.assert_close(logits, wanted, atol=ATOL, rtol=0)


@matrix("attention,padding", [("sdpa", "right"), ("eager", "left"), ("flash_attention_2", "left")])
@methods_
@families(THOROUGH)
def test_image_counts_may_differ(family, attention, name, padding):
    """No image, two images, one image in one batch."""
    model, oracle = get_model(family, attention), get_oracle(family)
    size = FAMILIES[family].sizes[0]
    samples = [
        make_sample(family, [23], seed=7),
        make_sample(family, [2, size, 1, size, 9], seed=8),
        make_sample(family, [size, 6], seed=9),
    ]
    batch = make_batch(samples, padding)
    regions = [[], list(REGIONS[0]), [REGIONS[1][1]]]
    method = METHODS[name]
    with patched(model, method, batch, [r for rs in regions for r in rs]) as stats:
        logits = model(**batch.inputs).logits
    decisions = [decide(oracle, sample, method, mine) for sample, mine in zip(samples, regions, strict=True)]
    assert_kept(stats, decisions)
    for row, (sample, decision) in enumerate(zip(samples, decisions, strict=True)):
        wanted = oracle.forward(sample, decision)[0][-1]
        last = batch.offsets[row] + len(sample.ids) - 1
        torch.testing.assert_close(logits[row, last], wanted, atol=ATOL, rtol=0)


@methods_
@families(THOROUGH)
def test_prompt_that_ends_with_the_image(family, name):
    """The row that predicts the next token must not be a token that may leave: dropping refuses it.

    Qwen closes an image with a marker, which is text; pooling drops nothing.
    """
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    sample = make_sample(family, [6, FAMILIES[family].sizes[0]], seed=3)
    batch, other = make_batch([sample], "none"), standard_batch(family, "single", 1)
    method, regions = METHODS[name], [REGIONS[0][0]]
    if method.layer is not None and sample.spans()[0][-1] == len(sample.ids) - 1:
        before = snapshot(model)
        with patched(model, method, batch, regions):
            with pytest.raises(ValueError, match="text must follow the last image of a prompt"):
                model(**batch.inputs)
            after = model(**other.inputs).logits
        assert_unchanged(before, model)
        (expect,) = expected(other, name)
        assert_logits(after, other, [expect], kept=False)
        return
    decision = decide(oracle, sample, method, regions)
    with patched(model, method, batch, regions) as stats:
        out = greedy(model, batch, max_new_tokens=2)
    assert stats.kept[0].tolist() == decision.kept_original(0)
    assert_steps(out, [oracle.greedy(sample, decision, 2)])


@methods_
@matrix("padding,use_cache", [("single", True), ("single", False), ("none", False)])
@matrix("attention", ["sdpa", "flash_attention_2"])
@families(THOROUGH)
def test_no_attention_mask(family, attention, use_cache, padding, name):
    """Gaps in the position ids must not be taken for packed sequences."""
    model = get_model(family, attention)
    batch = standard_batch(family, padding, 1)
    wanted = expected(batch, name)
    inputs = {k: v for k, v in batch.inputs.items() if k != "attention_mask"}
    with patched(model, METHODS[name], batch, regions_of(batch)) as stats:
        logits = model(**inputs, use_cache=use_cache).logits
    assert_stats(stats, [expect.decision for expect in wanted])
    assert_logits(logits, batch, wanted, kept=name in ("budget", "strict"))


def test_prompt_that_ends_with_a_whole_image():
    """What counts is the text behind the sample's last image, also if only an earlier one is pruned."""
    model = get_model("llava", "sdpa")
    batch = make_batch([make_sample("llava", [4, (48, 32), 3, (48, 32)], seed=6)], "none")
    with patched(model, InnerLLMPruning(mode="strict"), batch, [REGIONS[0][0], Region.whole()]):
        with pytest.raises(ValueError, match="text must follow the last image of a prompt"):
            model(**batch.inputs)
