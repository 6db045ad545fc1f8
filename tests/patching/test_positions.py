"""Numbers without gaps instead of the original ones."""

from __future__ import annotations

import pytest
import torch

from crop.geometry.region import Region
from crop.methods import Pyramid
from crop.patching.positions import close_gaps
from tests.support.batches import standard_batch
from tests.support.cases import (
    ATOL,
    METHODS,
    assert_steps,
    decide,
    families,
    get_model,
    get_oracle,
    greedy,
    next_turn,
    patched,
    regions_for,
    regions_of,
)
from tests.support.families.entry import text_tokens
from tests.support.oracle import Oracle
from tests.support.tiny_families import THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
SEVERAL = {**{name: METHODS[name] for name in ("plc", "budget", "compose")}, "pyramid": Pyramid.steps((1, 3))}
QUESTION = text_tokens(4, 9)


class Compact(Oracle):
    """Every stage numbers what it holds from 0, text by text and image by image, as if nothing had ever been there."""

    def numbers(self, sample, places):
        original = self.positions(sample)
        axes = original.reshape(-1, len(sample.ids))
        alive, numbers = set(places.tolist()), torch.zeros_like(axes)
        images = {span[0]: span for span in sample.spans()}
        following, position = 0, 0
        while position < len(sample.ids):
            span = images.get(position)
            if span is None:
                numbers[:, position] = following
                following, position = following + 1, position + 1
                continue
            mine, highest = [place for place in span if place in alive], following - 1
            for axis, row in enumerate(axes.tolist()):
                order = sorted({row[place] for place in mine})
                for place in mine:
                    numbers[axis, place] = following + order.index(row[place])
                highest = max(highest, following + len(order) - 1)
            following, position = highest + 1, span[-1] + 1
        return numbers.reshape(original.shape)[..., places]


@matrix("attention,padding,images", [("sdpa", "left", 2), ("flash_attention_2", "single", 1)])
@matrix("name", list(SEVERAL))
@families(THOROUGH)
def test_positions_are_the_oracles(family, name, attention, padding, images):
    model, batch, method = get_model(family, attention), standard_batch(family, padding, images), SEVERAL[name]
    oracle, plain = Compact(get_oracle(family).model, get_oracle(family).family), get_oracle(family)
    with patched(model, method, batch, regions_of(batch), positions="compact"):
        out = greedy(model, batch, 3)
    with patched(model, None, batch):  # the numbering goes on where the cache says so
        again = next_turn(model, batch, out, QUESTION, 2)
    decisions = [decide(oracle, sample, method, regions_for(row, sample)) for row, sample in enumerate(batch.samples)]
    steps = [oracle.greedy(sample, d, 3) for sample, d in zip(batch.samples, decisions, strict=True)]
    assert_steps(out, steps)
    later = [s.extended(first.tokens + QUESTION) for s, first in zip(batch.samples, steps, strict=True)]
    assert_steps(again, [oracle.greedy(sample, d, 2) for sample, d in zip(later, decisions, strict=True)])
    with_gaps = [plain.forward(sample, d)[0][-1] for sample, d in zip(batch.samples, decisions, strict=True)]
    assert any((a - b.logits[0]).abs().max() > 3 * ATOL for a, b in zip(with_gaps, steps, strict=True))


def test_gaps_by_hand():
    """One axis: consecutive. Three: free rows and columns close, text follows the longer side."""
    alive = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 1]], dtype=torch.bool)  # text, 2 x 3 grid, text
    image = [(0, torch.arange(1, 7))]
    ids, moved = close_gaps(torch.arange(8).view(1, 1, 8), alive, image)
    assert ids[0, 0, alive[0]].tolist() == [0, 1, 2, 3, 4] and moved.tolist() == [3]
    time = torch.tensor([0, 1, 1, 1, 1, 1, 1, 4])
    rows, columns = torch.tensor([0, 1, 1, 1, 2, 2, 2, 4]), torch.tensor([0, 1, 2, 3, 1, 2, 3, 4])
    ids, moved = close_gaps(torch.stack([time, rows, columns])[:, None], alive, image)
    assert ids[:, 0, alive[0]].tolist() == [[0, 1, 1, 1, 3], [0, 1, 2, 2, 3], [0, 1, 1, 2, 3]]
    assert moved.tolist() == [1]
    ids, moved = close_gaps(torch.arange(8).view(1, 1, 8), alive & (torch.arange(8) % 7 == 0), image)
    assert ids[0, 0, [0, 7]].tolist() == [0, 1] and moved.tolist() == [6]  # an image nobody holds


@families(THOROUGH)
def test_unpruned_numbers_are_original(family):
    model, batch = get_model(family), standard_batch(family, "left", 2)
    for name in ("strict", "plc"):
        with patched(model, METHODS[name], batch, [Region.whole()] * 4, positions="compact"):
            got = model(**batch.inputs).logits
        with patched(model, METHODS[name], batch, [Region.whole()] * 4):
            assert torch.equal(got, model(**batch.inputs).logits)


def test_refused():
    with pytest.raises(ValueError, match="positions must be one of .*original.*compact.*, got 'packed'"):
        patched(
            get_model("llava"), METHODS["plc"], standard_batch("llava", "single", 1), positions="packed"
        ).__enter__()
