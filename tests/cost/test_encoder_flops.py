"""Estimated FLOPs of vision encoders, and of localizers that look with the model, against those that torch counts."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchFeature

import crop
from crop import embedded
from crop.cost.speed import Speed
from crop.localizers.registry import get_localizer
from crop.models import families as known_families
from crop.models import family_of, register_family
from tests.patching.test_encoder import ABLE, where
from tests.support.batches import Batch, make_sample, standard_batch
from tests.support.cases import families, get_model, get_oracle, patched
from tests.support.cases import where as processed
from tests.support.tiny_families import set_attention

pytestmark = pytest.mark.usefixtures("one_thread")
METHOD = crop.Compose(crop.PreLLMCompression(keep=0.4), encoder=crop.EncoderPruning(ring=0))


def counted(model: Any, call: Any) -> tuple[float, float]:
    """FLOPs of tower and projector, and of decoder layers, as torch counts them in a call."""
    family, spent = family_of(model), {"encoder": [], "decoder": []}
    parts = dict.fromkeys(family.vision_modules(family.base(model)), "encoder")
    parts |= dict.fromkeys(family.language_model(model).layers, "decoder")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        handles = []
        for part, kind in parts.items():
            note = lambda *_, kind=kind: spent[kind].append(counter.get_total_flops())  # noqa: E731
            handles += [part.register_forward_pre_hook(note), part.register_forward_hook(note, always_call=True)]
        call()
    for handle in handles:
        handle.remove()
    found = [sum(stop - start for start, stop in zip(one[::2], one[1::2], strict=True)) for one in spent.values()]
    return found[0], found[1]


def of_prefill(model: Any, method: crop.Method | None, batch: Batch) -> float:
    with patched(model, method, batch, where(batch)):
        return counted(model, lambda: model(**batch.inputs))[0]


@families(ABLE)
@pytest.mark.parametrize("padding,images", [("single", 1), ("left", 2)])
def test_encoder(family: str, padding: str, images: int) -> None:
    model, batch = get_oracle(family).model, standard_batch(family, padding, images)
    found = crop.estimate(model, batch.inputs, METHOD, where(batch), **processed(batch))
    assert found.before.encoder_flops == pytest.approx(of_prefill(model, None, batch), rel=0.02)
    assert found.after.encoder_flops == pytest.approx(of_prefill(model, METHOD, batch), rel=0.02)
    without = crop.estimate(model, batch.inputs, METHOD.plc, where(batch), **processed(batch))
    assert without.before == replace(found.before, **seconds(without.before))
    assert without.after.encoder_flops == without.before.encoder_flops


def seconds(cost: Any) -> dict[str, float]:
    return {name: getattr(cost, name) for name in ("encoder_seconds", "decoder_seconds")}


@pytest.mark.fast
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
def test_the_whole_first_token(family: str) -> None:
    """All that torch counts but the head over the vocabulary and rotary angles."""
    model, batch = get_oracle(family).model, standard_batch(family, "single", 1)
    method = replace(METHOD, ilp=crop.InnerLLMPruning(0.2, layer=2))
    found = crop.estimate(model, batch.inputs, method, where(batch), **processed(batch))
    for wanted, cost in ((None, found.before), (method, found.after)):
        with patched(model, wanted, batch, where(batch)):
            assert cost.flops == pytest.approx(sum(counted(model, lambda: model(**batch.inputs))), rel=0.02)
    assert found.after.flops < found.before.flops and found.look is None


@pytest.mark.fast
def test_the_look_of_a_localizer() -> None:
    model, processor = embedded.load()
    set_attention(model, "eager")  # which torch counts
    scene = embedded.scene(2)
    image, question = scene.image, scene.questions[1].text
    inputs = crop.encode(processor, image, question, embedded.prompt)
    given = dict(model=model, processor=processor, prompt=embedded.prompt)
    asked = dict(processor=processor, image_size=image.size)
    small = get_localizer("attention", **given, coarse=4)
    for localizer, copied in ((get_localizer("attention", **given), 0), (small, 1),
                              (get_localizer("head", **given, path=embedded.HEAD), 0)):  # fmt: skip
        encoder, decoder = counted(model, lambda: localizer(image, question))  # noqa: B023
        for method, runs in ((crop.by_name("crop", 0.11), copied), (METHOD, 1)):
            look = crop.estimate(model, inputs, method, localizer=localizer, **asked).look
            assert look.encoder_flops == pytest.approx(runs * encoder, rel=0.02)
            assert decoder <= look.decoder_flops * 1.02 and (look.decoder_flops > 0) == (decoder > 0)
    free = crop.estimate(model, inputs, METHOD)
    found = crop.estimate(model, inputs, METHOD, localizer=small, **asked)
    assert "for the localizer" in found.advice and "localizer" not in free.advice
    with pytest.raises(
        ValueError, match="image_size must be given for a localizer that looks with the model, got None"
    ):
        crop.estimate(model, inputs, METHOD, localizer=small)
    for other in (crop.BoxLocalizer(crop.Region.whole()), crop.CoarseLocalizer(lambda *_: crop.Region.whole())):
        with pytest.raises(ValueError, match="that looks with the model itself .*; give localizer_seconds for others"):
            crop.estimate(model, inputs, METHOD, localizer=other, **asked)


@pytest.mark.fast
def test_the_host_launches_the_encoder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where launching a layer takes longer than what it does, fewer tiles save nothing in the encoder."""
    model, batch = get_model("internvl"), standard_batch("internvl", "single", 1)
    speed = Speed(matrices=(1e-12,) * 4, attention=1e-15, hook=0.0, image=0.0, step=0.0)
    monkeypatch.setattr(sys.modules["crop.cost.estimate"], "measure_speed", lambda *_: speed)
    found = [
        crop.estimate(model, batch.inputs, METHOD, where(batch), host_seconds=host, **processed(batch))
        for host in (0.0, 1.0)
    ]
    free, launched = ((one.before.encoder_seconds, one.after.encoder_seconds) for one in found)
    layers = model.config.vision_config.num_hidden_layers
    assert free[1] < 0.9 * free[0] and launched == pytest.approx((layers, layers), rel=1e-3)


class Patches:
    """A processor whose tokens follow the size of the picture."""

    chat_template = None

    def __call__(self, images: Image.Image, text: str, return_tensors: str) -> BatchFeature:
        return BatchFeature(make_sample("qwen2_5_vl", [4, images.size, 9]).inputs())


@pytest.mark.fast
def test_a_small_copy_is_a_small_look() -> None:
    model, size = get_model("qwen2_5_vl"), (256, 256)
    inputs = make_sample("qwen2_5_vl", [4, size, 9]).inputs()
    whole = get_localizer("attention", model=model, processor=Patches(), prompt=str)
    asked = dict(localizer=crop.CoarseLocalizer(whole, times=4, least=8), image_size=size)
    found = crop.estimate(model, inputs, METHOD, crop.Region.box(0.1, 0.1, 0.2, 0.2), **asked)
    assert 0 < found.look.encoder_flops < found.before.encoder_flops / 16
    assert found.look.tokens == [64] and found.before.tokens == [1024]


@pytest.mark.fast
@families(["gemma3", "pixtral"])
def test_an_encoder_that_takes_all_is_not_counted(family: str) -> None:
    model, batch = get_model(family), standard_batch(family, "single", 1)
    found = crop.estimate(model, batch.inputs, METHOD.plc)
    assert found.before.encoder_flops == found.after.encoder_flops == 0
    assert "without the vision encoder, which is not counted for this model" in found.advice
    known = known_families()["qwen2_5_vl"]
    assert "encoder" not in crop.estimate(get_model("qwen2_5_vl"), _inputs(), METHOD.plc).advice
    register_family(replace(known, encoder=None))
    try:
        assert "without the vision encoder" in crop.estimate(get_model("qwen2_5_vl"), _inputs(), METHOD.plc).advice
    finally:
        register_family(known)


@functools.cache
def _inputs() -> dict[str, Any]:
    return standard_batch("qwen2_5_vl", "single", 1).inputs
