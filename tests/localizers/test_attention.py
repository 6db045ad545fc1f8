"""The attention localizer: what it reads, and that the model is left as it was."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from PIL import Image

from crop import ops
from crop.cli.ask import EMBEDDED, load
from crop.embedded import scenes
from crop.geometry.layout import VisionLayout
from crop.localizers import (
    AttentionLocalizer,
    encode,
)
from crop.localizers.vision_cache import cache_vision
from crop.models.attention_hook import attention_hook
from crop.patching.patch import patch
from tests.support.batches import make_batch, make_sample
from tests.support.cases import count_vision_calls, families, get_model
from tests.support.families.entry import ATTENTIONS, IMAGE, NUM_LAYERS
from tests.support.localizing import PICTURE, Processor, names, state
from tests.support.tiny_families import FAMILIES, THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")
attentions = pytest.mark.parametrize("attention", ATTENTIONS)


def localizer(model, family, **more):
    more.setdefault("prompt", str)
    return AttentionLocalizer(model, Processor(family), **more)


@families(THOROUGH)
@attentions
@pytest.mark.parametrize("layer", [0, 2, NUM_LAYERS - 1])
def test_attention_equals_the_models_own(family, attention, layer):
    found = localizer(get_model(family, attention), family, layer=layer).attend(PICTURE, "?")
    inputs = Processor(family).batch.inputs
    weights = get_model(family, "eager")(**inputs, output_attentions=True).attentions[layer][0]
    vision = torch.nonzero(inputs["input_ids"][0] == IMAGE).flatten()
    assert torch.equal(found.layout.position, vision)
    rows = weights[:, int(vision[-1]) + 1 :][..., vision]
    torch.testing.assert_close(found.prior, rows[:, 0], atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(found.question, rows[:, -2:].mean(1), atol=2e-6, rtol=1e-4)
    every = localizer(get_model(family, attention), family, layer=layer, rows=99)
    every = every.attend(PICTURE, "?").question
    torch.testing.assert_close(every, rows[:, 1:].mean(1), atol=2e-6, rtol=1e-4)


@families(THOROUGH)
def test_stride_attends_to_means_of_blocks(family):
    """On an image whose blocks are of equal tokens nothing but the number of keys changes, and blocks share their mass."""
    model = get_model(family, "sdpa")
    ask = localizer(model, family, layer=0, stride=2)
    found = ask.attend(PICTURE, "?")
    block = found.layout.block(2)
    for number in block.unique():
        inside = found.question[:, block == number]
        assert torch.equal(inside, inside[:, :1].expand_as(inside))
    plain = localizer(model, family, layer=0).attend(PICTURE, "?")
    assert torch.equal(found.layout.center, plain.layout.center) and 0 < found.question.sum() < len(found.question)
    assert not torch.allclose(found.question, plain.question, atol=1e-4)


def test_rope_can_be_left_out_of_the_scores():
    """Then two equal tokens get equal attention, wherever they stand."""
    model = get_model("llava", "sdpa")
    ask = localizer(model, "llava", layer=0, rope=False)
    layout = ask.attend(PICTURE, "?").layout
    vision = torch.nonzero(Processor("llava").batch.inputs["input_ids"][0] == IMAGE).flatten()

    def equal(module, args, kwargs):
        embeds = kwargs["inputs_embeds"].clone()
        embeds[:, vision] = embeds[:, vision[:1]]
        return args, kwargs | {"inputs_embeds": embeds}

    handle = model.model.language_model.register_forward_pre_hook(equal, with_kwargs=True)
    try:
        still = ask.attend(PICTURE, "?").question
        turned = localizer(model, "llava", layer=0).attend(PICTURE, "?").question
    finally:
        handle.remove()
    assert len(layout) == still.shape[1]
    torch.testing.assert_close(still, still[:, :1].expand_as(still))
    assert not torch.allclose(turned, turned[:, :1].expand_as(turned), rtol=1e-3)


@families(THOROUGH)
def test_later_layers_and_the_head_never_run(family):
    model, ran = get_model(family, "sdpa"), []
    layers = model.model.language_model.layers
    hooks = [m.register_forward_pre_hook(lambda *_, name=n: ran.append(name))
             for n, m in [*enumerate(layers), ("head", model.lm_head)]]  # fmt: skip
    try:
        localizer(model, family, layer=1)(PICTURE, "?")
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [0, 1]


@pytest.mark.fast
@families(THOROUGH)
@attentions
def test_the_model_is_left_as_it_was(family, attention):
    model = get_model(family, attention)
    inputs = Processor(family).batch.inputs
    logits = model(**inputs).logits
    before, registered = state(model), names()
    localizer(model, family)(PICTURE, "?")
    assert state(model) == before and names() == registered
    assert torch.equal(model(**inputs).logits, logits)


@families(THOROUGH)
def test_an_exception_leaves_the_model_as_it_was(family, monkeypatch):
    model = get_model(family, "sdpa")
    before, registered = state(model), names()

    def fail(*_, **__):
        raise RuntimeError("broken operator")

    monkeypatch.setattr(ops, "attention_mass", fail)
    with pytest.raises(RuntimeError, match="broken operator"):
        localizer(model, family)(PICTURE, "?")
    assert state(model) == before and names() == registered
    monkeypatch.undo()
    layer = model.model.language_model.layers[1]
    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", fail)
        before = state(model)
        with pytest.raises(RuntimeError, match="broken operator"):
            localizer(model, family, layer=3)(PICTURE, "?")
        assert state(model) == before and names() == registered


def test_the_hook_reads_without_changing_and_nests():
    model = get_model("llava", "sdpa")
    inputs = Processor("llava").batch.inputs
    logits, seen = model(**inputs).logits, []
    attention = model.model.language_model.layers[2].self_attn
    config, registered = attention.config, names()
    wanted = [True]
    with attention_hook(attention, lambda *_: seen.append("outer")):
        with attention_hook(attention, lambda q, k, s: seen.append(tuple(q.shape)), when=lambda: wanted[0]):
            assert torch.equal(model(**inputs).logits, logits)
            wanted[0] = False
            model(**inputs)
    with attention_hook(attention, lambda *_: None):  # a call that fails before it attends
        broken = attention.q_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        broken.remove()
    heads, length = 4, inputs["input_ids"].shape[1]
    assert seen == [(1, heads, length, 8), "outer", "outer"]
    assert attention.config is config and names() == registered


@families(THOROUGH)
def test_localizer_and_answer_share_one_vision_pass(family):
    model, processor = get_model(family), Processor(family)
    generate = dict(processor.batch.inputs, max_new_tokens=4, do_sample=False)
    plain = model.generate(**generate)
    with count_vision_calls(family, model) as ran, cache_vision(model), torch.no_grad():
        AttentionLocalizer(model, processor, prompt=str)(PICTURE, "?")
        assert torch.equal(model.generate(**generate), plain)
    assert len(ran) == 1


@families(THOROUGH)
def test_low_confidence_means_the_whole_image(family):
    narrow = {"threshold": 0.9}
    sure = localizer(get_model(family, "sdpa"), family, min_confidence=1e-6, **narrow)(PICTURE, "?")
    assert not sure.is_whole and 0 < sure.confidence < 0.999
    unsure = localizer(get_model(family, "sdpa"), family, min_confidence=sure.confidence + 1e-3, **narrow)
    region = unsure(PICTURE, "?")
    assert region.is_whole and region.confidence == sure.confidence


@pytest.mark.parametrize("after", [0, 1])
def test_a_prompt_without_a_question_is_refused(after):
    ask = AttentionLocalizer(get_model("llava", "sdpa"), Processor("llava", after), prompt=str)
    with pytest.raises(ValueError, match=f"text after the image, got {after} tokens"):
        ask(PICTURE, "")


def test_localizing_a_patched_model_is_refused():
    model = get_model("llava", "sdpa")
    with patch(model, None), pytest.raises(RuntimeError, match="patched already"):
        localizer(model, "llava")(PICTURE, "?")


def test_prompt_or_chat_template_is_needed():
    with pytest.raises(ValueError, match="prompt must be given"):
        localizer(get_model("llava", "sdpa"), "llava", prompt=None)(PICTURE, "?")

    class Chat(Processor):
        chat_template = "template"

        def apply_chat_template(self, conversation, add_generation_prompt):
            self.conversation = conversation
            return "text"

    chat = Chat("llava")
    encode(chat, PICTURE, "what?")
    parts = chat.conversation[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"] and parts[1]["text"] == "what?"


@pytest.mark.parametrize("change, message", [
    ({"layer": NUM_LAYERS}, "layer must be in"), ({"layer": -1}, "layer must be in"),
    ({"threshold": 0.0}, "threshold must be in"), ({"min_confidence": 1.0}, "min_confidence must be in"),
    ({"rows": 0}, "rows must be >= 1"), ({"stride": 17}, "stride must be in"), ({"gap": -1}, "gap must be >= 0"), ({"max_boxes": 0}, "max_boxes must be >= 1"), ({"dilate": -1}, "dilate must be >= 0"),
])  # fmt: skip
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        localizer(get_model("llava", "sdpa"), "llava", **change)


def test_attention_of_the_carried_model_looks_at_what_is_asked_about():
    """More of the region than of the picture; the defaults belong to the weights: with others, they must be chosen anew."""
    asker = load(EMBEDDED, "cpu", "auto")
    find, whole, area, held = asker.localizer("attention"), [], {True: [], False: []}, []
    for seed in range(scenes.UNSEEN, scenes.UNSEEN + 12):
        scene = scenes.scene(seed)
        local = [question for question in scene.questions if question.kind in scenes.LOCAL_KINDS]
        for question in [*local[:4], *(each for each in scene.questions if each.kind in scenes.GLOBAL_KINDS)]:
            region, grid = find(scene.image, question.text), VisionLayout.grid(scenes.GRID, scenes.GRID)
            area[question.region.is_whole].append(region.area)
            if not question.region.is_whole:
                whole.append(region.is_whole)
                held.append(grid.inside(region)[grid.inside(question.region)].float().mean().item())
    assert len(whole) > 40 and mean(whole) < 0.15 and mean(held) > 0.85  # measured 4 % and 95 %
    assert mean(area[False]) < 0.6 and mean(area[True]) > mean(area[False]) + 0.15  # measured 50 % and 79 %


def test_of_tiles_the_view_of_the_whole_image_is_enough():
    """The encoder gets one tile, the decoder its tokens alone, and the region is one of the picture."""
    model, family, seen = get_model("internvl"), FAMILIES["internvl"], []

    class Tiles(Processor):
        def __init__(self):
            self.image_processor = family.processor()
            self.batch = make_batch([make_sample("internvl", [4, family.sizes[0], 7])], "none")

    first = next(part for part in model.model.vision_tower.modules() if isinstance(part, torch.nn.Conv2d))
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    find = AttentionLocalizer(model, Tiles(), prompt=str, overview=True)
    found = find.attend(Image.new("RGB", family.sizes[0]), "?")
    handle.remove()
    whole = found.layout.view == 1  # behind the tiles
    assert whole.sum() == 16 and (found.question[:, whole] > 0).all() and (found.question[:, ~whole] == 0).all()
    assert seen == [1]
    every = localizer(get_model("llava"), "llava", overview=True).attend(PICTURE, "?")
    assert (every.question > 0).all()  # no such view
