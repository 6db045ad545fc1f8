"""Localizers: boxes out of scores, the attention tap, and that the model is left as it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import (
    ATTENTIONS,
    FAMILIES,
    IMAGE,
    LLAVA_GRID,
    NUM_LAYERS,
    image_processor,
    make_batch,
    make_sample,
)
from transformers import BatchFeature

import crop
from crop import ops
from crop.cli.ask import EMBEDDED, load
from crop.cli.main import main
from crop.embedded import scenes
from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.localizers import (
    Attention,
    AttentionLocalizer,
    BoxLocalizer,
    WholeLocalizer,
    encode,
    find_region,
    get_localizer,
    localizer_names,
    registry,
    score_tokens,
)
from crop.localizers.boxes import Raster
from crop.localizers.vision_cache import cache_vision
from crop.models.attention_hook import tap
from crop.patching.patch import patch

pytestmark = pytest.mark.usefixtures("one_thread", "flash")
families = pytest.mark.parametrize("family", FAMILIES)
attentions = pytest.mark.parametrize("attention", ATTENTIONS)
PICTURE = Image.new("RGB", (64, 48), "white")


class Processor:
    """Stands in for a processor: the question's length decides the prompt, the pixels are noise."""

    chat_template = None

    def __init__(self, family: str, after: int = 7) -> None:
        self.image_processor = image_processor("resize")
        grid = LLAVA_GRID if family == "llava" else (6, 9)
        self.batch = make_batch(family, [make_sample(family, [4, grid, after][: 2 + (after > 0)])], "none")

    def __call__(self, images, text, return_tensors):
        return BatchFeature(dict(self.batch.inputs))


def localizer(model, family, **more):
    more.setdefault("prompt", str)
    return AttentionLocalizer(model, Processor(family), **more)


def state(model):
    """Everything the tap could leave behind: hooks, configurations, plain attributes, weights."""
    found = []
    for name, module in model.named_modules():
        found.append((name, len(module._forward_hooks), len(module._forward_pre_hooks)))
        config = getattr(module, "config", None)
        found.append((id(config), getattr(config, "_attn_implementation", None)))
        found.append({key: id(value) for key, value in vars(module).items()})
    return found


def names():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return set(ALL_ATTENTION_FUNCTIONS)


# ------------------------------------------------------------------------------ from scores to boxes
def assert_boxes(region, *boxes):
    assert len(region.boxes) == len(boxes), region
    for found, box in zip(region.boxes, boxes, strict=True):
        assert found == pytest.approx(box, abs=1e-6)


def bump(layout, *boxes, floor=0.0):
    """Score 1 in boxes of tokens (left, top, right, bottom), `floor` elsewhere."""
    score = torch.full((len(layout),), floor)
    for left, top, right, bottom in boxes:
        inside = (layout.col >= left) & (layout.col < right) & (layout.row >= top) & (layout.row < bottom)
        score[inside] = 1.0
    return score


def test_one_bump_becomes_its_box_and_grows_on_request():
    layout = VisionLayout.grid(12, 16)
    score = bump(layout, (4, 3, 8, 6))
    region = find_region(layout, score)
    assert_boxes(region, (4 / 16, 3 / 12, 8 / 16, 6 / 12))
    assert region.confidence == pytest.approx(1.0)
    assert_boxes(find_region(layout, score, dilate=1), (3 / 16, 2 / 12, 9 / 16, 7 / 12))
    corner = bump(layout, (13, 0, 16, 3))
    assert_boxes(find_region(layout, corner, dilate=2), (11 / 16, 0, 1, 5 / 12))


def test_confidence_is_the_share_of_the_score_corrected_for_chance():
    layout = VisionLayout.grid(10, 10)
    score = bump(layout, (2, 2, 6, 7), floor=0.05)  # 20 tokens of 1, 80 of 0.05
    region = find_region(layout, score, threshold=0.5)
    assert region.confidence == pytest.approx((20 / 24 - 0.2) / 0.8)


def test_two_bumps_become_two_boxes_heaviest_first_and_overlapping_boxes_merge():
    layout = VisionLayout.grid(16, 16)
    score = bump(layout, (1, 1, 4, 4), (9, 9, 14, 14))
    two = find_region(layout, score)
    assert_boxes(two, (9 / 16, 9 / 16, 14 / 16, 14 / 16), (1 / 16, 1 / 16, 4 / 16, 4 / 16))
    assert_boxes(find_region(layout, score, max_boxes=1), (9 / 16, 9 / 16, 14 / 16, 14 / 16))
    near = find_region(layout, bump(layout, (2, 2, 5, 5), (7, 2, 10, 5)), dilate=2, gap=0)
    assert_boxes(near, (0.0, 0.0, 12 / 16, 7 / 16))


@pytest.mark.parametrize(
    "picture, boxes",
    [
        ("#...#|#.#.#|###.#", [(0, 0, 3, 3), (4, 0, 5, 3)]),  # arms that meet further down
        ("#.#.#|#.#.#|#.#.#|#####", [(0, 0, 5, 4)]),
        ("#...#|.#.#.|..#..|.....|#...#", [(0, 0, 5, 3), (0, 4, 1, 5), (4, 4, 5, 5)]),  # corners touch
        ("....#|#....", [(0, 1, 1, 2), (4, 0, 5, 1)]),  # the end of a row and the start of the next do not
        (".....|.....", []),
        ("##", [(0, 0, 2, 1)]),
    ],
)
def test_cells_that_touch_make_one_box(picture, boxes):
    mask = np.array([[cell == "#" for cell in row] for row in picture.split("|")])
    raster = Raster(mask.astype(float), mask, np.zeros((*mask.shape, 4)))
    assert sorted(raster.boxes(mask, gap=0, max_boxes=9, dilate=0)) == boxes


def test_scores_of_one_layout_share_nothing_but_their_places():
    layout = VisionLayout.grid(6, 8)
    first, second = (Raster.of(layout, bump(layout, box)) for box in ((1, 1, 3, 3), (5, 2, 7, 5)))
    assert first.values[1:3, 1:3].all() and first.values.sum() == 4
    assert second.values[2:5, 5:7].all() and second.values.sum() == 6


def test_boxes_in_one_line_are_joined_over_a_gap_but_lines_are_not():
    layout = VisionLayout.grid(16, 16)
    line = bump(layout, (1, 4, 4, 5), (7, 4, 10, 5))  # three tokens apart
    assert_boxes(find_region(layout, line), (1 / 16, 4 / 16, 10 / 16, 5 / 16))
    assert len(find_region(layout, line, gap=2).boxes) == 2
    assert len(find_region(layout, bump(layout, (4, 1, 5, 4), (4, 5, 5, 8))).boxes) == 2


def test_a_token_below_half_the_average_joins_no_box_however_bright_its_neighbours():
    layout = VisionLayout.grid(16, 16)
    score = bump(layout, (4, 4, 7, 7))
    assert_boxes(find_region(layout, score, threshold=1e-6), (4 / 16, 4 / 16, 7 / 16, 7 / 16))


@pytest.mark.parametrize("score", [
    torch.ones(144), torch.zeros(144), torch.full((144,), torch.nan), torch.rand(144, generator=torch.Generator().manual_seed(0)),
])  # fmt: skip
def test_a_score_without_a_peak_means_the_whole_image(score):
    region = find_region(VisionLayout.grid(12, 12), score)
    assert region.is_whole and region.confidence < 0.7


# ------------------------------------------------------------------------- from attention to scores
def attention_of(layout, *heads, prior=None):
    question = torch.stack([head / head.sum() for head in heads])
    prior = torch.full_like(question, 1 / len(layout)) if prior is None else prior
    return Attention(layout, question, prior)


def test_a_lone_sink_neither_hides_the_region_nor_becomes_one():
    layout = VisionLayout.grid(16, 16)
    score = bump(layout, (10, 10, 13, 13), floor=0.01)
    score[0] = 1000.0
    region = find_region(layout, score_tokens(attention_of(layout, score)), max_boxes=1)
    assert_boxes(region, (10 / 16, 10 / 16, 13 / 16, 13 / 16))


def test_what_every_row_looks_at_counts_less():
    layout = VisionLayout.grid(16, 16)
    habit = bump(layout, (0, 13, 16, 16))
    score = bump(layout, (3, 3, 6, 6), (0, 13, 16, 16), floor=0.01)
    prior = (habit / habit.sum())[None]
    found = score_tokens(attention_of(layout, score, prior=prior))
    inside = layout.inside(Region.box(3 / 16, 3 / 16, 6 / 16, 6 / 16))
    ratio = float(found[inside].mean() / found[habit.bool()].mean())
    assert ratio == pytest.approx(1 + (1 / 48) / (4 / 256))  # equal without the prior
    assert float(found.sum()) == pytest.approx(1.0)


def test_a_head_that_looks_everywhere_is_outvoted():
    layout = VisionLayout.grid(16, 16)
    sharp, blunt = bump(layout, (3, 3, 6, 6)), torch.ones(256)
    region = find_region(layout, score_tokens(attention_of(layout, blunt, sharp, blunt, blunt)))
    assert_boxes(region, (3 / 16, 3 / 16, 6 / 16, 6 / 16))


def test_attention_without_numbers_means_the_whole_image():
    layout = VisionLayout.grid(16, 16)
    found = score_tokens(Attention(layout, torch.full((2, 256), torch.nan), torch.zeros(2, 256)))
    assert not found.any() and find_region(layout, found).is_whole


def test_padding_takes_no_part():
    layout = VisionLayout.grid(8, 8, box=(0.0, -0.5, 1.0, 1.5))  # two rows above and below are padding
    score = torch.where(layout.kind == 0, bump(layout, (2, 3, 4, 5)), 5.0)
    assert_boxes(find_region(layout, score), (0.25, 0.25, 0.5, 0.75))
    inside = score_tokens(attention_of(layout, score))
    assert not inside[layout.kind != 0].any()


def test_noise_on_a_large_grid_is_boxed_in_few_steps():
    layout = VisionLayout.grid(64, 64)
    score = torch.rand(4096, generator=torch.Generator().manual_seed(0)) ** 20
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(1) if event == "call" else None)
    try:
        assert find_region(layout, score).is_whole
    finally:
        sys.setprofile(None)
    assert len(calls) < 10 * 4096  # comparing all pairs of places would take millions


def test_several_views_are_one_picture_at_the_finest_pitch():
    """A base view of 4 x 4 and a detailed one of 8 x 8 over the same image: the region follows both."""
    base, fine = VisionLayout.grid(4, 4), VisionLayout.grid(8, 8, start=16)
    names = ("position", "center", "row", "col", "view", "kind")
    joined = [torch.cat([getattr(base, name), getattr(fine, name) + (name == "view")]) for name in names]
    layout = VisionLayout(*(array.to(getattr(base, name).dtype) for array, name in zip(joined, names, strict=True)), 80)
    score = torch.zeros(80)
    score[16 + 8 * 2 + 2] = 1.0  # one fine token, row 2, column 2
    assert_boxes(find_region(layout, score, dilate=0), (2 / 8, 2 / 8, 3 / 8, 3 / 8))
    score[4 * 1 + 1] = 1.0  # the base token it lies in: rows and columns 2 and 3 of the fine grid
    assert_boxes(find_region(layout, score, dilate=0), (2 / 8, 2 / 8, 4 / 8, 4 / 8))


# ------------------------------------------------------------------------------------- the attention
@families
@attentions
@pytest.mark.parametrize("layer", [0, 3, NUM_LAYERS - 1])
def test_attention_equals_the_models_own(family, attention, layer, get_model):
    found = localizer(get_model(family, attention), family, layer=layer, skip_mlp=False).attend(PICTURE, "?")
    inputs = Processor(family).batch.inputs
    weights = get_model(family, "eager")(**inputs, output_attentions=True).attentions[layer][0]
    vision = torch.nonzero(inputs["input_ids"][0] == IMAGE).flatten()
    assert torch.equal(found.layout.position, vision)
    rows = weights[:, int(vision[-1]) + 1 :][..., vision]
    torch.testing.assert_close(found.prior, rows[:, 0], atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(found.question, rows[:, -2:].mean(1), atol=2e-6, rtol=1e-4)
    every = localizer(get_model(family, attention), family, layer=layer, skip_mlp=False, rows=99)
    every = every.attend(PICTURE, "?").question
    torch.testing.assert_close(every, rows[:, 1:].mean(1), atol=2e-6, rtol=1e-4)


@families
def test_skipping_the_mlp_of_vision_tokens_is_zeroing_its_output(family, get_model):
    model = get_model(family, "sdpa")
    found = localizer(model, family, layer=2).attend(PICTURE, "?")
    vision = torch.nonzero(Processor(family).batch.inputs["input_ids"][0] == IMAGE).flatten()
    rows = []

    def zero(module, args, output):
        rows.append(args[0].shape[1])
        output = output.clone()
        output[:, vision] = 0
        return output

    handles = [layer.mlp.register_forward_hook(zero) for layer in model.model.language_model.layers[:2]]
    try:
        zeroed = localizer(model, family, layer=2, skip_mlp=False).attend(PICTURE, "?")
    finally:
        for handle in handles:
            handle.remove()
    assert len(rows) == 2
    torch.testing.assert_close(found.question, zeroed.question, atol=2e-6, rtol=1e-4)
    plain = localizer(model, family, layer=2, skip_mlp=False).attend(PICTURE, "?")
    assert not torch.allclose(found.question, plain.question, atol=1e-4)


@families
def test_stride_attends_to_means_of_blocks(family, get_model):
    """On an image whose blocks are of equal tokens nothing but the number of keys changes, and blocks share their mass."""
    model = get_model(family, "sdpa")
    ask = localizer(model, family, layer=0, stride=2)
    found = ask.attend(PICTURE, "?")
    block = found.layout.block(2)
    for number in block.unique():
        inside = found.question[:, block == number]
        assert torch.equal(inside, inside[:, :1].expand_as(inside))
    plain = localizer(model, family, layer=0).attend(PICTURE, "?")
    assert found.layout == plain.layout and 0 < found.question.sum() < len(found.question)
    assert not torch.allclose(found.question, plain.question, atol=1e-4)


def test_rope_can_be_left_out_of_the_scores(get_model):
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


@families
def test_later_layers_and_the_head_never_run(family, get_model):
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


@families
@attentions
def test_the_model_is_left_as_it_was(family, attention, get_model):
    model = get_model(family, attention)
    inputs = Processor(family).batch.inputs
    logits = model(**inputs).logits
    before, registered = state(model), names()
    localizer(model, family)(PICTURE, "?")
    assert state(model) == before and names() == registered
    assert torch.equal(model(**inputs).logits, logits)


@families
def test_an_exception_leaves_the_model_as_it_was(family, get_model, monkeypatch):
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


def test_tap_reads_without_changing_and_nests(get_model):
    model = get_model("llava", "sdpa")
    inputs = Processor("llava").batch.inputs
    logits, seen = model(**inputs).logits, []
    attention = model.model.language_model.layers[2].self_attn
    config, registered = attention.config, names()
    wanted = [True]
    with tap(attention, lambda *_: seen.append("outer")):
        with tap(attention, lambda q, k, s: seen.append(tuple(q.shape)), when=lambda: wanted[0]):
            assert torch.equal(model(**inputs).logits, logits)
            assert attention.config is config
            wanted[0] = False
            model(**inputs)
    with tap(attention, lambda *_: None):  # a call that fails before it attends
        broken = attention.q_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        broken.remove()
        assert attention.config is config
    heads, length = 4, inputs["input_ids"].shape[1]
    assert seen == [(1, heads, length, 8), "outer", "outer"]
    assert attention.config is config and names() == registered


@families
def test_localizer_and_answer_share_one_vision_pass(family, get_model):
    model, processor, ran = get_model(family, "sdpa"), Processor(family), []
    base = model.model
    embed = base.visual.patch_embed if family == "qwen2_5_vl" else base.vision_tower.embeddings
    generate = dict(processor.batch.inputs, max_new_tokens=4, do_sample=False)
    plain = model.generate(**generate)
    hook = embed.register_forward_hook(lambda *_: ran.append(1))
    try:
        with cache_vision(model), torch.no_grad():
            AttentionLocalizer(model, processor, prompt=str)(PICTURE, "?")
            assert torch.equal(model.generate(**generate), plain)
        assert len(ran) == 1
    finally:
        hook.remove()


@families
def test_low_confidence_means_the_whole_image(family, get_model):
    narrow = {"threshold": 0.9}
    sure = localizer(get_model(family, "sdpa"), family, min_confidence=1e-6, **narrow)(PICTURE, "?")
    assert not sure.is_whole and 0 < sure.confidence < 0.999
    unsure = localizer(get_model(family, "sdpa"), family, min_confidence=sure.confidence + 1e-3, **narrow)
    region = unsure(PICTURE, "?")
    assert region.is_whole and region.confidence == sure.confidence


@pytest.mark.parametrize("after", [0, 1])
def test_a_prompt_without_a_question_is_refused(after, get_model):
    ask = AttentionLocalizer(get_model("llava", "sdpa"), Processor("llava", after), prompt=str)
    with pytest.raises(ValueError, match=f"text after the image, got {after} tokens"):
        ask(PICTURE, "")


def test_localizing_a_patched_model_is_refused(get_model):
    model = get_model("llava", "sdpa")
    with patch(model, None), pytest.raises(RuntimeError, match="patched already"):
        localizer(model, "llava")(PICTURE, "?")


def test_prompt_or_chat_template_is_needed(get_model):
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
def test_bad_arguments(change, message, get_model):
    with pytest.raises(ValueError, match=message):
        localizer(get_model("llava", "sdpa"), "llava", **change)


# ---------------------------------------------------------------------------------------- the others
def test_given_and_whole():
    region = Region.box(0.1, 0.2, 0.3, 0.4, confidence=0.7)
    assert BoxLocalizer(region)(PICTURE, "?") is region
    assert WholeLocalizer()(PICTURE, "?").is_whole


def test_get_localizer(get_model):
    region = Region.box(0, 0, 0.5, 0.5)
    assert get_localizer("box", region=region)(PICTURE, "?") == region
    assert isinstance(get_localizer("whole"), WholeLocalizer)
    attention = get_localizer("attention", model=get_model("llava", "sdpa"), processor=Processor("llava"))
    assert isinstance(attention, AttentionLocalizer)
    with pytest.raises(ValueError, match=r"one of attention, .*, got 'oracle'"):
        get_localizer("oracle")
    with pytest.raises(ValueError, match="region must be given for 'box'"):
        get_localizer("box")
    with pytest.raises(ValueError, match="path must be given for 'vlm'"):
        get_localizer("vlm")
    with pytest.raises(ValueError, match="min_confidence must not be given for 'whole'"):
        get_localizer("whole", min_confidence=0.5)
    with pytest.raises(ValueError, match="processor must be given for 'attention'"):
        get_localizer("attention", model=get_model("llava", "sdpa"))


# ------------------------------------------------------------------------------------------------- the carried model
def test_attention_of_the_carried_model_is_sure_of_parts_alone():
    """The default confidence belongs to the weights: with others, it must be chosen anew."""
    asker = load(EMBEDDED, "cpu", "auto")
    find, found = asker.localizer("attention"), {True: [], False: []}
    for seed in range(10_600_500, 10_600_512):
        scene = scenes.scene(seed)
        for question in scene.questions:
            found[question.region.is_whole].append(find(scene.image, question.text).is_whole)
    assert len(found[True]) > 15 and sum(found[True]) > 0.7 * len(found[True])  # the whole picture: measured 87 %
    assert len(found[False]) > 50 and sum(found[False]) < 0.1 * len(found[False])  # a part of it: measured 1 %


# ------------------------------------------------------------------------------------------------ a user's own
def test_the_readmes_localizer_is_known_by_name(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    text = (Path(crop.__file__).parent / "localizers" / "README.md").read_text(encoding="utf-8")
    block = text.split("## Write and register one")[1].split("```python\n")[1].split("```")[0]
    exec(block, {})
    assert get_localizer("center")(PICTURE, "?").boxes == ((0.25, 0.25, 0.75, 0.75),)
    assert localizer_names()[-1] == "center" and all(f"| `{name}` |" in text for name in localizer_names()[:-1])


def test_a_plugin_is_imported_before_names_are_checked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "_registered", {})
    text = (Path(crop.__file__).parent / "localizers" / "README.md").read_text(encoding="utf-8")
    file = tmp_path / "center.py"
    file.write_text(text.split("## Write and register one")[1].split("```python\n")[1].split("```")[0])
    PICTURE.save(tmp_path / "picture.png")
    words = ["ask", str(tmp_path / "picture.png"), "what", "--localizer", "center", "--json", "--max-new-tokens", "1"]
    with pytest.raises(SystemExit):
        main(words)
    assert "--localizer must be one of attention" in capsys.readouterr().err
    assert main([*words, "--plugin", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["localizer"] == "center" and found["region"]["boxes"] == [[0.25, 0.25, 0.75, 0.75]]


def test_a_builder_gets_what_was_given(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    given = []
    crop.register_localizer("mine", lambda arguments: given.append(arguments) or WholeLocalizer())
    get_localizer("mine", path="somewhere", layer=3)
    assert (given[0].name, given[0].path, given[0].layer, given[0].device) == ("mine", "somewhere", 3, "cpu")
    with pytest.raises(ValueError, match="model must be given for 'mine', got None"):
        given[0].need("model")
    with pytest.raises(ValueError, match="register_localizer: name must be none of attention, .*got 'head'"):
        crop.register_localizer("head", lambda arguments: WholeLocalizer())
    with pytest.raises(TypeError, match="build must be a function of LocalizerArguments, got str"):
        crop.register_localizer("mine", "mine")
