"""Baselines: budget, order, determinism, the oracle; and each greedy rule against a loop that says it plainly."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, Method
from crop.methods.base import Assignment, FeaturePooling, Features
from crop.methods.baselines import BASELINES
from crop.methods.baselines.controls import even_cells
from crop.methods.baselines.features import CDPruner, DivPrune, TokenMerging, VisionZip

names = pytest.mark.parametrize("name", list(BASELINES))


def make(name: str, keep: float | int) -> Method:
    return BASELINES[name](keep, NUM_LAYERS)


LATE = [
    name
    for name in BASELINES
    if isinstance(make(name, 0.5).plan(VisionLayout.grid(4, 4), Region.whole()), FeaturePooling)
]


class Recycling(Oracle):
    """An oracle that changes the hidden states of the seeds at the cut, by loops over the tokens."""

    def __init__(self, oracle: Oracle, method: Method) -> None:
        super().__init__(oracle.model)
        self.method = method

    def _forward(self, sample, decision, attentions):
        def merge(module, args, kwargs):
            hidden = args[0].clone()
            for number, span in enumerate(sample.spans()):
                score, kept = decision.scores[number], decision.kept[number]
                order = sorted(range(len(score)), key=lambda n: (-score[n], n))
                seeds, taken = self.method.recycle(len(kept), len(score))
                seeds, taken = order[len(kept) - seeds : len(kept)], order[len(kept) : len(kept) + taken]
                assert seeds and taken and set(seeds) <= set(kept)
                rows = args[0][0, torch.tensor(list(span))]
                parties = {seed: [rows[seed]] for seed in seeds}
                for token in taken:
                    parties[max(seeds, key=lambda s: cosine_similarity(rows[token], rows[s], dim=0).item())].append(rows[token])  # fmt: skip
                for seed, members in parties.items():
                    hidden[0, span[seed]] = torch.stack(members).mean(0)
            return (hidden, *args[1:]), kwargs

        if decision.layer is None:
            return super()._forward(sample, decision, attentions)
        layer = self.language_model.layers[decision.layer]
        handle = layer.register_forward_pre_hook(merge, with_kwargs=True)
        try:
            return super()._forward(sample, decision, attentions)
        finally:
            handle.remove()

    def forward(self, sample, decision, *, attentions=False):
        return self._forward(sample, decision, attentions)


def usable(family: str, name: str) -> None:
    if name == "visionzip" and family != "llava":
        pytest.skip("reads the tower's attention, which this family's tower gives for other tokens")


def features(count: int = 40, dim: int = 12, seed: int = 0) -> Features:
    """Random features, some of them near copies of others."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, dim, generator=generator)
    tokens[count // 2 :: 3] = tokens[: len(tokens[count // 2 :: 3])] + 0.01
    return Features(
        tokens, torch.randn(5, dim, generator=generator), torch.rand(count, generator=generator)
    )  # fmt: skip


@names
@families(THOROUGH)
def test_equals_the_oracle(family, name):
    usable(family, name)
    model, oracle = get_model(family, "sdpa"), get_oracle(family)
    batch = standard_batch(family, "left", 2)
    method = make(name, 0.3)
    if name == "sparsevlm":
        oracle = Recycling(oracle, method)
    with patched(model, method) as stats:
        generated = greedy(model, batch, max_new_tokens=3)
    kept = iter(zip(stats.kept, stats.tokens_after_ilp, batch.grids, strict=True))
    for row, sample in enumerate(batch.samples):
        where = ([Region.whole()] * 2, sample.layouts())
        if name == "pyramiddrop":
            oracle, decision = decide(get_oracle(family), sample, method, *where)
        else:
            decision = oracle.decide(sample, method, *where)
        for image in range(2):
            tokens, after, (height, width) = next(kept)
            assert tokens.tolist() == decision.kept_original(image)
            assert len(tokens) == after == round(0.3 * height * width)
        for number, logits in enumerate(oracle.greedy(sample, decision, 3).logits):
            torch.testing.assert_close(generated.logits[number][row], logits, atol=ATOL, rtol=0)


@names
@families(THOROUGH)
def test_batched_is_single_and_repeatable(family, name):
    usable(family, name)
    model, method = get_model(family, "sdpa"), make(name, 0.15)
    batch = standard_batch(family, "right", 2)
    with patched(model, method) as stats:
        together = model(**batch.inputs).logits
        kept = stats.kept
        again = model(**batch.inputs).logits
    assert torch.equal(together, again)
    for row, sample in enumerate(batch.samples):
        with patched(model, method) as alone:
            logits = model(**batch.single(row).inputs).logits[0]
        last = batch.offsets[row] + len(sample.ids)
        assert (together[row, last - 1] - logits[-1]).abs().max() <= ATOL
        assert all(torch.equal(a, b) for a, b in zip(alone.kept, kept[2 * row : 2 * row + 2], strict=True))


@names
@families(THOROUGH)
def test_keep_all_is_bit_identical(family, name):
    usable(family, name)
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    plain = model(**batch.inputs).logits
    with patched(model, make(name, 1.0)):
        assert torch.equal(model(**batch.inputs).logits, plain)


def test_late_plans_follow_beams_and_many_images():
    """generate() repeats samples after the tower ran; two images a sample."""
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "left", 2)
    with patched(model, VisionZip(0.2)) as stats:
        model.generate(**batch.inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    kept = stats.kept
    with patched(model, VisionZip(0.2)) as stats:
        model(**batch.inputs)
    assert len(kept) == 8
    for beam in range(8):
        assert torch.equal(kept[beam], stats.kept[2 * (beam // 4) + beam % 2])


def test_towers_without_fitting_tokens_are_refused():
    with (
        pytest.raises(ValueError, match="needs a tower of clip_vision_model"),
        patched(get_model("qwen2_5_vl", "sdpa"), VisionZip(0.2)),
    ):
        pass


def test_salience_is_the_towers_attention():
    model, oracle, batch = get_model("llava", "sdpa"), get_oracle("llava"), standard_batch("llava", "single", 1)
    seen = []

    class Probe(VisionZip):
        def _decide(self, features, count):
            seen.append(features.salience)
            return super()._decide(features, count)

    with patched(model, Probe(0.5)):
        model(**batch.inputs)
    torch.testing.assert_close(seen[0], oracle.salience(batch.samples[0].pixels[0]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 7, 20, 39])
@pytest.mark.parametrize("name", LATE)
def test_cells_are_sound(name, count):
    given = features()
    plan = make(name, count).plan(VisionLayout.grid(5, 8), Region.whole())
    found = plan.decide(given)
    assert plan.num_out == count == len(found.leader)
    assert (found.leader.diff() > 0).all()
    assert found.cell[found.leader].tolist() == list(range(count))
    assert found.cell.min() >= -1 and found.cell.max() == count - 1
    assert torch.equal(plan.decide(given).cell, found.cell)


def test_divprune_takes_the_farthest():
    rows = features().tokens
    apart = 1 - cosine_similarity(rows[:, None], rows[None], dim=-1)
    nearest = [min(apart[i, j].item() for j in range(40) if j != i) for i in range(40)]
    chosen = [nearest.index(max(nearest))]
    while len(chosen) < 12:
        chosen.append(max((i for i in range(40) if i not in chosen), key=lambda i: min(apart[i, j] for j in chosen)))
    assert DivPrune(12)._decide(features(), 12).leader.tolist() == sorted(chosen)


def test_cdpruner_maximises_the_determinant_greedily():
    given = features(24, 30)
    rows, ask = normalize(given.tokens.double(), dim=-1), normalize(given.text.double().mean(0), dim=0)
    relevance = rows @ ask
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    kernel = relevance[:, None] * (rows @ rows.T) * relevance
    chosen: list[int] = []
    while len(chosen) < 6:
        chosen.append(max((i for i in range(24) if i not in chosen),
                          key=lambda i: torch.det(kernel[[*chosen, i]][:, [*chosen, i]]).item()))  # fmt: skip
    assert CDPruner(6)._decide(given, 6).leader.tolist() == sorted(chosen)


def test_token_merging_keeps_averages_and_joins_copies():
    given = features(20, 8)
    given.tokens[1::2] = given.tokens[0::2] * 2  # the same direction: cosine 1
    found = TokenMerging(10)._decide(given, 10)
    assert found.cell.tolist() == [n // 2 for n in range(20)]
    assert sorted(TokenMerging(3)._decide(given, 3).cell.unique().tolist()) == [0, 1, 2]  # several rounds, none lost


def test_visionzip_keeps_what_is_seen_and_merges_the_rest():
    given = features()
    found = VisionZip(20, contextual=0.25)._decide(given, 20)
    order = given.salience.argsort(descending=True).tolist()
    dominant, rest = order[:15], sorted(order[15:])
    targets = rest[:: len(rest) // 5][:5]
    assert found.leader.tolist() == sorted(dominant + targets)
    for token in rest:
        near = max(targets, key=lambda t: cosine_similarity(given.tokens[token], given.tokens[t], dim=0).item())
        assert found.leader[found.cell[token]] == (token if token in targets else near)


@pytest.mark.parametrize("height,width,count", [(4, 4, 4), (16, 16, 28), (5, 9, 44), (7, 3, 2), (1, 9, 5)])
def test_even_cells_are_even(height, width, count):
    sizes = even_cells(VisionLayout.grid(height, width), count).bincount()
    assert len(sizes) == count and sizes.min() >= 1
    assert sizes.max() <= 3.1 * height * width / count


def test_even_cells_of_a_square_are_squares():
    assert even_cells(VisionLayout.grid(4, 4), 4).view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]  # fmt: skip


class Promise(Method):
    def __init__(self, plan: FeaturePooling, layer: int | None = None) -> None:
        self._plan, self.layer = plan, layer

    def plan(self, layout, region):
        return self._plan


@pytest.mark.parametrize("num_out,num_tokens", [(0, 64), (65, 64), (4, 63)])
def test_impossible_promises_are_refused(num_out, num_tokens):
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "single", 1)
    plan = FeaturePooling(num_out, num_tokens, lambda features: Assignment.of_kept(torch.arange(4), 64))
    with pytest.raises(ValueError, match=r"^patch: "), patched(model, Promise(plan)):
        model(**batch.inputs)


def test_late_plans_before_a_cut():
    """A cut behind a late plan ranks what came out of it; it can ask for no place, because none is known beforehand."""
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "left", 1)
    both = Compose(DivPrune(20), InnerLLMPruning(5, rows="last", ring=0, floor=0))
    with patched(model, both) as stats:
        model(**batch.inputs)
    assert stats.tokens_after_plc == [20, 20] and stats.tokens_after_ilp == [5, 5]
    with patched(model, DivPrune(20)) as first:
        model(**batch.inputs)
    assert all(set(k.tolist()) <= set(f.tolist()) for k, f in zip(stats.kept, first.kept, strict=True))
    with pytest.raises(ValueError, match="whole image"), patched(model, both, batch, regions_of(batch)):
        model(**batch.inputs)
