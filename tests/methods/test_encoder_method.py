"""EncoderPruning, what it is made of, and the page of methods."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import crop
from crop.geometry.layout import NEWLINE, VisionLayout
from crop.geometry.pieces import Copy, Encoding, Pieces
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods import Compose, EncoderPruning, InnerLLMPruning, PreLLMCompression
from tests.support.layouts import in_two_views

pytestmark = pytest.mark.fast

PAGE = Path(crop.__file__).parent / "methods" / "README.md"


def windows(side: int = 2, count: int = 4) -> tuple[VisionLayout, Pieces]:
    """A grid of ``count`` x ``count`` windows of ``side`` x ``side`` tokens."""
    layout = VisionLayout.grid(side * count, side * count)
    place = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    number = layout.row.long() // side * count + layout.col // side
    return layout, Pieces(number[:, None], torch.zeros(count**2, dtype=torch.bool), place)


def test_region_and_ring_and_every_so_manieth_piece():
    layout, pieces = windows()
    region = Region.box(0.5, 0.5, 0.6, 0.6)  # the token (4, 4), the first of window (2, 2)
    for ring, every, wanted in (
        (0, 4, {(2, 2), (0, 0)}),
        (1, 4, {(2, 2), (1, 1), (1, 2), (2, 1), (0, 0)}),
        (0, 2, {(2, 2), (0, 0), (0, 2), (2, 0)}),
        (0, 1, {(row, column) for row in range(4) for column in range(4)}),
    ):
        taken = EncoderPruning(ring, every).encode(layout, region, pieces)
        assert {tuple(place) for place in pieces.place[taken].tolist()} == wanted


def test_a_view_of_the_whole_stands_for_the_outside():
    layout, pieces = windows()
    overview = torch.arange(len(pieces)) == 15
    taken = EncoderPruning(0).encode(layout, Region.box(0.5, 0.5, 0.6, 0.6), Pieces(pieces.of_token, overview))
    assert torch.nonzero(taken).flatten().tolist() == [10, 15]


def test_a_token_is_known_when_all_its_pieces_are_and_newlines_follow_their_row():
    layout = VisionLayout.grid(2, 3)
    layout = VisionLayout(
        **{name: getattr(layout, name) for name in ("position", "center", "row", "col", "view", "num_original")},
        kind=torch.tensor([0, 0, NEWLINE, 0, 0, NEWLINE], dtype=torch.uint8),
    )
    pieces = Pieces(
        torch.tensor([[0, -1], [0, 1], [-1, -1], [2, -1], [1, 2], [-1, -1]]), torch.zeros(3, dtype=torch.bool)
    )
    for taken, wanted in (
        ((1, 0, 0), (0, 2)),
        ((0, 1, 0), ()),
        ((0, 1, 1), (3, 4, 5)),
        ((1, 1, 1), (0, 1, 2, 3, 4, 5)),
    ):
        encoding = Encoding(layout, pieces, torch.tensor(taken, dtype=torch.bool))
        assert torch.nonzero(encoding.tokens).flatten().tolist() == list(wanted)
        assert encoding.left.position.tolist() == list(wanted) and encoding.left.num_original == 6
    assert pieces.needed(torch.tensor([False, True, True, False, False, False])).tolist() == [True, True, False]


def test_a_copy_stands_where_nothing_is_encoded():
    """Of 6 x 10 tokens 2 x 3: rows of three, columns of three, four and three tokens."""
    layout = VisionLayout.grid(6, 10)
    copy = Copy.of(layout, 4)
    assert copy.layout.extent == (1, 2, 3)
    assert (
        copy.shown_by.view(6, 10).tolist()
        == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]] * 3 + [[3, 3, 3, 4, 4, 4, 4, 5, 5, 5]] * 3
    )
    row, column = layout.row, layout.col
    assert copy.places(torch.ones(60, dtype=torch.bool)).tolist() == [11, 14, 18, 41, 44, 48]
    missing = ~((row < 3) & (column < 3)) & ~((row == 4) & (column == 4)) & ~((row >= 3) & (column == 8))
    assert copy.places(missing).tolist() == [-1, 14, 18, 41, 45, 47]
    twice = Copy.of(replace(in_two_views(4, 4), num_original=32), 4)
    assert twice.places(torch.ones(32, dtype=torch.bool)).tolist() == [5, 21] and twice.layout.extent == (2, 1, 1)
    pieces = Pieces(torch.arange(60)[:, None], torch.arange(61) == 60, copy=copy)
    own = torch.cat([~missing, torch.tensor([True])])
    encoding = Encoding(layout, pieces, own)
    assert not encoding.whole and encoding.copy is copy.layout
    assert torch.nonzero(encoding.tokens & ~encoding.own).flatten().tolist() == [14, 18, 41, 45, 47]
    assert torch.equal(encoding.own, ~missing)
    for taken in (~pieces.overview, torch.ones(61, dtype=torch.bool)):
        encoding = Encoding(layout, pieces, taken)
        assert encoding.whole and encoding.copy is None and encoding.tokens.all()
    without = Encoding(layout, pieces, own & ~pieces.overview)
    assert without.copy is None and torch.equal(without.tokens, ~missing)


def test_a_plan_for_some_tokens_is_one_for_all():
    label = torch.tensor([7, 7, -1, 3])
    zeros = torch.zeros(4, dtype=torch.int32)
    plan = PoolPlan.from_labels(label, zeros, torch.arange(4, dtype=torch.int32), zeros.to(torch.uint8))
    lifted = plan.among(torch.tensor([1, 2, 5, 8]), 9)
    assert lifted.inverse.tolist() == [-1, 0, 0, -1, -1, -1, -1, -1, 1]
    assert lifted.leader.tolist() == [1, 8] and lifted.num_tokens == 9
    PoolPlan(lifted.members, lifted.offsets, lifted.leader, lifted.level, 9)  # holds what a plan promises


def test_three_stages():
    plc, ilp, encoder = PreLLMCompression(keep=0.4), InnerLLMPruning(0.1, layer=3, rows="last"), EncoderPruning()
    layout, pieces = windows()
    region = Region.box(0.1, 0.1, 0.4, 0.3)
    every = Compose(plc, ilp, encoder)
    assert (every.layer, every.rows, every.pool_mode, every.encodes) == (3, "last", "distinct", True)
    assert torch.equal(every.encode(layout, region, pieces), encoder.encode(layout, region, pieces))
    assert not Compose(plc, ilp).encodes and Compose(plc, ilp).encode(layout, region, pieces) is None
    first = Compose(plc, encoder=encoder)
    assert first.cuts == () and first.layer is None and first.select(layout, region) is None
    last = Compose(ilp=ilp, encoder=encoder).with_layer(5)
    assert last.cuts == (ilp,) and last.plan(layout, region) is None and last.pool_mode == "mean"
    for wrong in (
        dict(plc=plc),
        dict(plc=encoder, ilp=ilp),
        dict(ilp=ilp, encoder=plc),
        dict(plc=every, encoder=encoder),
    ):
        with pytest.raises(TypeError, match="encoder leave out parts of a picture .* two of them at least"):
            Compose(**wrong)
    with pytest.raises(ValueError, match="EncoderPruning: every must be >= 1, got 0"):
        EncoderPruning(every=0)


def test_the_method_of_the_page_works():
    (block,) = (one for one in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "class TopHalf" in one)
    space = {"crop": crop}
    exec(block, space)
    layout, pieces = windows()
    taken = space["TopHalf"]().encode(layout, Region.whole(), pieces)
    assert pieces.place[taken][:, 0].unique().tolist() == [0, 1] and space["TopHalf"]().encodes
