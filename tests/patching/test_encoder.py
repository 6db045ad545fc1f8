"""Pruning before the vision encoder, against a full run without the tokens that were never encoded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

import crop
from crop.baselines import DivPrune, VisionZip
from crop.geometry.region import Region
from crop.methods import Compose, EncoderPruning, InnerLLMPruning, Method, PreLLMCompression
from crop.models.family import Prompt
from crop.models.registry import families as known_families
from crop.models.registry import register_family
from crop.patching.hf import cache_of
from tests.support.batches import make_batch, make_sample, standard_batch
from tests.support.cases import (
    ATOL,
    Expected,
    as_argument,
    assert_kept,
    assert_logits,
    assert_steps,
    count_vision_calls,
    decide,
    families,
    get_model,
    get_oracle,
    greedy,
    next_turn,
    patched,
    position_arguments,
    skip_what_transformers_cannot,
)
from tests.support.families.entry import text_tokens
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import FAMILIES, build_model, get_config

pytestmark = pytest.mark.usefixtures("one_thread", "flash")


def takes_part(name):
    """Whether the encoder of a family takes part of a picture, and of the one that tests have."""
    if name in ("exaone4_5_video", "qwen2_5_omni_video"):  # one window per frame: nothing can be left out
        return False
    if not hasattr(transformers, FAMILIES[name].classes):  # 5.17 lacks some
        return False
    config = get_config(name)
    return known_families()[config.model_type].encoder_of(config) is not None


ABLE = [name for name in FAMILIES if takes_part(name)]
SPLIT = [name for name in ABLE if name not in ("exaone4_5", "qwen2_5_omni")]  # pictures of more than two windows
TILES = [name for name in ABLE if name in ("internvl", "llava_next", "llava_onevision", "idefics3", "ovis2")]
NEAR, FAR = Region.box(0.05, 0.05, 0.4, 0.45), Region.box(0.55, 0.6, 0.95, 0.95)
ENCODER = EncoderPruning(ring=0)
METHODS = {
    "encoder": ENCODER,
    "pooled": Compose(PreLLMCompression(inside=1, context=2, outside=2, ring=1), encoder=ENCODER),
    "pruned": Compose(ilp=InnerLLMPruning(0.2, layer=2), encoder=ENCODER),
    "all": Compose(PreLLMCompression(keep=0.4), InnerLLMPruning(0.2, layer=2), ENCODER),
    "by features": Compose(DivPrune(0.3), InnerLLMPruning(0.2, layer=2), ENCODER),
}
THOROUGH = ("internvl", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
CASES = [
    (family, *padding, name)
    for family in ABLE
    for padding in (("left", 1), ("right", 2))[: 1 + (family in THOROUGH)]
    for name in METHODS
    if family in THOROUGH or name in ("encoder", "all")
]


def where(batch, start=0):
    """A corner of every image, another one for the next."""
    count = sum(len(sample.images) for sample in batch.samples)
    return [(NEAR, FAR)[(number + start) % 2] for number in range(count)]


def expectations(batch, method, regions):
    found, left = [], iter(regions)
    for sample in batch.samples:
        found.append(Expected(sample, method, [next(left) for _ in sample.images]))
    return found


def shares(stats):
    """Of every image, which pieces were encoded."""
    return [image.encoding.taken.tolist() for image in stats.images]


@families(TILES, fast=True)
def test_a_token_is_made_of_the_tiles_that_are_said(family):
    """Another tile changes the features of exactly those tokens that the family says are made of it."""
    oracle, sample = get_oracle(family), make_sample(family, [3, FAMILIES[family].sizes[0], 4], 5)
    (pieces,), inputs = sample.pieces(), sample.inputs()
    base, names = oracle.model.model, ("pixel_values", "image_sizes")

    def features(pixels):
        given = {name: inputs[name] for name in names if name in inputs} | {"pixel_values": pixels}
        found = base.get_image_features(**given, return_dict=True).pooler_output
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in found])

    pixels, made_of = inputs["pixel_values"], pieces.of_token
    plain, tiles = features(pixels), pixels.flatten(0, -4)
    assert len(pieces) == len(tiles) > 1 and int(pieces.overview.sum()) == 1
    for number in range(len(pieces)):
        other = tiles.clone()
        other[number] += 1
        changed = (features(other.view_as(pixels)) != plain).any(1)
        assert changed.tolist() == (made_of == number).any(1).tolist()
    of_whole = (made_of == int(pieces.overview.int().argmax())).any(1)
    layout = sample.layouts()[0]
    assert len(set(layout.view[of_whole].tolist())) == 1


@pytest.mark.parametrize("family,padding,images,name", CASES)
def test_pruned_is_the_oracle(family, padding, images, name):
    model, batch, method = get_model(family), standard_batch(family, padding, images), METHODS[name]
    regions = where(batch)
    wanted = expectations(batch, method, regions)
    with patched(model, method, batch, regions) as stats:
        out = model(**batch.inputs)
    assert_kept(stats, [expect.decision for expect in wanted])
    assert_logits(out.logits, batch, wanted, kept=name in ("encoder", "pruned"))
    assert stats.tokens_before == [len(span) for sample in batch.samples for span in sample.spans()]
    decisions = [expect.decision for expect in wanted]
    made = [len(own) + len(more) for one in decisions for own, more in zip(one.encoded, one.copied, strict=True)]
    assert stats.tokens_encoded == made
    if images == 1:
        assert not all(map(all, shares(stats)))
    if padding == "left":
        with patched(model, method, batch, regions) as stats:
            out = greedy(model, batch)
        assert_steps(out, [expect.steps for expect in wanted])
        assert_kept(stats, [expect.decision for expect in wanted])


@families(TILES, fast=True)
def test_the_tower_gets_the_tiles_that_are_taken(family):
    """Nothing else of the picture, in a forward and in generate(); what is encoded has the bits of these tiles alone."""
    model, batch, seen = get_model(family), standard_batch(family, "single", 1), []
    tower = known_families()[model.config.model_type].vision_tower(model.model)
    regions, pixels = where(batch), batch.inputs["pixel_values"].flatten(0, -4)
    first = next(part for part in tower.modules() if isinstance(part, torch.nn.Conv2d))
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with patched(model, ENCODER, batch, regions) as stats:
            model(**batch.inputs)
            greedy(model, batch, 2)
    finally:
        handle.remove()
    (taken,) = shares(stats)
    assert len(seen) == 2 and 0 < sum(taken) < len(taken)
    for got in seen:
        assert torch.equal(got, pixels[torch.tensor(taken)])


@families(ABLE)
def test_keep_all_is_bit_identical(family):
    """The whole image as region, and a method that leaves nothing out."""
    model, batch = get_model(family), standard_batch(family, "left", 2)
    plain, generated = model(**batch.inputs).logits, greedy(model, batch, 2)

    class All(EncoderPruning):
        def encode(self, layout, region, pieces):
            return None

    for method, regions in ((All(), where(batch)), (EncoderPruning(ring=10**3), where(batch))):
        with patched(model, method, batch, regions) as stats:
            assert torch.equal(model(**batch.inputs).logits, plain)
            out = greedy(model, batch, 2)
        assert all(map(all, shares(stats))) and stats.tokens_encoded == stats.tokens_before == stats.tokens_after_ilp
        assert torch.equal(out.sequences, generated.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, generated.logits, strict=True))


@families(ABLE)
def test_second_turn(family):
    """A question to the pruned cache."""
    model, oracle, method = get_model(family), get_oracle(family), METHODS["all"]
    size, question = FAMILIES[family].sizes[0], text_tokens(4, 3)
    first = make_sample(family, [5, size, 9], 3)
    batch = make_batch([first], "none")
    decision = decide(oracle, first, method, [NEAR])
    with patched(model, method, batch, [NEAR]):
        out = greedy(model, batch, 2)
        again = next_turn(model, batch, out, question, 2)
    steps = oracle.greedy(first, decision, 2)
    sample = first.extended([*steps.tokens, *question])
    for got, logits in zip(again.logits, oracle.greedy(sample, decision, 2).logits, strict=True):
        torch.testing.assert_close(got[0], logits, atol=ATOL, rtol=0)


@families(
    [name for name in SPLIT if name != "llava_onevision"]
)  # where an image alone in its call has tiles, others none
def test_second_image(family):
    """A turn that brings another image to the pruned cache: in generate() where that takes ids of the whole talk."""
    model, oracle, method = get_model(family), get_oracle(family), METHODS["all"]
    size = FAMILIES[family].sizes[0]
    first, later = make_sample(family, [5, size, 9], 3), make_sample(family, [3, size, 6], 4)
    talk = first.joined(later)
    wanted = decide(oracle, talk, method, [FAR], previous=decide(oracle, first, method, [NEAR]))
    with patched(model, method, make_batch([first], "none"), [NEAR]):
        cache = cache_of(model(**first.inputs()))
    given = (
        later.inputs() | {"attention_mask": torch.ones(1, len(talk.ids), dtype=torch.int64)} | as_argument(model, cache)
    )
    whole = not hasattr(model.model, "get_rope_index")
    with patched(model, method, make_batch([later], "none"), [FAR]) as stats:
        if whole:
            given["input_ids"] = torch.tensor([talk.ids])
            (logits,) = greedy(model, make_batch([talk], "none"), 1, **given).logits
        else:
            logits = model(**given, **position_arguments(oracle, [talk], len(later.ids))).logits[:, -1]
    assert not all(map(all, shares(stats)))
    torch.testing.assert_close(logits[0], oracle.forward(talk, wanted)[0][-1], atol=ATOL, rtol=0)


@families(SPLIT)
def test_cached_features_are_those_of_what_was_encoded(family):
    """Equal regions share a pass of the encoder, others do not, and an unpruned answer needs all of the picture."""
    model, batch = get_model(family), standard_batch(family, "single", 1)
    plain = model(**batch.inputs).logits
    with count_vision_calls(family, model) as calls, crop.cache_vision(model), torch.no_grad():
        for region, number in ((NEAR, 1), (NEAR, 1), (FAR, 2), (FAR, 2)):
            with patched(model, ENCODER, batch, [region]) as stats:
                logits = model(**batch.inputs).logits
            (expect,) = expectations(batch, ENCODER, [region])
            assert_kept(stats, [expect.decision])
            assert_logits(logits, batch, [expect], kept=True)
            assert len(calls) == number
        assert torch.equal(model(**batch.inputs).logits, plain) and len(calls) == 3


@families(ABLE)
def test_repeated_samples(family):
    """generate() repeats every sample; the pictures are encoded for all copies."""
    model, batch = get_model(family), standard_batch(family, "left", 1)
    skip_what_transformers_cannot(family, "repeat", model)
    regions = where(batch)
    torch.manual_seed(0)
    with patched(model, METHODS["all"], batch, regions):
        out = greedy(model, batch, 2, do_sample=True, num_return_sequences=2)
    wanted, prompt = expectations(batch, METHODS["all"], regions), batch.inputs["input_ids"].shape[1]
    for row, tokens in enumerate(out.sequences[:, prompt:].tolist()):
        expect = wanted[row // 2]
        for number in range(2):
            logits = expect.oracle.forward(expect.sample.extended(tokens[:number]), expect.decision)[0][-1]
            torch.testing.assert_close(out.logits[number][row], logits, atol=ATOL, rtol=0)


@families(ABLE, fast=True)
@pytest.mark.parametrize("copies", [1, 2])
def test_a_picture_is_planned_once(family, copies):
    """In generate(), which encodes before it calls the model, too."""
    model, batch, asked = get_model(family), standard_batch(family, "left", 2), []
    if copies > 1:
        skip_what_transformers_cannot(family, "repeat", model)

    class Counted(EncoderPruning):
        def encode(self, layout, region, pieces):
            asked.append(layout)
            return super().encode(layout, region, pieces)

    kind, read = known_families()[model.config.model_type], []
    counted = replace(kind, images=lambda prompt: read.append(prompt) or kind.images(prompt))
    register_family(counted)
    try:
        with patched(model, Counted(ring=0), batch, where(batch)) as stats:
            greedy(model, batch, 2, do_sample=True, num_return_sequences=copies)
    finally:
        register_family(kind)
    assert len(asked) == len(where(batch)) == len(stats.tokens_before) // copies and len(read) == 1
    assert stats.seconds["plan"] > 0


@families(ABLE, fast=True)
def test_exit_restores_everything(family):
    """After a normal end and after an interrupt inside the encoder of a generation."""
    model, batch = get_model(family), standard_batch(family, "left", 2)
    plain, before = model(**batch.inputs).logits, snapshot(model)
    with patched(model, METHODS["all"], batch, where(batch)):
        greedy(model, batch, 2)
    assert_unchanged(before, model)
    tower = known_families()[model.config.model_type].vision_tower(model.model)
    leaf = [part for part in tower.modules() if not list(part.children())][-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    with patched(model, METHODS["all"], batch, where(batch)):
        handle = leaf.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            greedy(model, batch, 2)
        handle.remove()
        assert model(**batch.inputs).logits.isfinite().all()  # nothing is left of the call that failed
    assert_unchanged(before, model)
    assert torch.equal(model(**batch.inputs).logits, plain)


@pytest.mark.fast
def test_gradients_pass():
    model, batch = build_model("internvl").requires_grad_(True), standard_batch("internvl", "single", 1)
    with patched(model, ENCODER, batch, where(batch)):
        model(**batch.inputs).logits.sum().backward()
    weight = next(model.model.vision_tower.parameters())
    assert weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.fast
@pytest.mark.parametrize("family", ["internvl", "perception_lm"])
def test_the_view_of_the_whole_is_known_without_a_processor(family):
    """Where each tile is taken for a view of its own."""
    sample = make_sample(family, [3, FAMILIES[family].sizes[0], 4], 5)
    (known,), kind = sample.pieces(), known_families()[get_config(family).model_type]
    prompt = Prompt(get_config(family), torch.tensor([sample.ids]), sample.inputs())
    layouts = [layout for _, layout in kind.images(prompt)]
    assert len(layouts[0].view.unique()) == len(known) > 2
    (pieces,) = kind.encoder.pieces(prompt, layouts)
    assert torch.equal(pieces.overview, known.overview) and int(known.overview.sum()) == 1


class LastFrames(Method):
    """Nothing of the first frame; of a picture, its lower half."""

    def encode(self, layout, region, pieces):
        return pieces.needed(layout.view > 0 if layout.extent[0] > 1 else layout.center[:, 1] > 0.5)


class CopyAlone(Method):
    def encode(self, layout, region, pieces):
        return pieces.overview


class LastFramesAndCopy(Method):
    def encode(self, layout, region, pieces):
        return LastFrames.encode(self, layout, region, pieces) | pieces.overview


@pytest.mark.parametrize("method", [LastFrames(), CopyAlone(), LastFramesAndCopy()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("images", [1, 2])
@families([name for name in ABLE if name not in TILES and name not in ("llava", "vipllava")])
def test_any_part_of_a_grid_with_or_without_its_copy(family, images, method):
    """Also a video of which a frame, or all but the copy, is left out."""
    model, batch = get_model(family), standard_batch(family, "left", images)
    regions = where(batch)
    wanted = expectations(batch, method, regions)
    with patched(model, method, batch, regions) as stats:
        out = model(**batch.inputs)
    assert_kept(stats, [expect.decision for expect in wanted])
    assert_logits(out.logits, batch, wanted, kept=True)


@pytest.mark.fast
def test_what_cannot_be_is_refused():
    model, batch = get_model("internvl"), standard_batch("internvl", "single", 1)

    def returning(value):
        method = type("Own", (Method,), {"encode": lambda self, layout, region, pieces: value})()
        with patched(model, method, batch, where(batch)):
            model(**batch.inputs)

    with pytest.raises(TypeError, match=r"encode\(\) of a method must return a bool tensor or None, got torch.int64"):
        returning(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"take some of the image's 3 pieces, got a mask of shape \(3,\) with 0"):
        returning(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got a mask of shape \(2,\)"):
        returning(torch.ones(2, dtype=torch.bool))
    other = get_model("gemma3")
    before = snapshot(other)
    with pytest.raises(
        ValueError, match="whose encoder takes part of a picture.*got 'gemma3'; leave EncoderPruning out"
    ):
        patched(other, ENCODER, standard_batch("gemma3", "single", 1)).__enter__()
    assert_unchanged(before, other)
    with pytest.raises(TypeError, match="plc must not observe the encoder that another stage prunes"):
        Compose(VisionZip(0.5), encoder=ENCODER)
