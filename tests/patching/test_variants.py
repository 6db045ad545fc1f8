"""Methods of every kind, the package's own and any a user may write; and wrong expectations, which are noticed."""

from __future__ import annotations

import pytest
import torch

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, Method, PreLLMCompression, Selection
from tests.support.batches import standard_batch
from tests.support.cases import (
    ATOL,
    METHODS,
    assert_kept,
    assert_steps,
    decide,
    expected,
    families,
    get_model,
    get_oracle,
    greedy,
    patched,
    regions_for,
    regions_of,
)
from tests.support.oracle import Oracle
from tests.support.tiny_families import THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
VARIANTS = {
    "layer_1": InnerLLMPruning(keep=0.2, layer=1),
    "last_layer": InnerLLMPruning(keep=0.2, layer=3),
    "rows_last": InnerLLMPruning(keep=0.2, rows="last"),
    "fastv": InnerLLMPruning(keep=9, rows="last"),
    "one_token": InnerLLMPruning(keep=1),
    "max_pool": PreLLMCompression(1, 2, 4, ring=1, mode="max"),
    "distinct_pool": PreLLMCompression(1, 2, 4, ring=1, mode="distinct"),
    "plc_budget": PreLLMCompression(keep=0.3),
    "plc_tiny": PreLLMCompression(keep=2),
    "compose_strict": Compose(PreLLMCompression(2, 2, 3), InnerLLMPruning(mode="strict", layer=3)),
    "compose_max": Compose(PreLLMCompression(1, 3, 3, mode="max"), InnerLLMPruning(keep=0.1, rows="last")),
}


def assert_is_the_oracle(family, method):
    """Kept tokens and three generated tokens of a padded batch; the decisions."""
    model, batch = get_model(family), standard_batch(family, "left", 2)
    with patched(model, method, batch, regions_of(batch)) as stats:
        out = greedy(model, batch, 3)
    oracle = get_oracle(family)
    decisions = [decide(oracle, sample, method, regions_for(row, sample)) for row, sample in enumerate(batch.samples)]
    assert_kept(stats, decisions)
    assert_steps(out, [oracle.greedy(s, d, 3) for s, d in zip(batch.samples, decisions, strict=True)])
    return decisions


@matrix("variant", list(VARIANTS))
@families(THOROUGH, fast=True)
def test_variants(family, variant):
    assert_is_the_oracle(family, VARIANTS[variant])


class Anything(Method):
    """A method without geometry: random cells (some tokens in none), priorities and weights."""

    def __init__(self, seed: int, *, layer: int, rows: str, pool_mode: str) -> None:
        self.seed, self.layer, self.rows, self.pool_mode = seed, layer, rows, pool_mode

    def draw(self, region: Region, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(100 * round(1e4 * region.area) + 10 * self.seed + salt)

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan:
        label = torch.randint(-len(layout) // 6, len(layout) // 2, (len(layout),), generator=self.draw(region, 0))
        return PoolPlan.from_labels(label, layout.row, layout.col, torch.zeros(len(layout), dtype=torch.uint8))

    def select(self, layout: VisionLayout, region: Region) -> Selection:
        priority = torch.randint(-1, 3, (len(layout),), generator=self.draw(region, 1), dtype=torch.int8)
        weight = torch.rand(len(layout), generator=self.draw(region, 2)) + 0.1
        return Selection(int((priority >= 0).sum()) // 2, priority, weight)


@matrix("seed", range(4))
@families(THOROUGH)
def test_any_method(family, seed):
    """What a method may say is not limited to what the package's own methods say."""
    method = Anything(seed, layer=seed % 3 + 1, rows=("text", "last")[seed % 2], pool_mode=("mean", "max")[seed // 2])
    decisions = assert_is_the_oracle(family, method)
    span = standard_batch(family, "left", 2).samples[0].spans()[0]
    assert decisions[0].counts()[0][0] < len(span)  # some are in no cell


@matrix("wrong", ["region", "order", "layer", "rows", "image"])
@families(THOROUGH)
def test_a_wrong_expectation_is_noticed(family, wrong):
    """The comparison can fail: the oracle gets another region, layer, rows, or swapped regions."""
    model, oracle, batch = get_model(family), get_oracle(family), standard_batch(family, "single", 2)
    (sample,) = batch.samples
    method = InnerLLMPruning(keep=0.25, layer=2)
    with patched(model, method, batch, regions_of(batch)):
        logits = model(**batch.inputs).logits[0, -1]
    regions, told = regions_for(0, sample), method
    if wrong == "region":
        regions[0] = Region.box(0.6, 0.6, 0.9, 0.9)
    elif wrong == "order":
        regions = regions[::-1]
    elif wrong == "layer":
        told = InnerLLMPruning(keep=0.25, layer=3)
    elif wrong == "rows":
        told = InnerLLMPruning(keep=0.25, rows="last")
    decision = decide(oracle, sample, told, regions)
    if wrong == "image":  # the second image's choice made from the first one's scores
        first = tuple(k for k in decision.kept[0] if k < len(decision.cells[1]))
        decision = decision.cut(told.layer, {1: first})
    assert (oracle.forward(sample, decision)[0][-1] - logits).abs().max() > 1e-3


@families(THOROUGH)
def test_positions_are_original(family):
    """Renumbering the kept tokens would be seen: the oracle with closed gaps differs."""
    model, batch = get_model(family), standard_batch(family, "single", 1)
    (expect,) = expected(standard_batch(family, "single", 1), "plc")
    with patched(model, METHODS["plc"], batch, regions_of(batch)):
        logits = model(**batch.inputs).logits[0, -1]

    class Closed(Oracle):
        def numbers(self, sample, places):
            return torch.arange(len(places)).expand(super().numbers(sample, places).shape)

    renumbered = Closed(expect.oracle.model, expect.oracle.family).forward(expect.sample, expect.decision)[0][-1]
    assert (renumbered - logits).abs().max() > 1e-3
    torch.testing.assert_close(logits, expect.steps.logits[0], atol=ATOL, rtol=0)
