"""Pruning inside a vision encoder whose layers attend to the whole image, against a run whose late layers do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import crop
from crop import embedded
from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Encoding
from crop.geometry.region import Region
from crop.methods import Compose, EncoderPruning, InnerLLMPruning, PreLLMCompression
from crop.models import registry
from crop.models.encoders import LayerEncoder
from tests.support.batches import standard_batch
from tests.support.cases import (
    ATOL,
    Expected,
    assert_kept,
    assert_logits,
    assert_steps,
    count_vision_calls,
    families,
    get_model,
    get_oracle,
    greedy,
    patched,
)
from tests.support.tiny_families import FAMILIES, build_model, set_attention

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

NAMES = ("llava", "vipllava")
REGIONS = [Region.box(0.05, 0.05, 0.4, 0.45), Region.box(0.55, 0.4, 0.95, 0.95)] * 2
METHODS = {
    "encoder": EncoderPruning(ring=0),
    "all": Compose(PreLLMCompression(keep=0.4), InnerLLMPruning(0.2, layer=2), EncoderPruning(ring=0)),
}


@pytest.fixture
def at_layer_0(monkeypatch):
    """The tiny towers have two layers, and the features are those of the first."""
    for name in NAMES:
        known = replace(registry.families()[name], encoder=LayerEncoder(0.0))
        monkeypatch.setitem(registry._families, name, known)
        for attribute, value in (("tower_cut", 0), ("_features", {}), ("_forwards", {})):  # what it knows is of no cut
            monkeypatch.setattr(get_oracle(name), attribute, value)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("padding,images", [("single", 1), ("left", 1), ("right", 2)])
@families(NAMES, fast=True)
def test_pruned_is_the_oracle(family, padding, images, name, at_layer_0):
    """Images of a call keep different numbers of tokens."""
    model, batch, left = get_model(family), standard_batch(family, padding, images), iter(REGIONS)
    regions = [next(left) for sample in batch.samples for _ in sample.images]
    left = iter(regions)
    wanted = [Expected(sample, METHODS[name], [next(left) for _ in sample.images]) for sample in batch.samples]
    with patched(model, METHODS[name], batch, regions) as stats:
        out = model(**batch.inputs)
    assert_kept(stats, [expect.decision for expect in wanted])
    assert_logits(out.logits, batch, wanted, kept=name == "encoder")
    assert padding == "single" or len(set(stats.tokens_encoded)) > 1
    plain = expect_without_mask(wanted[0])
    assert (wanted[0].logits[max(wanted[0].logits)] - plain[-1]).abs().max() > 1e-4  # the encoder did see less
    if padding == "left":
        with patched(model, METHODS[name], batch, regions):
            out = greedy(model, batch)
        assert_steps(out, [expect.steps for expect in wanted])


@pytest.mark.parametrize("late", [True, False])
@families(NAMES, fast=True)
def test_one_picture_keeps_all(family, late, request):
    """Others of the call do not, before whose cut the hidden states are as many."""
    if not late:
        request.getfixturevalue("at_layer_0")
    model, batch = get_model(family), standard_batch(family, "left", 2)
    regions = [REGIONS[0], Region.whole(), REGIONS[1], REGIONS[0]]
    left = iter(regions)
    wanted = [Expected(sample, METHODS["all"], [next(left) for _ in sample.images]) for sample in batch.samples]
    with patched(model, METHODS["all"], batch, regions) as stats:
        out = model(**batch.inputs)
    assert stats.tokens_encoded[1] == stats.tokens_before[1] > stats.tokens_encoded[0]
    assert_kept(stats, [expect.decision for expect in wanted])
    assert_logits(out.logits, batch, wanted)


def expect_without_mask(expect):
    """Logits where the tokens are dropped behind the encoder, which saw all."""
    decision = replace(expect.decision, encoded=())
    return expect.oracle.forward(expect.sample, decision)[0]


@families(NAMES[:1], fast=True)
def test_cached_features_are_those_of_what_was_encoded(family, at_layer_0):
    model, batch = get_model(family), standard_batch(family, "single", 1)
    plain = model(**batch.inputs).logits
    with count_vision_calls(family, model) as calls, crop.cache_vision(model), torch.no_grad():
        for region, number in ((REGIONS[0], 1), (REGIONS[0], 1), (REGIONS[1], 2)):
            with patched(model, METHODS["encoder"], batch, [region]):
                logits = model(**batch.inputs).logits
            assert_logits(logits, batch, [Expected(batch.samples[0], METHODS["encoder"], [region])], kept=True)
            assert len(calls) == number
        assert torch.equal(model(**batch.inputs).logits, plain) and len(calls) == 3


@pytest.mark.fast
def test_late_layers_of_the_embedded_model_see_fewer_tokens():
    """By default a fifth of the layers, SigLIP's here; generate() gives the same tokens when called again."""
    model, processor = embedded.load()
    scene, seen = embedded.scene(2), []
    inputs = crop.encode(processor, scene.image, scene.questions[1].text, embedded.prompt)
    layers = model.model.vision_tower.encoder.layers
    handles = [layer.register_forward_hook(lambda _, __, out: seen.append(out.shape[1])) for layer in layers]
    with crop.patch(
        model, EncoderPruning(ring=1), Region.box(0.2, 0.6, 0.9, 0.8), processor=processor, image_size=scene.image.size
    ) as stats:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    for handle in handles:
        handle.remove()
    cut = LayerEncoder().cut(len(layers))
    assert seen == [576] * cut + stats.tokens_encoded * (len(layers) - cut)
    assert 0 < cut < len(layers) and stats.tokens_encoded[0] < 288


@families(NAMES, fast=True)
def test_a_tower_under_flash_attention(family, at_layer_0, flash):
    """Its layers ignore the fillers of images that keep fewer tokens."""
    model, batch = build_model(family), standard_batch(family, "left", 1)
    regions = REGIONS[: sum(len(sample.images) for sample in batch.samples)]
    with patched(model, METHODS["encoder"], batch, regions) as stats:
        eager = model(**batch.inputs).logits
    assert len(set(stats.tokens_encoded)) > 1
    set_attention(getattr(model.model, FAMILIES[family].tower), "flash_attention_2")
    with patched(model, METHODS["encoder"], batch, regions):
        logits = model(**batch.inputs).logits
    torch.testing.assert_close(logits, eager, atol=ATOL, rtol=0)


@pytest.mark.fast
def test_another_number_of_pictures_is_refused():
    model, layout = get_model("llava"), VisionLayout.grid(4, 4)
    (pieces,) = LayerEncoder().pieces(None, [layout])
    images = [Encoding(layout, pieces, torch.arange(16) < 9)]
    with pytest.raises(RuntimeError, match="must get the 1 pictures of the prompt, got 3"):
        LayerEncoder().take(model.model.vision_tower, (torch.zeros(3, 3, 8, 8),), {}, images)


def test_another_tower_is_refused():
    with pytest.raises(ValueError, match="whose encoder takes part of a picture.*got 'llava'"):
        patched(get_model("pixtral"), METHODS["encoder"], standard_batch("pixtral", "single", 1)).__enter__()
