"""Baselines: budget, order, determinism, the oracle; and each greedy rule against a loop that says it plainly."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize
from transformers import DynamicCache

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods import Method
from crop.methods.base import Assignment, FeaturePooling, Features
from crop.methods.baselines import (
    BASELINES,
    CDPruner,
    DivPrune,
    HiPrune,
    Scope,
    TokenMerging,
    VisionZip,
    VisPruner,
    auto_prune,
)
from crop.methods.baselines.controls import even_cells
from crop.methods.baselines.tower import ByTowerAttention
from tests.support.batches import standard_batch
from tests.support.cases import (
    ATOL,
    as_argument,
    assert_kept,
    assert_steps,
    decide,
    families,
    get_model,
    get_oracle,
    greedy,
    patched,
)
from tests.support.families.entry import NUM_LAYERS
from tests.support.masked_tower import class_token_attention
from tests.support.oracle import Oracle
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import FAMILIES, THOROUGH

names = pytest.mark.parametrize("name", list(BASELINES))


def make(name: str, keep: float | int) -> Method:
    return BASELINES[name](keep, NUM_LAYERS)


BY_FEATURES = [
    name
    for name in BASELINES
    if isinstance(make(name, 0.5).plan(VisionLayout.grid(4, 4), Region.whole()), FeaturePooling)
]


class SparseVLMOracle(Oracle):
    """Scores from the rows that look at the images most; the seeds change at the cut, by loops over the tokens."""

    method: Method

    def masses(self, sample, decision, cut, fresh):
        weights, places = self.attention(sample, decision, cut)
        weights, places, spans = weights.double(), places.tolist(), sample.spans()
        text = [row for row, place in enumerate(places) if place > spans[-1][-1]]
        vision = [row for row, place in enumerate(places) if any(place in span for span in spans)]
        looks = [float(weights[:, row, vision].sum()) for row in text]
        raters = [row for row, look in zip(text, looks, strict=True) if look >= sum(looks) / len(looks) * (1 - 1e-6)]
        mean = weights[:, raters].mean((0, 1)).tolist()
        return [tuple(mean[places.index(position)] for position in spans[number]) for number in fresh]

    def entering(self, layer, hidden, places, sample, decision):
        merged = hidden.clone()
        for number, span in enumerate(sample.spans()):
            score, kept = decision.scores[number], decision.kept[number]
            order = sorted(range(len(score)), key=lambda n: (-score[n], n))
            seeds = min(round(self.method.seeds * len(kept)), len(kept) - 1)
            taken = round(self.method.recycled * (len(score) - len(kept)))
            seeds, taken = order[len(kept) - seeds : len(kept)], order[len(kept) : len(kept) + taken]
            assert seeds and taken and set(seeds) <= set(kept)
            rows = hidden[list(span)]
            parties = {seed: [rows[seed]] for seed in seeds}
            for token in taken:
                nearest = max(seeds, key=lambda seed: cosine_similarity(rows[token], rows[seed], dim=0).item())
                parties[nearest].append(rows[token])
            for seed, members in parties.items():
                merged[span[seed]] = torch.stack(members).mean(0)
        return merged


class DartOracle(Oracle):
    """Tokens in the order in which pivots take turns; keys from the cache of the layer before the cut."""

    method: Method

    def masses(self, sample, decision, cut, fresh):
        attention, cache = self.decoder.layers[cut.layer - 1].self_attn, DynamicCache()
        given = as_argument(attention, cache)
        add = attention.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | given), with_kwargs=True)
        _, places = self.attention(sample, decision, cut)
        add.remove()
        keys = cache.layers[attention.layer_idx].keys[0].transpose(0, 1).flatten(1).double()
        places, length = places.tolist(), keys.abs().sum(1).tolist()
        spans = [sample.spans()[number] for number in fresh]
        text = [row for row, place in enumerate(places) if place > spans[-1][-1]]
        text = sorted(text, key=lambda row: -length[row])[: self.method.pivots]
        found = []
        for span in spans:
            rows = [places.index(place) for place in span]
            own = sorted(rows, key=lambda row: -length[row])[: self.method.pivots]
            score = {row: 1.0 for row in own}
            rest = [row for row in rows if row not in own]
            for pivot in (*own, *text):
                alike = cosine_similarity(keys[rest], keys[pivot], dim=1).tolist()
                for turn, which in enumerate(sorted(range(len(rest)), key=lambda n: alike[n])):
                    score[rest[which]] = max(score.get(rest[which], -len(rows)), -turn)
            found.append(tuple(float(score[row]) for row in rows))
        return found


ORACLES = {"sparsevlm": SparseVLMOracle, "dart": DartOracle}


def usable(family: str, name: str) -> None:
    if isinstance(make(name, 0.5), ByTowerAttention) and not FAMILIES[family].tower_attention:
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
@families((*THOROUGH, "paligemma"), fast=True)  # whose prompt sees itself
def test_equals_the_oracle(family, name):
    usable(family, name)
    model, oracle, batch = get_model(family), get_oracle(family), standard_batch(family, "left", 2)
    method = make(name, 0.3)
    if name in ORACLES:
        oracle = ORACLES[name](oracle.model, oracle.family)
        oracle.method = method
    with patched(model, method, batch) as stats:
        out = greedy(model, batch, 3)
    whole = [[Region.whole()] * len(sample.images) for sample in batch.samples]
    decisions = [decide(oracle, sample, method, where) for sample, where in zip(batch.samples, whole, strict=True)]
    assert_kept(stats, decisions)
    assert stats.tokens_after_ilp == [round(0.3 * len(span)) for sample in batch.samples for span in sample.spans()]
    assert_steps(out, [oracle.greedy(s, d, 3) for s, d in zip(batch.samples, decisions, strict=True)])


@names
@families(THOROUGH)
def test_batched_is_single_and_repeatable(family, name):
    usable(family, name)
    model, method = get_model(family), make(name, 0.15)
    batch = standard_batch(family, "right", 2)
    with patched(model, method, batch) as stats:
        together = model(**batch.inputs).logits
        kept = iter(stats.kept)
        again = model(**batch.inputs).logits
    assert torch.equal(together, again)
    for row, sample in enumerate(batch.samples):
        single = batch.single(row)
        with patched(model, method, single) as alone:
            logits = model(**single.inputs).logits[0]
        assert (together[row, len(sample.ids) - 1] - logits[-1]).abs().max() <= ATOL
        assert all(torch.equal(mine, next(kept)) for mine in alone.kept)


@names
@families(THOROUGH)
def test_keep_all_is_bit_identical(family, name):
    usable(family, name)
    model, batch = get_model(family), standard_batch(family, "left", 1)
    plain = model(**batch.inputs).logits
    with patched(model, make(name, 1.0), batch):
        assert torch.equal(model(**batch.inputs).logits, plain)


def test_pooling_by_features_follows_beams_and_many_images():
    """generate() repeats samples after the tower ran; two images a sample."""
    model = get_model("llava")
    # Older versions repeat the images of a prompt one by one, in another order than its tokens: wrong without a patch, too.
    images = 2 if "mm_encoder_outputs" in inspect.signature(model.forward).parameters else 1
    batch = standard_batch("llava", "left", images)
    with patched(model, VisionZip(0.2), batch) as stats:
        greedy(model, batch, 2, num_beams=2)
    kept = stats.kept
    with patched(model, VisionZip(0.2), batch) as stats:
        model(**batch.inputs)
    assert len(kept) == 4 * images
    for beam in range(len(kept)):
        sample, image = beam // (2 * images), beam % images
        assert torch.equal(kept[beam], stats.kept[images * sample + image])


TOWERS = {
    "qwen2_5_vl": "needs a tower of clip_vision_model",
    "gemma3": "vision_feature_layer must be one layer for this method, got None",
    "llava_next": "a row of it for every image, got 'llava_next', whose images are cut into tiles",
    "llava_onevision": "a row of it for every image, got 'llava_onevision'",
    "aya_vision": "a row of it for every image, got 'aya_vision'",
}


@pytest.mark.parametrize("family", TOWERS)
def test_towers_without_fitting_tokens_are_refused(family):
    """When the block is entered, before anything is changed."""
    model = get_model(family)
    before = snapshot(model)
    with pytest.raises(ValueError, match=TOWERS[family]):
        patched(model, VisionZip(0.2), standard_batch(family, "single", 1)).__enter__()
    assert_unchanged(before, model)


def test_what_is_observed_is_the_towers_attention():
    model, oracle, batch = get_model("llava"), get_oracle("llava"), standard_batch("llava", "single", 1)
    seen = []

    class Probe(VisionZip):
        def decide(self, features, count):
            seen.append(features.observed)
            return super().decide(features, count)

    with patched(model, Probe(0.5), batch):
        model(**batch.inputs)
    wanted = class_token_attention(
        oracle.model.model.vision_tower, batch.samples[0].images[0].arguments["pixel_values"]
    )
    torch.testing.assert_close(seen[0], wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 7, 20, 39])
@pytest.mark.parametrize("name", BY_FEATURES)
def test_cells_are_sound(name, count):
    given = features()
    if name == "hiprune":  # two layers of the tower
        given = replace(given, observed=torch.stack([given.observed, given.observed.flip(0)], 1))
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
    assert DivPrune(12).decide(features(), 12).leader.tolist() == sorted(chosen)


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
    assert CDPruner(6).decide(given, 6).leader.tolist() == sorted(chosen)


def test_token_merging_keeps_averages_and_joins_copies():
    given = features(20, 8)
    given.tokens[1::2] = given.tokens[0::2] * 2  # the same direction: cosine 1
    found = TokenMerging(10).decide(given, 10)
    assert found.cell.tolist() == [n // 2 for n in range(20)]
    assert sorted(TokenMerging(3).decide(given, 3).cell.unique().tolist()) == [0, 1, 2]  # several rounds, none lost


def test_visionzip_keeps_what_is_seen_and_merges_the_rest():
    given = features()
    found = VisionZip(20, contextual=0.25).decide(given, 20)
    order = given.observed.argsort(descending=True).tolist()
    dominant, rest = order[:15], sorted(order[15:])
    targets = rest[:: len(rest) // 5][:5]
    assert found.leader.tolist() == sorted(dominant + targets)
    for token in rest:
        near = max(targets, key=lambda t: cosine_similarity(given.tokens[token], given.tokens[t], dim=0).item())
        assert found.leader[found.cell[token]] == (token if token in targets else near)


def test_scope_covers_greedily():
    given = features()
    alike = cosine_similarity(given.tokens[:, None], given.tokens[None], dim=-1).double()
    covered, chosen = torch.zeros(40, dtype=torch.float64), []
    while len(chosen) < 9:
        gains = [sum(max(alike[j, i] - covered[j], 0) for j in range(40)) * given.observed[i] for i in range(40)]
        best = max((i for i in range(40) if i not in chosen), key=lambda i: gains[i])
        chosen.append(best)
        covered = torch.maximum(covered, alike[best])
    assert Scope(9).decide(given, 9).leader.tolist() == sorted(chosen)


def test_vispruner_removes_duplicates():
    given = features()
    kept = VisPruner(20).decide(given, 20).leader.tolist()
    order = given.observed.argsort(descending=True).tolist()
    assert set(order[:10]) <= set(kept)
    rest = sorted(order[10:])  # 30 in the first round, 22 in the second, 14 in the third, of which four leave
    for leave in (8, 8, 4):
        alike = {
            a: max(cosine_similarity(given.tokens[a], given.tokens[b], dim=0).item() for b in rest[1::2])
            for a in rest[::2]
        }
        gone = sorted(alike, key=lambda token: -alike[token])[:leave]
        rest = [token for token in rest if token not in gone]
    assert kept == sorted(order[:10] + rest)


def test_hiprune_keeps_anchors_their_neighbours_and_registers():
    layout, generator = VisionLayout.grid(6, 8), torch.Generator().manual_seed(1)
    given = Features(torch.randn(48, 4), torch.randn(3, 4), torch.rand(48, 2, generator=generator))
    plan = HiPrune(20, anchored=0.5).plan(layout, Region.whole())
    middle, last = given.observed.T.tolist()
    anchors = sorted(range(48), key=lambda n: -middle[n])[:2]
    kept = set(anchors)
    for anchor in anchors:
        row, col = divmod(anchor, 8)
        kept |= {8 * r + c for r, c in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1))
                 if 0 <= r < 6 and 0 <= c < 8}  # fmt: skip
    rest = sorted((n for n in range(48) if n not in kept), key=lambda n: -last[n])
    assert plan.decide(given).leader.tolist() == sorted([*kept, *rest[: 20 - len(kept)]])
    assert HiPrune().depths(22) == (8, 22)  # CLIP of LLaVA-1.5: the ninth layer and the last but one


def test_auto_prune_falls_along_a_logistic_curve():
    shares = [stage.keep for stage in auto_prune(0.1, range(4, 14)).stages]
    drops = [a - b for a, b in zip([1, *shares], shares, strict=False)]
    assert shares[-1] == pytest.approx(0.1) and min(drops) > 0
    assert 3 <= drops.index(max(drops)) <= 6 and max(drops) > 2 * max(drops[0], drops[-1])


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
    with pytest.raises(ValueError, match=r"^patch: "), patched(model, Promise(plan), batch):
        model(**batch.inputs)
