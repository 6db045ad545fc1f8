"""The freely placed pictures: what is asked is what is drawn, where the boxes say, and no patch knows what it does not show."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

from bench.training.embedded import labels
from crop.embedded import scenes
from crop.embedded.scenes import faces

CHARACTER = 3  # first column of the characters
COUNT = 60


@pytest.fixture(scope="module")
def drawn():
    return [scenes.scene(seed, picture=scenes.PICTURES[seed % len(scenes.PICTURES)]) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def patches(drawn):
    return [labels.patch_labels(scene) for scene in drawn]


def inside(spot, boxes) -> bool:
    x, y = (v / scenes.SIZE for v in spot)
    return any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes)


@pytest.mark.parametrize("picture", scenes.PICTURES)
def test_scene_is_a_function_of_its_seed(picture):
    one, two, other = (scenes.scene(seed, picture=picture) for seed in (7, 7, 8))
    assert one.image.tobytes() == two.image.tobytes() and one.questions == two.questions and one.picture == picture
    assert one.image.tobytes() != other.image.tobytes() and one.image.size == (scenes.SIZE, scenes.SIZE)


def test_unknown_picture_raises():
    with pytest.raises(ValueError, match="picture must be one of"):
        scenes.scene(1, picture="map")


def test_every_kind_of_picture_and_question_comes():
    drawn = [scenes.scene(seed, hardness=1) for seed in range(1000, 1040)]
    assert {s.picture for s in drawn} == set(scenes.PICTURES)
    kinds = {q.kind for s in drawn for q in s.questions}
    assert kinds == {*scenes.LOCAL_KINDS, *scenes.RELATION_KINDS, *scenes.GLOBAL_KINDS, scenes.BOX_KIND}


def test_words_are_known_and_a_question_has_one_answer(drawn):
    vocabulary = set(scenes.vocabulary())
    for scene in drawn:
        answers = collections.defaultdict(set)
        for question in scene.questions:
            answers[question.text].add(question.answer)
            assert set(re.findall(r"[A-Z0-9]|[^\w\s]|[a-z]+", f"{question.text} {question.answer}")) <= vocabulary
        assert all(len(found) == 1 for found in answers.values())


def test_boxes_and_text_lie_inside_the_picture(drawn):
    for scene in drawn:
        for question in scene.questions:
            assert question.boxes and all(0 <= a < c <= 1 and 0 <= b < d <= 1 for a, b, c, d in question.boxes)
            assert question.local or question.boxes == ((0.0, 0.0, 1.0, 1.0),)
        for run in scene.runs:
            assert 0 <= run.box[0] and 0 <= run.box[1] and run.box[2] <= scenes.SIZE and run.box[3] <= scenes.SIZE
            assert 1 <= len(run.text) <= 12


def test_what_is_read_off_stands_in_the_regions(drawn):
    """Every character of an answer and every one quoted in a question is drawn in a box of the question."""
    for scene in drawn:
        at = {spot: c for run in scene.runs for c, spot in zip(run.text, run.spots, strict=True)}
        for question in scene.questions:
            quoted = [c for c in question.text if c in scenes.CHARACTERS]
            assert [at[s] for s in question.clues] == quoted
            if question.spots:
                assert [at[s] for s in question.spots] == list(question.answer)
                assert all(inside(s, question.boxes) for s in question.spots)
            assert all(inside(s, question.boxes) for s in question.clues)
            assert question.spots or not question.answer.isupper()


def test_letters_differ_from_their_ground(drawn):
    for scene in drawn:
        pixels = np.asarray(scene.image, np.float32).mean(2)
        for run in scene.runs:
            x0, y0, x1, y1 = (round(v) for v in run.box)
            assert np.ptp(pixels[max(y0, 0) : y1, max(x0, 0) : x1]) > 60, run


def test_answers_follow_from_what_is_drawn(drawn):
    for scene in drawn:
        text = {run.text for run in scene.runs}
        for question in scene.questions:
            if question.kind == "count":
                assert question.answer == str(len(question.boxes))
            elif question.kind == "color":
                near = [t for t in scene.things if t.color == question.answer]
                assert any(inside(t.center, question.boxes) for t in near)
            elif question.kind == "shape":
                assert any(inside(t.center, question.boxes) for t in scene.things if t.shape == question.answer)
            elif question.kind == scenes.BOX_KIND:
                (x0, y0, x1, y1), low = question.boxes[0], [int(v) / scenes.BLOCKS for v in question.answer]
                side = 1 / scenes.BLOCKS
                assert low[0] <= x0 < low[0] + side and low[1] <= y0 < low[1] + side
                assert low[2] < x1 <= low[2] + side + 1e-6 and low[3] < y1 <= low[3] + side + 1e-6
            elif question.spots:
                assert question.answer in text
        if scene.picture == "receipt":
            prices = [float(q.answer) for q in scene.questions if q.kind == "price"]
            (total,) = (float(q.answer) for q in scene.questions if q.kind == "total")
            assert sum(prices) == pytest.approx(total, abs=0.001)


def test_placement_is_free(drawn):
    """Things and lines of text begin at every offset to the patch grid, in a wide range of sizes."""
    places = [round(v) % scenes.PATCH for s in drawn for t in s.things if t.kind != "bar" for v in t.box[:2]]
    places += [round(v) % scenes.PATCH for s in drawn for run in s.runs for v in run.spots[0]]
    share = np.bincount(places, minlength=scenes.PATCH) / len(places)
    assert share.min() > 0.03 and share.max() < 0.12
    heights = [run.box[3] - run.box[1] for s in drawn for run in s.runs]
    assert min(heights) <= 20 and max(heights) > 24


def test_words_run_over_several_patches(drawn):
    spread = [len({labels.patch_of(s) for s in run.spots}) for s in drawn for run in s.runs if len(run.text) > 6]
    assert min(spread) >= 3


def test_a_patch_names_the_one_character_centred_in_it(drawn, patches):
    for scene, label in zip(drawn, patches, strict=True):
        wanted = collections.defaultdict(list)
        for run in scene.runs:
            for character, spot in zip(run.text, run.spots, strict=True):
                wanted[labels.patch_of(spot)].append(character)
        for patch, character in enumerate(label[:, CHARACTER]):
            assert wanted[patch] == ([scenes.CHARACTERS[character - 1]] if character else [])


def test_a_patch_names_the_thing_that_covers_it(drawn, patches):
    for scene, label in zip(drawn, patches, strict=True):
        grid, patch = scenes.GRID, scenes.PATCH
        ids = np.asarray(scene.ids).reshape(grid, patch, grid, patch).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
        for index in label[:, 1].nonzero()[0]:
            color = list(scenes.COLORS)[label[index, 1] - 1]
            covering = {scene.things[i - 1].color for i in set(ids[index].tolist()) - {0}}
            assert color in covering
        assert not label[(ids == 0).all(1), :CHARACTER].any()
        assert not label[(ids == ids[:, :1]).all(1), 2].any()  # inside a shape no outline is seen


def test_half_of_a_word_does_not_tell_the_rest():
    """Made-up words: those that begin alike end differently."""
    ends = collections.defaultdict(set)
    for seed in range(COUNT):
        for run in scenes.scene(seed, picture="signs").runs:
            if run.text.isalpha() and len(run.text) > 5:
                ends[run.text[:1]].add(run.text[3:])
    assert sum(map(len, ends.values())) > 4 * len(ends)


def test_glyphs_of_every_face_differ():
    for face in faces.FACES:
        drawn = {faces.glyph(face, 24, c)[0].tobytes() for c in scenes.CHARACTERS}
        assert len(drawn) == len(scenes.CHARACTERS)


@pytest.mark.parametrize("answer", ["", "123", "12345", "a123", "5123", "0804", "1589"])
def test_answers_without_a_box(answer):
    assert scenes.box_region(answer) is None


def test_a_question_and_an_answer_give_regions(drawn):
    for scene in drawn:
        for question in scene.questions:
            assert 0 < question.region.area <= 1
            if question.kind == scenes.BOX_KIND:  # whole blocks around the thing
                (x0, y0, x1, y1), (a, b, c, d) = question.boxes[0], scenes.box_region(question.answer).boxes[0]
                assert a <= x0 + 1e-6 and b <= y0 + 1e-6 and c >= x1 - 1e-6 and d >= y1 - 1e-6


def test_examples_are_unseen_take_turns_and_need_one_part():
    found = list(scenes.examples(12, seed=3))
    assert [scene.picture for scene, _ in found] == [*scenes.PICTURES, *scenes.PICTURES]
    assert all(question.kind in scenes.LOCAL_KINDS and question in scene.questions for scene, question in found)
    assert all(len(question.boxes) == 1 for _, question in found)
    assert found[1][0] == scenes.scene(scenes.UNSEEN + 3001, picture=scenes.PICTURES[1])
