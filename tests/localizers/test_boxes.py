"""From scores to boxes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.localizers import (
    Attention,
    find_region,
    score_tokens,
)
from crop.localizers.boxes import Raster, _touching
from tests.support.families.entry import ATTENTIONS

pytestmark = pytest.mark.fast
attentions = pytest.mark.parametrize("attention", ATTENTIONS)


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


def flooded(mask):
    """Boxes around what touches, by walking from cell to cell."""
    left, boxes = {(int(row), int(col)) for row, col in np.argwhere(mask)}, []
    while left:
        found, reached = [], [left.pop()]
        while reached:
            row, col = reached.pop()
            found.append((row, col))
            near = left & {(row + y, col + x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
            left -= near
            reached += near
        rows, cols = zip(*found, strict=True)
        boxes.append((min(cols), min(rows), max(cols) + 1, max(rows) + 1))
    return boxes


def test_random_cells_that_touch_are_those_that_a_walk_reaches():
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask = rng.random(rng.integers(1, 25, 2)) < rng.random()
        assert sorted(_touching(mask)) == sorted(flooded(mask))


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
