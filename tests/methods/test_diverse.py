"""DiverseCompression: the region first, the rest by a plain loop over distances; every family against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from crop import ops
from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods import Compose, DiverseCompression, InnerLLMPruning, by_name, diverse
from crop.methods.base import Assignment, Features
from crop.methods.diverse import ROUNDS, spread
from tests.support.batches import standard_batch
from tests.support.cases import (
    ATOL,
    assert_kept,
    assert_steps,
    decide,
    families,
    get_model,
    get_oracle,
    greedy,
    patched,
    regions_for,
    regions_of,
)
from tests.support.tiny_families import THOROUGH

GRID = VisionLayout.grid(6, 8)
SMALL, LARGE = Region.box(0.25, 0.1, 0.6, 0.5), Region.box(0.0, 0.0, 1.0, 0.8)


def tokens(dim: int = 12, seed: int = 0) -> torch.Tensor:
    """Random features of the grid, a third of them near copies of others."""
    found = torch.randn(48, dim, generator=torch.Generator().manual_seed(seed))
    found[24::3] = found[:8] + 0.01
    return found


def decided(method: DiverseCompression, region: Region, rows: torch.Tensor) -> Assignment:
    plan = method.plan(GRID, region)
    return plan.decide(Features(rows, rows[:2]), *plan.given)


def plainly(rows: torch.Tensor, members: list[int], others: list[int], count: int) -> list[int]:
    """Greedy choice, a distance at a time."""
    apart = 1 - cosine_similarity(rows[:, None].double(), rows[None].double(), dim=-1)
    middle = torch.nn.functional.normalize(rows[members].double(), dim=-1).mean(0, keepdim=True)
    from_middle = 1 - cosine_similarity(rows.double(), middle)
    chosen: list[int] = []
    for _ in range(count):
        known = others + chosen
        left = [n for n in members if n not in chosen]
        chosen.append(max(left, key=lambda n: min(apart[n, k] for k in known) if known else from_middle[n]))
    return chosen


@pytest.mark.parametrize("region,keep", [(SMALL, 12), (SMALL, 30), (SMALL, 5), (LARGE, 12), (Region.whole(), 9)])
def test_equals_a_plain_loop(region, keep):
    rows, found = tokens(), decided(DiverseCompression(keep), region, tokens())
    inside = GRID.inside(region).tolist()
    sides = [[n for n in range(48) if inside[n]], [n for n in range(48) if not inside[n]]]
    first = min(len(sides[0]), int(0.75 * keep)) if sides[1] else keep
    chosen = sides[0] if first == len(sides[0]) else plainly(rows, sides[0], [], first)
    chosen = [*chosen, *plainly(rows, sides[1], chosen, keep - first)]
    assert found.leader.tolist() == sorted(chosen)
    alike = cosine_similarity(rows[:, None].double(), rows[None].double(), dim=-1)
    for side in sides:
        leaders = [n for n in side if n in chosen]
        for n in side:
            nearest = n if n in chosen else max(leaders, key=lambda leader: alike[n, leader])
            assert found.leader[found.cell[n]] == nearest


def test_many_are_chosen_in_few_rounds():
    rows = torch.nn.functional.normalize(torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    count = 3 * ROUNDS - 1
    chosen, nearest = spread(rows, rows[:1], count)
    assert len(set(chosen.tolist())) == count
    near = (rows @ rows[:1].T).amax(1)
    assert chosen[:3].tolist() == near.argsort()[:3].tolist()  # a round of three, which do not know of each other
    near = torch.maximum(near, (rows @ rows[chosen[:3]].T).amax(1))
    near[chosen[:3]] = torch.inf
    assert chosen[3:6].tolist() == near.argsort()[:3].tolist()
    assert nearest.tolist() == (rows @ rows[chosen].T).argmax(1).tolist()


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("count", [5, 2 * ROUNDS + 7])
def test_without_all_pairs_it_chooses_the_same(others, count, monkeypatch):
    """Of very many tokens no matrix of all pairs is made. Whole numbers, so that no product rounds."""
    rows = torch.randint(-9, 10, (300, 7), generator=torch.Generator().manual_seed(count)).float()
    wanted = spread(rows, rows[:others], count)
    monkeypatch.setattr(diverse, "PAIRS", 299)
    monkeypatch.setattr(ops, "spread", None)
    for found, expected in zip(spread(rows, rows[:others], count), wanted, strict=True):
        assert torch.equal(found, expected)


def test_ties_go_to_the_smaller_index():
    rows = torch.eye(4).repeat(12, 1)  # token n equals n + 4, n + 8, ...
    assert decided(DiverseCompression(4), Region.whole(), rows).leader.tolist() == [0, 1, 2, 3]
    chosen, _ = spread(rows, rows[2:3], 3)
    assert chosen.tolist() == [0, 1, 3]


def test_what_is_left_over_goes_to_the_other_side():
    found = decided(DiverseCompression(40), LARGE, tokens())  # the rest has 8 tokens, a quarter of the budget is 10
    outside = ~GRID.inside(LARGE)
    assert int(outside.sum()) == 8 and outside[found.leader].sum() == 8
    found = decided(DiverseCompression(10, share=1), LARGE, tokens())
    assert not outside[found.leader].any() and (found.cell[outside] == -1).all()
    assert (found.cell[~outside] >= 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_features_without_a_direction(value):
    rows = tokens()
    rows[5] = value
    for region in (SMALL, LARGE, Region.whole()):
        for keep in (1, 7, 47):
            found = decided(DiverseCompression(keep), region, rows)
            assert len(found.leader) == keep and (found.leader.diff() > 0).all()
            assert found.cell[found.leader].tolist() == list(range(keep))


def test_arguments():
    assert DiverseCompression(48).plan(GRID, SMALL) is None and DiverseCompression(1.0).plan(GRID, SMALL) is None
    assert by_name("diverse", 0.25) == DiverseCompression(0.25)
    for given, error, text in (
        (dict(keep=0.0), ValueError, "keep as a fraction must be in"),
        (dict(share=0.0), ValueError, r"share must be in \(0, 1\], got 0"),
        (dict(share=1.5), ValueError, r"share must be in \(0, 1\], got 1.5"),
        (dict(share=True), TypeError, "share must be a number"),
        (dict(share="half"), TypeError, "share must be a number"),
    ):
        with pytest.raises(error, match=f"^DiverseCompression: {text}"):
            DiverseCompression(**given)
    with pytest.raises(ValueError, match="keep as a token count must be <= num_original=48, got 49"):
        DiverseCompression(49).plan(GRID, SMALL)


@families()
def test_before_a_cut(family):
    """As the oracle; a cut at the family's own layer ranks what came out of it, the region first."""
    model, oracle, batch = get_model(family), get_oracle(family), standard_batch(family, "left", 1)
    both = Compose(DiverseCompression(0.5), InnerLLMPruning(0.25, ring=0))
    with patched(model, both, batch, regions_of(batch)) as stats:
        out = greedy(model, batch, 2)
    decisions = [decide(oracle, sample, both, regions_for(row, sample)) for row, sample in enumerate(batch.samples)]
    assert_kept(stats, decisions)
    assert_steps(out, [oracle.greedy(s, d, 2) for s, d in zip(batch.samples, decisions, strict=True)])
    with patched(model, DiverseCompression(0.5), batch, regions_of(batch)) as first:
        model(**batch.inputs)
    for kept, before, left in zip(stats.kept, first.kept, stats.tokens_after_plc, strict=True):
        assert set(kept.tolist()) < set(before.tolist()) and len(before) == left


@families(["qwen2_5_vl", "llava_next", "llava"])
def test_behind_a_pruned_encoder(family):
    """As the oracle: it chooses among what was encoded."""
    model, oracle, batch = get_model(family), get_oracle(family), standard_batch(family, "left", 1)
    method, corner = by_name("diverse", 0.1, encoder=True), Region.box(0.0, 0.0, 0.05, 0.05)
    with patched(model, method, batch, [corner for sample in batch.samples for _ in sample.images]) as stats:
        out = greedy(model, batch, 2)
    decisions = [decide(oracle, sample, method, [corner] * len(sample.images)) for sample in batch.samples]
    assert_kept(stats, decisions)
    assert_steps(out, [oracle.greedy(s, d, 2) for s, d in zip(batch.samples, decisions, strict=True)])
    for left, encoded, before in zip(stats.tokens_after_plc, stats.tokens_encoded, stats.tokens_before, strict=True):
        assert left == round(0.1 * before) < encoded < before


@families(THOROUGH)
def test_batched_is_single_and_keep_all_changes_nothing(family):
    model, batch = get_model(family), standard_batch(family, "right", 2)
    plain = model(**batch.inputs).logits
    with patched(model, DiverseCompression(1.0), batch, regions_of(batch)):
        assert torch.equal(model(**batch.inputs).logits, plain)
    with patched(model, DiverseCompression(0.2), batch, regions_of(batch)) as stats:
        together = model(**batch.inputs).logits
    kept = iter(stats.kept)
    for row, sample in enumerate(batch.samples):
        single = batch.single(row)
        with patched(model, DiverseCompression(0.2), single, regions_for(row, sample)) as alone:
            logits = model(**single.inputs).logits[0]
        assert (together[row, len(sample.ids) - 1] - logits[-1]).abs().max() <= ATOL
        assert all(torch.equal(mine, next(kept)) for mine in alone.kept)
