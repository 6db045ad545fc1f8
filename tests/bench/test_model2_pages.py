"""The freely placed pictures: what is asked is what is drawn, where the boxes say, and no patch knows what it does not show."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

from bench.training.embedded import pages
from crop.embedded.scenes import faces

CHARACTER = 3  # first column of the characters
COUNT = 60


@pytest.fixture(scope="module")
def scenes():
    return [pages.scene(seed, picture=pages.PICTURES[seed % len(pages.PICTURES)]) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def patches(scenes):
    return [pages.patch_labels(scene) for scene in scenes]


def inside(spot, boxes) -> bool:
    x, y = (v / pages.SIZE for v in spot)
    return any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes)


@pytest.mark.parametrize("picture", pages.PICTURES)
def test_scene_is_a_function_of_its_seed(picture):
    one, two, other = (pages.scene(seed, picture=picture) for seed in (7, 7, 8))
    assert one.image.tobytes() == two.image.tobytes() and one.questions == two.questions and one.picture == picture
    assert one.image.tobytes() != other.image.tobytes() and one.image.size == (pages.SIZE, pages.SIZE)


def test_unknown_picture_raises():
    with pytest.raises(ValueError, match="picture must be one of"):
        pages.scene(1, picture="map")


def test_every_kind_of_picture_and_question_comes():
    drawn = [pages.scene(seed, hardness=1) for seed in range(1000, 1040)]
    assert {s.picture for s in drawn} == set(pages.PICTURES)
    kinds = {q.kind for s in drawn for q in s.questions}
    assert kinds == {*pages.LOCAL_KINDS, *pages.RELATION_KINDS, *pages.GLOBAL_KINDS, pages.BOX_KIND}


def test_words_are_known_and_a_question_has_one_answer(scenes):
    vocabulary = set(pages.vocabulary())
    for scene in scenes:
        answers = collections.defaultdict(set)
        for question in scene.questions:
            answers[question.text].add(question.answer)
            assert set(re.findall(r"[A-Z0-9]|[^\w\s]|[a-z]+", f"{question.text} {question.answer}")) <= vocabulary
        assert all(len(found) == 1 for found in answers.values())


def test_boxes_and_text_lie_inside_the_picture(scenes):
    for scene in scenes:
        for question in scene.questions:
            assert question.boxes and all(0 <= a < c <= 1 and 0 <= b < d <= 1 for a, b, c, d in question.boxes)
            assert question.local or question.boxes == ((0.0, 0.0, 1.0, 1.0),)
        for run in scene.runs:
            assert 0 <= run.box[0] and 0 <= run.box[1] and run.box[2] <= pages.SIZE and run.box[3] <= pages.SIZE
            assert 1 <= len(run.text) <= 12


def test_what_is_read_off_stands_in_the_regions(scenes):
    """Every character of an answer and every one quoted in a question is drawn in a box of the question."""
    for scene in scenes:
        at = {spot: c for run in scene.runs for c, spot in zip(run.text, run.spots, strict=True)}
        for question in scene.questions:
            quoted = [c for c in question.text if c in pages.CHARACTERS]
            assert [at[s] for s in question.clues] == quoted
            if question.spots:
                assert [at[s] for s in question.spots] == list(question.answer)
                assert all(inside(s, question.boxes) for s in question.spots)
            if question.kind != pages.BOX_KIND:
                assert all(inside(s, question.boxes) for s in question.clues)
            assert question.spots or not question.answer.isupper()


def test_letters_differ_from_their_ground(scenes):
    for scene in scenes:
        pixels = np.asarray(scene.image, np.float32).mean(2)
        for run in scene.runs:
            x0, y0, x1, y1 = (round(v) for v in run.box)
            assert np.ptp(pixels[max(y0, 0) : y1, max(x0, 0) : x1]) > 60, run


def test_answers_follow_from_what_is_drawn(scenes):
    for scene in scenes:
        text = {run.text for run in scene.runs}
        for question in scene.questions:
            if question.kind == "count":
                assert question.answer == str(len(question.boxes))
            elif question.kind == "color":
                near = [t for t in scene.things if t.color == question.answer]
                assert any(inside(t.center, question.boxes) for t in near)
            elif question.kind == "shape":
                assert any(inside(t.center, question.boxes) for t in scene.things if t.shape == question.answer)
            elif question.kind == pages.BOX_KIND:
                (x0, y0, x1, y1), low = question.boxes[0], [int(v) / pages.BLOCKS for v in question.answer]
                side = 1 / pages.BLOCKS
                assert low[0] <= x0 < low[0] + side and low[1] <= y0 < low[1] + side
                assert low[2] < x1 <= low[2] + side + 1e-6 and low[3] < y1 <= low[3] + side + 1e-6
            elif question.spots:
                assert question.answer in text
        if scene.picture == "receipt":
            prices = [float(q.answer) for q in scene.questions if q.kind == "price"]
            (total,) = (float(q.answer) for q in scene.questions if q.kind == "total")
            assert sum(prices) == pytest.approx(total, abs=0.001)


def test_placement_is_free(scenes):
    """Things and lines of text begin at every offset to the patch grid, in a wide range of sizes."""
    places = [round(v) % pages.PATCH for s in scenes for t in s.things if t.kind != "bar" for v in t.box[:2]]
    places += [round(v) % pages.PATCH for s in scenes for run in s.runs for v in run.spots[0]]
    share = np.bincount(places, minlength=pages.PATCH) / len(places)
    assert share.min() > 0.03 and share.max() < 0.12
    heights = [run.box[3] - run.box[1] for s in scenes for run in s.runs]
    assert min(heights) <= 16 and max(heights) > 24


def test_words_run_over_several_patches(scenes):
    spread = [len({pages.patch_of(s) for s in run.spots}) for s in scenes for run in s.runs if len(run.text) > 6]
    assert min(spread) >= 3


def test_a_patch_names_the_characters_centred_in_it_and_no_others(scenes, patches):
    lost = total = 0
    for scene, label in zip(scenes, patches, strict=True):
        wanted = collections.defaultdict(list)
        for run in scene.runs:
            for character, spot in zip(run.text, run.spots, strict=True):
                wanted[pages.patch_of(spot)].append((spot[0], character))
        for patch, row in enumerate(label[:, CHARACTER:]):
            named = "".join(pages.CHARACTERS[c - 1] for c in row if c)
            there = "".join(c for _, c in sorted(wanted[patch]))
            assert there.startswith(named)
            lost, total = lost + len(there) - len(named), total + len(there)
    assert lost < 0.001 * total


def test_a_patch_names_the_thing_that_covers_it(scenes, patches):
    for scene, label in zip(scenes, patches, strict=True):
        grid, patch = pages.GRID, pages.PATCH
        ids = np.asarray(scene.ids).reshape(grid, patch, grid, patch).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
        for index in label[:, 1].nonzero()[0]:
            color = list(pages.COLORS)[label[index, 1] - 1]
            covering = {scene.things[i - 1].color for i in set(ids[index].tolist()) - {0}}
            assert color in covering
        assert not label[(ids == 0).all(1), :CHARACTER].any()
        assert not label[(ids == ids[:, :1]).all(1), 2].any()  # inside a shape no outline is seen


def test_half_of_a_word_does_not_tell_the_rest():
    """Made-up words: those that begin alike end differently."""
    ends = collections.defaultdict(set)
    for seed in range(COUNT):
        for run in pages.scene(seed, picture="signs").runs:
            if run.text.isalpha() and len(run.text) > 5:
                ends[run.text[:1]].add(run.text[3:])
    assert sum(map(len, ends.values())) > 4 * len(ends)


def test_glyphs_of_every_face_differ():
    for face in faces.FACES:
        drawn = {faces.glyph(face, 24, c)[0].tobytes() for c in pages.CHARACTERS}
        assert len(drawn) == len(pages.CHARACTERS)
