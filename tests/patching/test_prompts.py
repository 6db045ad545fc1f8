"""`crop.patch` on prompts of every kind: processors, adjacent images, uneven batches, no mask, no text behind."""

from __future__ import annotations

import pytest
import torch

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods import InnerLLMPruning

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
attentions = matrix("attention", ATTENTIONS)
methods_ = matrix("name", list(METHODS))


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
def test_adjacent_images(attention):
    """Two LLaVA images without a token between them are still two images."""
    model, oracle = get_model("llava", attention), get_oracle("llava")
    sample = make_sample("llava", [3, LLAVA_GRID, LLAVA_GRID, 5], seed=5)
    batch = make_batch([sample], "none")
    for name, method in METHODS.items():
        decision = oracle.decide(sample, method, list(REGIONS[1]), sample.layouts())
        with patched(model, method, list(REGIONS[1])) as stats:
            logits = model(**batch.inputs).logits[0, -1]
        assert [k.tolist() for k in stats.kept] == [decision.kept_original(i) for i in range(2)], name
        wanted = oracle.forward(sample, decision)[0][-1]
        torch.testing.assert_close(logits, wanted, atol=ATOL, rtol=0)


@matrix("attention,padding", [("sdpa", "right"), ("eager", "left"), ("flash_attention_2", "left")])
@methods_
@families
def test_image_counts_may_differ(family, attention, name, padding):
    """No image, two images, one image in one batch."""
    model, oracle = get_model(family, attention), get_oracle(family)
    grid = (8, 8) if family == "llava" else (5, 7)
    samples = [
        make_sample(family, [23], seed=7),
        make_sample(family, [2, grid, 1, grid, 9], seed=8),
        make_sample(family, [grid, 6], seed=9),
    ]
    batch = make_batch(samples, padding)
    regions = [[], list(REGIONS[0]), [REGIONS[1][1]]]
    method = METHODS[name]
    with patched(model, method, [r for rs in regions for r in rs]) as stats:
        logits = model(**batch.inputs).logits
    kept = iter(stats.kept)
    for row, sample in enumerate(samples):
        if sample.grids:
            decision = oracle.decide(sample, method, regions[row], sample.layouts())
        else:
            decision = oracle.keep_all(sample)
        for image in range(len(sample.grids)):
            assert next(kept).tolist() == decision.kept_original(image)
        wanted = oracle.forward(sample, decision)[0][-1]
        last = batch.offsets[row] + len(sample.ids) - 1
        torch.testing.assert_close(logits[row, last], wanted, atol=ATOL, rtol=0)


@methods_
@families
def test_prompt_that_ends_with_the_image(family, name):
    """The row that predicts the next token must not be a token that may leave: dropping refuses it.

    Qwen closes an image with a marker, which is text; pooling drops nothing.
    """
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    sample = make_sample(family, [6, (8, 8) if family == "llava" else (5, 7)], seed=3)
    batch, other = make_batch([sample], "none"), standard_batch(family, "single", 1)
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
    decision = oracle.decide(sample, method, regions, sample.layouts())
    with patched(model, method, regions) as stats:
        out = greedy(model, batch, max_new_tokens=2)
    assert stats.kept[0].tolist() == decision.kept_original(0)
    assert_steps(out, [oracle.greedy(sample, decision, 2)])


@methods_
@matrix("padding,use_cache", [("single", True), ("single", False), ("none", False)])
@matrix("attention", ["sdpa", "flash_attention_2"])
@families
def test_no_attention_mask(family, attention, use_cache, padding, name):
    """Gaps in the position ids must not be taken for packed sequences."""
    model = get_model(family, attention)
    batch = standard_batch(family, padding, 1)
    wanted = expected(family, padding, images, name)
    inputs = {k: v for k, v in batch.inputs.items() if k != "attention_mask"}
    with patched(model, METHODS[name], batch, regions_of(batch)) as stats:
        logits = model(**inputs, use_cache=use_cache).logits
    assert_stats(stats, wanted)
    assert_logits(logits, batch, wanted, kept=name.startswith("ilp"))


def test_prompt_that_ends_with_a_whole_image():
    """What counts is the text behind the sample's last image, also if only an earlier one is pruned."""
    model = get_model("llava", "sdpa")
    batch = make_batch([make_sample("llava", [4, LLAVA_GRID, 3, LLAVA_GRID], seed=6)], "none")
    with patched(model, InnerLLMPruning(mode="strict"), [REGIONS[0][0], Region.whole()]):
        with pytest.raises(ValueError, match="text must follow the last image of a prompt"):
            model(**batch.inputs)
