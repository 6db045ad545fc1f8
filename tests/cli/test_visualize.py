"""Overlays: what stays is shown as it is, what was pooled as its mean, what was dropped in the dark."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from crop.cli.visualize import DROPPED, NOTHING, POOLED, WHOLE, contact_sheet, outlined, overlay, trace
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods import PreLLMCompression

SIDE = 512  # not enlarged; an 8 x 8 grid has cells of 64 pixels


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(60, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def cell(image: Image.Image, row: int, col: int, margin: int = 3) -> np.ndarray:
    x, y = 64 * col, 64 * row
    return np.asarray(image)[y + margin : y + 64 - margin, x + margin : x + 64 - margin].astype(int)


def pairs(layout: VisionLayout) -> PoolPlan:
    """Tokens 0 and 1 are pooled, token 2 is in no cell, all others stay alone."""
    label = torch.arange(len(layout))
    label[1], label[2] = 0, -1
    level = torch.zeros(len(layout), dtype=torch.uint8)
    return PoolPlan.from_labels(label, layout.row, layout.col, level)


def test_cells_tile_what_the_processor_shows():
    cells = VisionLayout.grid(2, 4, box=(0.1, 0.0, 0.9, 1.0)).cells
    assert cells[0].tolist() == pytest.approx([0.1, 0.0, 0.3, 0.5])
    assert cells[-1].tolist() == pytest.approx([0.7, 0.5, 0.9, 1.0])
    assert VisionLayout.grid(1, 2).cells.tolist() == [[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]
    borders = VisionLayout.grid(12, 7).cells
    assert len(np.unique(borders[:, [0, 2]])) == 8 and len(np.unique(borders[:, [1, 3]])) == 13
    grid = VisionLayout.grid(2, 2)
    half = replace(grid, view=torch.tensor([0, 0, 1, 1], dtype=torch.int32))  # two views of one row each
    assert half.cells[:, 2:].tolist() == [[0.5, 0.75], [1.0, 0.75], [0.5, 1.25], [1.0, 1.25]]


def test_kept_cells_are_unchanged_and_dropped_ones_dark(picture):
    layout = VisionLayout.grid(8, 8)
    seen = overlay(picture, layout, None, torch.tensor([9, 10, 63]), legend=False)
    assert seen.size == picture.size
    for row, col in ((1, 1), (1, 2), (7, 7)):
        assert np.array_equal(cell(seen, row, col), cell(picture, row, col))
    for row, col in ((0, 0), (1, 3), (7, 6)):
        assert cell(seen, row, col).mean() < 0.5 * cell(picture, row, col).mean()
        assert cell(seen, row, col).std() > 2  # not blotted out
    plain = overlay(Image.new("RGB", (SIDE, SIDE), "gray"), layout, None, torch.tensor([9]), legend=False)
    assert len(np.unique(cell(plain, 0, 0))) == 2  # hatched


def test_pooled_cells_show_their_mean_colour_and_their_outline(picture):
    layout = VisionLayout.grid(8, 8)
    seen = overlay(picture, layout, pairs(layout), torch.tensor([0, 3]), legend=False)
    both = np.asarray(picture)[:64, :128].reshape(-1, 3).mean(0)
    for col in (0, 1):
        shown = cell(seen, 0, col)
        assert np.abs(shown - both).max() <= 1
    inner_border = np.asarray(seen)[10:50, 62:66].astype(int)
    assert np.abs(inner_border - both).max() <= 1  # no line inside the merged cell
    outer_border = np.asarray(seen)[10:50, 126:130].astype(int)
    assert np.abs(outer_border - both).max() > 40
    assert cell(seen, 0, 2).mean() < 90  # in no cell: dropped
    assert np.array_equal(cell(seen, 0, 3), cell(picture, 0, 3))


def test_what_the_processor_cropped_away_is_black(picture):
    layout = VisionLayout.grid(4, 4, box=(0.25, 0.25, 0.75, 0.75))
    seen = np.asarray(overlay(picture, layout, legend=False))
    assert not seen[:120].any() and not seen[:, 400:].any()
    inside = slice(132, 380)
    assert np.array_equal(seen[inside, inside], np.asarray(picture)[inside, inside])


def test_padding_tokens_are_not_drawn(picture):
    layout = VisionLayout.grid(8, 8, box=(0.0, -0.5, 1.0, 1.5))
    fate = trace(layout, None, torch.tensor([20]))
    assert (fate.state[(layout.kind != 0).numpy()] == NOTHING).all()
    assert fate.counts == {"whole": 1, "pooled": 0, "members": 0, "dropped": 31}
    assert overlay(picture, layout, None, torch.tensor([20]), legend=False).size == picture.size


def test_region_is_outlined_where_it_is(picture):
    layout = VisionLayout.grid(8, 8)
    region = Region.box(0.25, 0.25, 0.5, 0.5)
    plain = np.asarray(overlay(picture, layout, legend=False)).astype(int)
    seen = np.asarray(overlay(picture, layout, region=region, legend=False)).astype(int)
    changed = np.abs(seen - plain).max(2) > 0
    assert changed[128:256, 128].all() and changed[128, 128:256].all()  # the box
    assert changed[192 - 3 : 192 + 3, 64 - 3 : 64 + 3].any() and not changed[:60].any()  # its ring
    assert not changed[140:244, 140:244].any()
    alone = np.asarray(overlay(picture, layout, region=region, ring=0, legend=False)).astype(int)
    assert not (np.abs(alone - plain).max(2) > 0)[:, :124].any()
    drawn = np.asarray(outlined(picture, region)).astype(int)
    assert np.array_equal(drawn[:120], np.asarray(picture)[:120].astype(int))
    assert (drawn[128:256, 128] != np.asarray(picture)[128:256, 128]).any()


def test_trace_follows_plc_and_then_ilp():
    layout = VisionLayout.grid(8, 8)
    region = Region.box(0, 0, 0.25, 0.25)
    plan = PreLLMCompression(1, 2, 4, ring=2).plan(layout, region)
    fate = trace(layout, plan, None)
    assert set(fate.state) == {POOLED, WHOLE}
    assert fate.counts["whole"] + fate.counts["pooled"] == plan.num_out
    kept = plan.leader[:6].long()
    fate = trace(layout, plan, kept)
    alive = set(plan.inverse[kept].tolist())
    for token, state in enumerate(fate.state):
        single = int(plan.counts[plan.inverse[token]]) == 1
        wanted = (WHOLE if single else POOLED) if int(plan.inverse[token]) in alive else DROPPED
        assert state == wanted
    assert fate.counts["members"] + fate.counts["whole"] + fate.counts["dropped"] == 64


def test_a_token_in_no_cell_is_dropped_even_if_it_is_named():
    layout = VisionLayout.grid(8, 8)
    fate = trace(layout, pairs(layout), torch.tensor([2, 3]))
    assert fate.state[2] == DROPPED and fate.state[3] == WHOLE and fate.counts["dropped"] == 63


def test_small_images_are_enlarged_and_the_legend_adds_a_strip():
    layout = VisionLayout.grid(8, 8)
    small = Image.new("L", (64, 32), 200)
    plain = overlay(small, layout, legend=False)
    assert plain.mode == "RGB" and plain.size == (448, 224)
    full = overlay(small, layout, None, torch.tensor([0]), Region.box(0, 0, 0.5, 0.5))
    assert full.width == 448 and full.height > 240
    strip = np.asarray(full)[224:]
    assert len(np.unique(strip.reshape(-1, 3), axis=0)) > 10
    assert np.asarray(small).min() == 200  # the original stays


@pytest.mark.parametrize("size", [(8000, 6000), (12000, 40), (1, 5000)])
def test_large_pictures_are_drawn_at_a_bounded_size(size):
    layout = VisionLayout.grid(8, 8)
    large = Image.new("RGB", size, (10, 200, 30))
    seen = overlay(large, layout, None, torch.tensor([0]), Region.box(0, 0, 0.5, 0.5), legend=False)
    assert max(seen.size) == max(outlined(large, Region.whole()).size) == 1600
    assert seen.height == max(1, round(1600 * size[1] / max(size)))


@pytest.mark.parametrize("kept, plan, message", [
    (torch.tensor([64]), None, "kept must be in"), (torch.tensor([-1]), None, "kept must be in"),
    (None, PoolPlan.identity(63), "plan.num_tokens must be N=64, got 63"),
])  # fmt: skip
def test_bad_arguments(kept, plan, message, picture):
    with pytest.raises(ValueError, match=message):
        overlay(picture, VisionLayout.grid(8, 8), plan, kept)


def test_contact_sheet_holds_every_picture():
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    rows = [([Image.new("RGB", (50, 40), color)] * 2, "question", "answer") for color in colors]
    sheet = np.asarray(contact_sheet(rows, columns=2)).reshape(-1, 3)
    for color in colors:
        assert (sheet == color).all(1).sum() == 2 * 50 * 40
    with pytest.raises(ValueError, match="at least one example"):
        contact_sheet([])
