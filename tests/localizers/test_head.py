"""The trained head: its parts, what becomes of its answers, the head that comes with the embedded model, its training."""

from __future__ import annotations

import json
import random
from statistics import mean

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from bench import pictures
from bench.training import head as train_head
from crop import embedded
from crop.cli.ask import EMBEDDED, Asker, load
from crop.embedded import scenes
from crop.geometry.layout import NEWLINE, PATCH, VisionLayout
from crop.geometry.region import Region
from crop.localizers import Head, HeadLocalizer, get_localizer
from crop.localizers.head import NEVER, Grid, head_region, judge
from crop.localizers.reading import embeddings
from crop.localizers.vision_cache import cache_vision
from crop.patching.patch import patch
from tests.support.cases import count_vision_calls, families, get_model
from tests.support.localizing import PICTURE, Processor, state
from tests.support.tiny_families import THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread")
BOXES = {"threshold": 0.3, "gap": 0, "max_boxes": 4, "dilate": 0}


def head_for(model) -> Head:
    torch.manual_seed(0)
    return Head(model.config.get_text_config().hidden_size, width=16).eval()


# ------------------------------------------------------------------------------------------------------------- the head
def test_questions_do_not_depend_on_their_padding():
    torch.manual_seed(0)
    head, text = Head(24, 16), torch.randn(2, 5, 24)
    padded = torch.cat([text, torch.full((2, 3, 24), 7.0)], 1)
    vision, grid = torch.randn(1, 12, 24), Grid.of([VisionLayout.grid(3, 4)])
    seen = head.see(vision, grid).repeat_interleave(2, 0)

    def judged(asked):
        return head.match(seen, grid.repeat(2), asked), asked.film, asked.local

    for got, want in zip(judged(head.read(padded, torch.tensor([5, 5]))), judged(head.read(text)), strict=True):
        torch.testing.assert_close(got, want)
    shorter = judged(head.read(padded, torch.tensor([5, 3])))
    for got, want in zip(shorter, judged(head.read(text[:, :3])), strict=True):
        torch.testing.assert_close(got[1:], want[1:])
    for turned, straight in zip(judged(head.read(text.flip(1))), judged(head.read(text)), strict=True):
        assert not torch.allclose(turned, straight, atol=1e-3)  # the order of words counts


def test_images_do_not_depend_on_their_padding():
    """Beside a larger one in a batch, with views that are not full and tokens that show nothing, each is as it is alone."""
    torch.manual_seed(0)
    head = Head(24, 16)
    row, col = ([0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1])
    row, col, view = (torch.tensor(axis, dtype=torch.int32) for axis in (row, col, [0] * 4 + [1] * 8))
    kinds = torch.tensor([PATCH] * 11 + [NEWLINE], dtype=torch.uint8)
    views = VisionLayout(torch.arange(12), torch.rand(12, 2), row, col, view, kinds, 12)
    layouts = [VisionLayout.grid(5, 4), views, VisionLayout.grid(2, 6)]
    vision, text = [torch.randn(len(layout), 24) for layout in layouts], torch.randn(3, 5, 24)
    grid = Grid.of(layouts)
    padded = torch.nn.utils.rnn.pad_sequence(vision, batch_first=True)
    together = head.match(head.see(padded, grid), grid, head.read(text))
    for row, layout in enumerate(layouts):
        alone, local = judge(head, layout, vision[row], text[row])
        torch.testing.assert_close(together[row, : len(layout)], alone, rtol=1e-4, atol=1e-5)
        assert local == pytest.approx(float(head.read(text[row : row + 1]).local), abs=1e-5)
    assert (together[1, : len(views)] == NEVER).tolist() == (kinds != PATCH).tolist()
    assert (together[1, len(views) :] == NEVER).all()


def test_a_token_knows_its_neighbours_its_row_and_its_column():
    """What stands at one place reaches these and no others in a first look along the lines."""
    torch.manual_seed(0)
    head, layout = Head(24, 16), VisionLayout.grid(9, 30)
    grid, vision, asked = Grid.of([layout]), torch.randn(1, 270, 24), head.read(torch.randn(1, 4, 24))
    other = vision.clone()
    other[0, 4 * 30 + 15] = torch.randn(24)
    seen, changed = (head.blocks[0](head.see(image, grid), None, asked)[0, 0] for image in (vision, other))
    rows, columns = (seen - changed).abs().amax(2).gt(1e-6).nonzero().unbind(1)
    near_row, near_column = (rows - 4).abs() <= 2, (columns - 15).abs() <= 6  # two convolutions reach 2 and 6
    assert (near_row | near_column).all()
    assert len(set(rows[near_column].tolist())) == 9 and len(set(columns[near_row].tolist())) == 30


def test_multiply_adds_are_counted():
    head, layout, words = Head(24, 16), VisionLayout.grid(5, 6), 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        judge(head, layout, torch.randn(30, 24), torch.randn(words, 24))
    attention = 2 * 30 * 16 * (2 * (words + 1) + 5 + 6)  # two blocks; the counter knows none on CPU
    assert counter.get_total_flops() / 2 == train_head.multiply_adds(head, 1, 5, 6, words) - attention


def test_file_round_trip(tmp_path):
    torch.manual_seed(0)
    head = Head(24, 16, probes=2)
    head.calibration.copy_(torch.tensor([0.1234567, -1.0, 2.0, 3.0]))
    head.save(tmp_path / "head.safetensors")
    again = Head.load(tmp_path / "head.safetensors")
    assert (again.dim, again.width, again.probes) == (24, 16, 2) and not again.training
    assert torch.equal(again.calibration, head.calibration)
    for name, value in head.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-2, atol=1e-2)
    with pytest.raises(FileNotFoundError, match="must be an existing file"):
        Head.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        Head.load(tmp_path / "text")
    with pytest.raises(ValueError, match=r"that Head.save wrote"):
        Head.load(embedded.WEIGHTS / "model.safetensors")
    for sizes in ("24", '{"dim": 24, "layers": 3}', '{"dim": 24, "width": 18}', '{"dim": 24, "width": 32}'):
        save_file(head.state_dict(), tmp_path / "other.safetensors", {"crop_head": sizes})
        with pytest.raises(
            ValueError, match=r"must hold a head of this version, got other sizes or weights; train it anew"
        ):
            Head.load(tmp_path / "other.safetensors")


# ------------------------------------------------------------------------------------------------ from logits to regions
def test_region_follows_the_probable_tokens_and_the_calibration():
    layout, logits = VisionLayout.grid(6, 8), torch.full((48,), -6.0)
    logits[[8 * 2 + 3, 8 * 2 + 4, 8 * 5 + 0]] = 6.0
    trusting = torch.tensor([4.0, 1.0, 0.0, 0.0])
    region = head_region(layout, logits, 0.0, trusting, **BOXES, min_confidence=0.5)
    assert set(region.boxes) == {(3 / 8, 2 / 6, 5 / 8, 3 / 6), (0.0, 5 / 6, 1 / 8, 1.0)} or region.boxes == (
        pytest.approx((3 / 8, 2 / 6, 5 / 8, 3 / 6), abs=1e-5), pytest.approx((0, 5 / 6, 1 / 8, 1), abs=1e-5))  # fmt: skip
    assert region.confidence == pytest.approx(torch.tensor(4.0).sigmoid().item())
    whole = head_region(layout, logits, -8.0, trusting, **BOXES, min_confidence=0.5)  # "needs the whole picture"
    assert whole.is_whole and whole.confidence == pytest.approx(torch.tensor(-4.0).sigmoid().item()) and whole.reason


@pytest.mark.parametrize("value", [-9.0, float("nan")])
def test_nothing_probable_is_the_whole_image(value):
    layout = VisionLayout.grid(4, 4)
    region = head_region(layout, torch.full((16,), value), 5.0, torch.ones(4), **BOXES, min_confidence=0.5)
    assert region.is_whole and region.confidence == 0 and region.reason


# --------------------------------------------------------------------------------------------------------- in the model
@families(THOROUGH)
def test_reads_what_enters_the_decoder_and_nothing_after(family):
    model, processor = get_model(family, "sdpa"), Processor(family)
    inputs, seen = processor.batch.inputs, []
    entrance = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0].detach()), with_kwargs=True
    )
    layer = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: seen.append("layer"))
    before = state(model)
    try:
        with torch.no_grad():
            read = embeddings(model, processor, PICTURE, "?", str)
            assert [isinstance(entry, torch.Tensor) for entry in seen] == [True]
            left = state(model)
            model(**inputs)
    finally:
        entrance.remove()
        layer.remove()
    position = read.layout.position
    assert torch.equal(read.vision, seen[1][position]) and torch.equal(read.text, seen[1][int(position[-1]) + 1 :])
    assert left == before


@families(THOROUGH)
def test_localizer_and_answer_share_one_vision_pass(family):
    model, processor = get_model(family), Processor(family)
    find = HeadLocalizer(model, processor, head_for(model), str, min_confidence=0.01, threshold=0.01)
    with count_vision_calls(family, model) as ran, cache_vision(model), torch.no_grad():
        assert isinstance(find(PICTURE, "?"), Region)
        model.generate(**processor.batch.inputs, max_new_tokens=2, do_sample=False)
    assert len(ran) == 1


def test_localizing_a_patched_model_is_refused():
    model = get_model("llava", "sdpa")
    with patch(model, None), pytest.raises(RuntimeError, match="patched already"):
        HeadLocalizer(model, Processor("llava"), head_for(model), str)(PICTURE, "?")


def test_what_does_not_fit_is_refused():
    model = get_model("llava", "sdpa")
    with pytest.raises(ValueError, match="head must be made for embeddings of width"):
        HeadLocalizer(model, Processor("llava"), Head(7))
    with pytest.raises(ValueError, match="threshold must be in"):
        HeadLocalizer(model, Processor("llava"), head_for(model), threshold=1.0)
    with pytest.raises(ValueError, match="path must be given for 'head'"):
        get_localizer("head", model=model, processor=Processor("llava"))


# ------------------------------------------------------------------------------------------------- the one that we carry
@pytest.fixture(scope="module")
def carried() -> Asker:
    return load(EMBEDDED, "cpu", "auto")


def test_the_carried_head_holds_its_promises_on_unseen_pictures(carried):
    """Measured by `python -m bench.localizers` on more pictures; here with some slack for few."""
    find, grid = carried.localizer("head"), VisionLayout.grid(scenes.GRID, scenes.GRID)
    held, area, true, whole, trust = [], [], [], [], []
    for seed in range(scenes.UNSEEN, scenes.UNSEEN + 20):
        scene, rng = scenes.scene(seed), random.Random(seed)
        asked = [question for question in scene.questions if question.local]
        with cache_vision(carried.model):
            for question in rng.sample(asked, min(4, len(asked))):
                region, wanted = find(scene.image, question.text), grid.inside(question.region)
                held.append(bool((grid.inside(region) | ~wanted).all()))
                area.append(region.area)
                true.append(wanted.float().mean().item())
                trust.append(region.confidence)
            question = next(question for question in scene.questions if not question.local)
            region = find(scene.image, question.text)
            whole.append(region.is_whole)
    assert mean(held) >= 0.9 and mean(area) <= 2 * mean(true) and mean(whole) >= 0.95 and mean(trust) > 0.85


def test_the_carried_head_costs_next_to_nothing(carried):
    """Multiply-adds against those of the prefill: matrices of every decoder layer and of the tower, attention left out."""
    config, words = carried.model.config, 12
    text, vision = config.text_config, config.vision_config
    tokens = scenes.GRID**2
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    tower = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    prefill = (tokens + words) * layer * text.num_hidden_layers + tokens * tower * vision.num_hidden_layers
    head = Head.load(embedded.HEAD)
    assert train_head.multiply_adds(head, 1, scenes.GRID, scenes.GRID, words) < 0.012 * prefill


# ------------------------------------------------------------------------------------------------------------- training
@families(THOROUGH)
def test_training_learns_a_record_by_heart_in_any_family(family, tmp_path):
    PICTURE.save(tmp_path / "one.png")
    lines = [{"image": "one.png", "question": "?", "boxes": [[0, 0, 0.5, 0.5]]}]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = get_model(family, "sdpa")
    asker = Asker(model, Processor(family), str)
    examples, texts = train_head.features(asker, train_head.read_jsonl(tmp_path / "records.jsonl"), None)
    head = head_for(model)
    train_head.train(head, examples, texts, minutes=1.0, steps=150)
    train_head.calibrate(head, list(train_head.judged(head, examples, texts)))
    region = HeadLocalizer(model, Processor(family), head, str)(PICTURE, "?")
    layout = examples[0].layout
    assert torch.equal(layout.inside(region), layout.inside(Region.box(0, 0, 0.5, 0.5)))
    assert region.confidence > 0.5


def test_a_batch_of_absent_things_alone_has_a_loss():
    layout, texts = VisionLayout.grid(4, 4), {"what color is the red circle": torch.randn(6, 24).half()}
    example = train_head.Example(layout, torch.randn(16, 24).half(), [(text, None) for text in texts])
    known = [(example, train_head.targets(example))]
    data = train_head.batch(known, texts, 6, random.Random(0))
    assert (data["local"] < 0).all() and train_head.loss(Head(24, 16), data).isfinite()


def test_questions_about_absent_things_name_something_that_is_not_there():
    first = pictures.SEEDS["train"]
    records = list(train_head.rendered(first, 12, 3))
    absent = [(image, text) for image, text, boxes in records if boxes is None]
    assert absent and len(records) > 2 * len(absent)
    drawn = {picture.image.tobytes(): picture for picture in map(pictures.draw, range(first, first + 12))}
    for image, text in absent:
        picture = drawn[image.tobytes()]
        assert text not in {question.text for question in picture.questions}
        assert pictures.named(text) - pictures.shown(picture)
