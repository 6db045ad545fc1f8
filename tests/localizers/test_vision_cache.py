"""cache_vision: the tower runs once for equal images, the answers do not change, nothing stays behind."""

from dataclasses import replace

import pytest
import torch

import crop
from crop.cli.ask import load
from crop.embedded import scenes
from crop.localizers import CascadeLocalizer, UnionLocalizer
from crop.models import family_of
from tests.support.batches import standard_batch
from tests.support.cases import count_vision_calls, families, skip_what_transformers_cannot
from tests.support.tiny_families import FAMILIES, THOROUGH, build_model


@families(THOROUGH, fast=True)
def test_equal_images_run_once_and_answers_stay(family):
    model = build_model(family)
    inputs = standard_batch(family, "left", 2).inputs
    other = standard_batch(family, "single", 1).inputs
    with torch.no_grad():
        want, want_other = model(**inputs).logits, model(**other).logits
        with count_vision_calls(family, model) as calls, crop.cache_vision(model) as vision:
            assert vision.seconds == 0
            copies = {name: value.clone() for name, value in inputs.items()}
            got = [model(**inputs).logits]
            spent = vision.seconds
            got.append(model(**copies).logits)
            assert len(calls) == 1 and vision.seconds == spent > 0
            assert torch.equal(model(**other).logits, want_other)
            assert len(calls) == 2 and vision.seconds > spent
        assert all(torch.equal(logits, want) for logits in got)
        with count_vision_calls(family, model) as again:
            model(**inputs)
            model(**inputs)
    assert len(again) == 2


@families()
def test_the_projector_runs_once_too(family):
    model = build_model(family)
    skip_what_transformers_cannot(family, "projector", model)
    inputs, known, calls = standard_batch(family, "single", 1).inputs, family_of(model), []
    beside = {name for name, _ in model.model.named_children()} - {known.tower, known.decoder, known.projector}
    assert beside == set(FAMILIES[family].beside)
    if known.projector is None:
        pytest.skip("its tower projects itself, or what stands behind it is called more than once")
    *_, projector = known.vision_modules(model.model)
    below = next(part for part in projector.modules() if not list(part.children()) and list(part.parameters()))
    handle = below.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        want = model(**inputs).logits
        once = len(calls)
        with crop.cache_vision(model) as vision:
            assert torch.equal(model(**inputs).logits, want) and torch.equal(model(**inputs).logits, want)
    handle.remove()
    assert len(vision.spans) == 2  # tower and projector
    if below is not projector:  # else the hook sees what is handed out, too
        assert once >= 1 and len(calls) == 2 * once  # outside, and once inside


@pytest.mark.parametrize("place", ["on", "offload"])
def test_models_placed_by_accelerate(place, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = build_model("llava")
    inputs = standard_batch("llava", "single", 1).inputs
    want = model(**inputs).logits
    if place == "offload":
        accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))
    else:
        for module in (model.model.vision_tower, model.model.multi_modal_projector):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu"))
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    before = [dict(vars(module)) for module in (tower, projector)]
    assert place == "offload" or all("forward" in names for names in before)
    with torch.no_grad(), count_vision_calls("llava", model) as calls:
        with crop.cache_vision(model):
            assert torch.equal(model(**inputs).logits, want) and torch.equal(model(**inputs).logits, want)
        assert len(calls) == 1
        model(**inputs)
    assert len(calls) == 2 and before == [dict(vars(module)) for module in (tower, projector)]


@families(THOROUGH)
def test_gradients_are_not_shared(family):
    model = build_model(family).requires_grad_(True)
    inputs = standard_batch(family, "single", 1).inputs
    with count_vision_calls(family, model) as calls, crop.cache_vision(model):
        for _ in range(2):
            model(**inputs).logits.sum().backward()
    assert len(calls) == 2


def test_restored_after_an_exception_and_refused_twice():
    model = build_model("llava")
    tower = model.model.vision_tower
    before = set(vars(tower))
    with pytest.raises(KeyError):
        with crop.cache_vision(model):
            with pytest.raises(RuntimeError, match="nested"):
                with crop.cache_vision(model):
                    pass
            raise KeyError
    assert set(vars(tower)) == before
    with pytest.raises(TypeError, match="vision-language model"):
        with crop.cache_vision(torch.nn.Linear(1, 1)):
            pass


def test_localizers_and_shared_vision_take_a_peft_model():
    peft = pytest.importorskip("peft")
    asker, scene = load("embedded", "cpu", "auto"), scenes.scene(0)
    question = next(question.text for question in scene.questions if question.local)
    plain = [asker.localizer(name)(scene.image, question) for name in ("attention", "head")]
    asker = replace(asker, model=peft.get_peft_model(asker.model, peft.LoraConfig(target_modules=["q_proj"], r=2)))
    with crop.cache_vision(asker.model):
        assert [asker.localizer(name)(scene.image, question).boxes for name in ("attention", "head")] == [
            region.boxes for region in plain
        ]


class Counting:
    """A processor that counts its calls."""

    def __init__(self, processor):
        self.processor, self.calls = processor, 0

    def __call__(self, **given):
        self.calls += 1
        return self.processor(**given)

    def __getattr__(self, name):
        return getattr(self.processor, name)


@pytest.mark.parametrize("names", [("head",), ("attention",), ("attention", "head")])
@pytest.mark.parametrize("joined", [CascadeLocalizer, UnionLocalizer])
def test_localizers_and_answer_share_one_encoding(names, joined):
    asker = load("embedded", "cpu", "auto")
    scene = scenes.scene(0)
    question = next(question.text for question in scene.questions if question.local)
    want = joined([asker.localizer(name) for name in names])(scene.image, question)
    asker = replace(asker, processor=Counting(asker.processor))
    find = joined([asker.localizer(name) for name in names])
    answer = asker.ask(scene.image, question, method=None, localizer=find)
    assert asker.processor.calls == 1 and answer.region == want
    assert asker.ask(scene.image, question, method=None, localizer=find).text == answer.text
    assert asker.processor.calls == 2  # nothing outlives the block


def test_what_differs_is_encoded_again():
    asker = load("embedded", "cpu", "auto")
    processor, image = Counting(asker.processor), scenes.scene(0).image
    with crop.cache_vision(asker.model):
        first = crop.encode(processor, image, "what shape", asker.prompt)
        first["input_ids"] = None  # the caller's copy is the caller's
        assert crop.encode(processor, image, "what shape", asker.prompt)["input_ids"] is not None
        assert processor.calls == 1
        crop.encode(processor, image, "what colour", asker.prompt)
        crop.encode(processor, image.copy(), "what colour", asker.prompt)
        crop.encode(processor, image, "what colour", lambda question: asker.prompt(question))
        assert processor.calls == 4
    with pytest.raises(KeyError), crop.cache_vision(asker.model):
        crop.encode(processor, image, "what shape", asker.prompt)
        raise KeyError
    crop.encode(processor, image, "what shape", asker.prompt)
    assert processor.calls == 6
