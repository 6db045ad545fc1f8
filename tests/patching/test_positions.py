"""Position policies: a cell's centre instead of its leader, numbers without gaps instead of the original ones."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from crop.geometry.region import Region
from crop.methods import Pyramid
from crop.patching.positions import close_gaps
from tests.support.contract import ATOL, METHODS, REGIONS, greedy, layouts_of, patched, regions_of
from tests.support.pyramid import PyramidOracle, decide
from tests.support.tiny_models import FAMILIES, standard_batch, text_tokens

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
families = matrix("family", FAMILIES)
SEVERAL = {**{name: METHODS[name] for name in ("plc", "ilp_budget", "compose")}, "pyramid": Pyramid.steps((1, 3))}
QUESTION = text_tokens(4, 9)


class Centroid(PyramidOracle):
    """A pooled token stands at the mean of its members' places."""

    def _forward(self, sample, decision, attentions):
        self.table = super().positions(sample).double().clone()
        places = self.table.clone()
        for members, leader in self._layout(sample, decision)[0]:
            self.table[..., leader] = places[..., list(members)].mean(-1)
        self.table = self.table.float()
        return super()._forward(sample, decision, attentions)

    def positions(self, sample):
        return self.table


class Compact(PyramidOracle):
    """Every stage numbers what it holds from 0, text by text and image by image, as if nothing had ever been there."""

    def _numbers(self, sample, decision, kept):
        places = super().positions(sample)
        flat = places.dim() == 1
        places = places.reshape(-1, len(sample.ids))
        rows, hidden = self._layout(sample, replace(decision, kept=kept))
        alive = [leader for row, (_, leader) in enumerate(rows) if row not in hidden]
        numbers, following, position = torch.zeros_like(places), 0, 0
        images = {span.start: span for span in sample.spans()}
        while position < len(sample.ids):
            span = images.get(position)
            if span is None:
                numbers[:, position] = following
                following, position = following + 1, position + 1
                continue
            mine, highest = [leader for leader in alive if leader in span], following - 1
            for axis in range(len(places)):
                order = sorted({int(places[axis, leader]) for leader in mine})
                for leader in mine:
                    numbers[axis, leader] = following + order.index(int(places[axis, leader]))
                highest = max(highest, following + len(order) - 1)
            following, position = highest + 1, span.stop
        return numbers[0] if flat else numbers

    def _forward(self, sample, decision, attentions):
        every = tuple(tuple(range(len(cells))) for cells in decision.cells)
        leaders = [leader for _, leader in self._layout(sample, decision)[0]]
        numbers = [self._numbers(sample, decision, kept) for kept in (every, *(kept for _, kept in self.cuts))]
        self.table = numbers[0]
        firsts = [0, *(first for first, _ in self.cuts)]
        self.stages = [(first, table[..., leaders].unsqueeze(-2)) for first, table in zip(firsts, numbers, strict=True)]
        return super()._forward(sample, decision, attentions)

    def positions(self, sample):
        return self.table

    @contextlib.contextmanager
    def _masks(self, masks):
        handles = []
        for index, layer in enumerate(self.language_model.layers):
            ids = [ids for first, ids in self.stages if first <= index][-1]

            def turn(_module, args, kwargs, ids=ids):
                return args, {**kwargs, "position_embeddings": self.language_model.rotary_emb(args[0], ids)}

            handles.append(layer.register_forward_pre_hook(turn, with_kwargs=True))
        try:
            with super()._masks(masks):
                yield
        finally:
            for handle in handles:
                handle.remove()


POLICIES = {"centroid": Centroid, "compact": Compact}


@matrix("attention,padding,images", [("sdpa", "left", 2), ("flash_attention_2", "single", 1)])
@matrix("name", list(SEVERAL))
@matrix("policy", list(POLICIES))
@families
def test_positions_are_the_oracles(family, policy, name, attention, padding, images, get_model, get_oracle):
    if policy == "centroid" and name in ("ilp_budget", "pyramid"):
        return  # pools nothing
    model, batch, method = get_model(family, attention), standard_batch(family, padding, images), SEVERAL[name]
    with patched(model, method, regions_of(batch), positions=policy):
        out = greedy(model, batch, max_new_tokens=3)
    with patched(model, None):  # the numbering goes on where the cache says so
        mask = torch.cat([batch.inputs["attention_mask"], torch.ones(len(batch.samples), 7).long()], 1)
        ids = torch.cat([out.sequences, torch.tensor([QUESTION] * len(batch.samples))], 1)
        again = model.generate(ids, attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=2,
                               do_sample=False, output_logits=True, return_dict_in_generate=True)  # fmt: skip
    differs = False
    for row, sample in enumerate(batch.samples):
        regions = list(REGIONS[row][:images])
        oracle, decision = decide(get_oracle(family), sample, method, regions, layouts_of(sample), POLICIES[policy])
        steps = oracle.greedy(sample, decision, 3)
        for got, logits in zip(out.logits, steps.logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)
        later = oracle.greedy(sample.extended(steps.tokens + QUESTION), decision, 2)
        for got, logits in zip(again.logits, later.logits, strict=True):
            torch.testing.assert_close(got[row], logits, atol=ATOL, rtol=0)
        plain = PyramidOracle(get_oracle(family), oracle.cuts).forward(sample, decision)[0][-1]
        differs |= bool((plain - steps.logits[0]).abs().max() > 3 * ATOL)
    assert differs


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


@families
def test_unpruned_numbers_are_original(family, get_model):
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 2)
    for name in ("ilp_strict", "plc"):
        with patched(model, METHODS[name], [Region.whole()] * 4, positions="compact"):
            got = model(**batch.inputs).logits
        with patched(model, METHODS[name], [Region.whole()] * 4):
            assert torch.equal(got, model(**batch.inputs).logits)


def test_refused(get_model):
    with pytest.raises(ValueError, match="positions must be one of original, centroid, compact, got 'packed'"):
        patched(get_model("llava", "sdpa"), METHODS["plc"], positions="packed").__enter__()
