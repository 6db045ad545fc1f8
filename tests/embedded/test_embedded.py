"""The carried model: its files, its pictures, and that its answers live in the regions the pictures name."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest
import torch

from bench.training import embedded_data, embedded_model, grounding
from crop import embedded
from crop.embedded import drawing, scenes, things

HELD_OUT = 10_000_000  # bench.training.embedded trains on smaller seeds
FLOOR = 0.95  # exact answers over all local kinds, held out (measured: 0.986)
KIND_FLOOR = 0.85  # of any local kind, on the small sample used here


@pytest.fixture(scope="module")
def carried():
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield embedded.load()
    torch.set_num_threads(threads)


def words(text: str) -> list[str]:
    return re.findall(r"\d|[a-z]+", text)


# ------------------------------------------------------------------------------------------------------------ pictures
@pytest.mark.fast
@pytest.mark.parametrize("picture", things.PICTURES)
def test_scene_is_a_function_of_its_seed(picture):
    one, two, other = (
        scenes.scene(7, picture=picture),
        scenes.scene(7, picture=picture),
        scenes.scene(8, picture=picture),
    )
    assert one.image.tobytes() == two.image.tobytes() and one.questions == two.questions and one.picture == picture
    assert one.image.tobytes() != other.image.tobytes() and one.image.size == (
        things.SIZE,
        things.SIZE,
    )


def test_unknown_picture_raises():
    with pytest.raises(ValueError, match="picture must be one of"):
        scenes.scene(1, picture="map")


@pytest.mark.fast
def test_questions_are_well_formed_and_every_kind_occurs():
    kinds, vocabulary = set(), set(embedded_model.spoken_words())
    for seed in range(60):
        for question in scenes.scene(seed).questions:
            kinds.add(question.kind)
            assert set(words(f"{question.text} {question.answer}")) <= vocabulary
            assert question.local == (question.kind in scenes.LOCAL_KINDS)
            assert question.local or question.boxes == ((0.0, 0.0, 1.0, 1.0),)
            assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in question.boxes)
    assert kinds == {*scenes.LOCAL_KINDS, *scenes.GLOBAL_KINDS}


def test_one_question_has_one_answer():
    for seed in range(60):
        answers = collections.defaultdict(set)
        for question in scenes.scene(seed).questions:
            answers[question.text].add(question.answer)
        assert all(len(a) == 1 for a in answers.values())


def test_things_are_drawn_where_their_boxes_say():
    """Drawing a scene without one thing changes pixels inside its box alone (noise and clutter come from the seed)."""
    import random

    for seed in range(12):
        drawn = scenes.scene(seed, picture="shapes")
        full, less = (
            drawing.draw(things, "shapes", random.Random(3), 0.0) for things in (drawn.things, drawn.things[1:])
        )
        change = (np.asarray(full, int) != np.asarray(less, int)).any(2)
        x0, y0, x1, y1 = (round(things.SIZE * c) for c in drawn.things[0].box)
        inside = change[y0:y1, x0:x1]
        # The outermost letter of a word may put its dark rim a few pixels beyond the box.
        assert inside.mean() > 0.3 and change.sum() - inside.sum() < 0.1 * inside.sum()


def test_grounding_questions_name_the_blocks_of_their_things():
    vocabulary, texts = set(embedded_model.spoken_words()), collections.defaultdict(set)
    for seed in range(30):
        scene = scenes.scene(seed)
        assert len(grounding.box_questions(scene)) == len(scene.things)
        for question, thing in zip(grounding.box_questions(scene), scene.things, strict=True):
            region = grounding.box_region(question.answer)
            (x0, y0, x1, y1), (a, b, c, d) = region.boxes[0], thing.cells
            side = things.GRID
            # Outward to whole blocks of two patches, and no farther.
            assert x0 * side <= a < x0 * side + 2 and y0 * side <= b < y0 * side + 2
            assert x1 * side >= c > x1 * side - 2 and y1 * side >= d > y1 * side - 2
            assert set(words(question.text + " " + question.answer)) <= vocabulary
            texts[seed, question.text].add(question.answer)
    assert all(len(answers) == 1 for answers in texts.values())


@pytest.mark.parametrize("answer", ["", "123", "12345", "a123", "5123", "0804", "1589"])
def test_answers_without_a_box(answer):
    assert grounding.box_region(answer) is None


def test_a_question_gives_a_region():
    region = scenes.scene(3).questions[0].region
    assert 0 < region.area <= 1


# --------------------------------------------------------------------------------------------------------------- files
def test_files_are_small_and_the_model_is_the_stock_class(carried):
    from transformers import LlavaForConditionalGeneration

    model, processor = carried
    assert type(model) is LlavaForConditionalGeneration and not model.training
    assert sum(f.stat().st_size for f in embedded.WEIGHTS.iterdir()) <= 16e6
    assert model.config.text_config.num_hidden_layers >= 8
    ids = processor(images=scenes.scene(0).image, text=embedded.prompt("what is the total"), return_tensors="pt")[
        "input_ids"
    ]
    assert (ids == model.config.image_token_id).sum() >= 256


def test_load_without_weights_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold exported weights"):
        embedded.load(directory=tmp_path)


def test_tokenizer_knows_every_word(carried):
    tokenizer = carried[1].tokenizer
    assert tokenizer("12 May?")["input_ids"][1:] == tokenizer.convert_tokens_to_ids(["1", "2", "may", "?"])
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(list(embedded_model.spoken_words()))
    assert tokenizer("submarine")["input_ids"][-1] == tokenizer.unk_token_id


def test_training_reads_words_as_the_tokenizer_does(carried):
    encoder, tokenizer = embedded_data.Encoder(embedded_model.vocabulary()), carried[1].tokenizer
    for seed in range(20):
        for question in embedded_data.asked(scenes.scene(seed)):
            for text in (question.text + " ?", question.answer):
                assert encoder(text) == tokenizer(text)["input_ids"][1:], text


@pytest.mark.fast
def test_prompt_and_tidy():
    assert embedded.prompt("Where is the RED circle?") == "<image> where is the red circle ?"
    assert embedded.tidy("1 2 may") == "12 may" and embedded.tidy(" top  left ") == "top left"


def test_left_padding_does_not_change_the_answer(carried):
    model, processor = carried
    drawn = [scenes.scene(HELD_OUT + i) for i in range(4)]
    texts = [embedded.prompt(q.text) for s in drawn for q in s.questions[:1]]
    both = processor(images=[s.image for s in drawn], text=texts, padding=True, return_tensors="pt")
    assert len(set(both["attention_mask"].sum(1).tolist())) > 1
    with torch.no_grad():
        padded = model(**both).logits[:, -1]
        for row, scene, text in zip(padded, drawn, texts, strict=True):
            alone = model(**processor(images=scene.image, text=text, return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- answers
def exact(
    carried,
    scene: scenes.Scene,
    questions: list[scenes.Question],
    keep=lambda inside: inside | True,
) -> list[bool]:
    """Exact answers when each question sees the vision tokens keep(inside its region) alone; masking, plain calls."""
    model, processor = carried
    texts = [f"{embedded.prompt(q.text)} {q.answer}</s>" for q in questions]
    batch = processor(images=[scene.image] * len(texts), text=texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    centre = (torch.arange(things.GRID) + 0.5) / things.GRID
    for i, question in enumerate(questions):
        inside = torch.zeros(things.GRID, things.GRID, dtype=torch.bool)
        for x0, y0, x1, y1 in question.boxes:
            inside |= ((centre >= y0) & (centre < y1))[:, None] & ((centre >= x0) & (centre < x1))
        seen = keep(inside.flatten())
        assert seen.any()
        mask[i, ids[i] == model.config.image_token_id] = seen.to(mask.dtype)
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(2)
    right = []
    for row, wanted, question in zip(predicted, ids, questions, strict=True):
        length = len(words(question.answer)) + 1
        right.append(torch.equal(row[-length - 1 : -1], wanted[-length:]))
    return right


@pytest.fixture(scope="module")
def sample():
    """(scene, some local questions) of the held-out range, every kind of question about equally often."""
    seen, chosen = collections.Counter(), []
    for seed in range(HELD_OUT, HELD_OUT + 36):
        scene = scenes.scene(seed)
        local = [q for q in scene.questions if q.local]
        picked = sorted(local, key=lambda q: seen[q.kind])[:6]
        seen.update(q.kind for q in picked)
        chosen.append((scene, picked))
    return chosen


def test_held_out_answers_are_right(carried, sample):
    right = collections.defaultdict(list)
    for scene, questions in sample:
        for question, ok in zip(questions, exact(carried, scene, questions), strict=True):
            right[question.kind].append(ok)
    everything = [ok for kind in right.values() for ok in kind]
    assert set(right) == set(scenes.LOCAL_KINDS)
    assert np.mean(everything) >= FLOOR, {k: np.mean(v) for k, v in right.items()}
    assert min(np.mean(v) for v in right.values()) >= KIND_FLOOR, {k: np.mean(v) for k, v in right.items()}


def test_answers_live_in_their_regions(carried, sample):
    """Without the region the answer is gone; without an equal number of other tokens, or all others, it stays."""

    def without_as_many_others(inside: torch.Tensor) -> torch.Tensor:
        others = (~inside).nonzero().flatten()
        seen = torch.ones_like(inside)
        picked = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[: int(inside.sum())]
        seen[others[picked]] = False
        return seen

    rates = {}
    for name, keep in {
        "all": lambda inside: inside | True,
        "without region": lambda inside: ~inside,
        "without as many others": without_as_many_others,
        "region alone": lambda inside: inside,
    }.items():
        rates[name] = np.mean([ok for scene, questions in sample[:12] for ok in exact(carried, scene, questions, keep)])
    assert rates["without region"] < 0.25, rates
    assert rates["without as many others"] > rates["all"] - 0.05, rates
    assert rates["region alone"] > rates["all"] - 0.1, rates


@pytest.mark.fast
def test_generate_answers_through_the_public_path(carried):
    scene = scenes.scene(HELD_OUT, picture="receipt")
    questions = [q for q in scene.questions if q.local][:4]
    answers = embedded.answer(*carried, [scene.image] * 4, [q.text for q in questions])
    assert sum(a == q.answer for a, q in zip(answers, questions, strict=True)) >= 3
    with pytest.raises(ValueError, match="one per question"):
        embedded.answer(*carried, [scene.image], [])
