"""The oracle against the plain models: it must be right before it may judge anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crop.geometry.pooling import PoolPlan
from crop.methods import Method, Selection
from tests.support import cases
from tests.support.batches import make_sample, standard_batch
from tests.support.cases import families, get_model, get_oracle, greedy
from tests.support.decision import choose
from tests.support.families.entry import NUM_LAYERS
from tests.support.tiny_families import FAMILIES, THOROUGH, decoder_of, get_config

pytestmark = [pytest.mark.usefixtures("one_thread", "flash"), pytest.mark.fast]

EXACT = 3e-6


class Fixed(Method):
    """A method that says what it is told: cells of so many neighbours, a number to keep."""

    def __init__(self, num_keep: int, *, layer: int | None = 2, rows: str = "text", stride: int = 0) -> None:
        self.num_keep, self.layer, self.rows, self.stride = num_keep, layer, rows, stride

    def plan(self, layout: Any, region: Any) -> PoolPlan | None:
        if not self.stride:
            return None
        label = torch.arange(len(layout)) // self.stride
        edges = [*range(0, len(layout), self.stride), len(layout)]
        offsets, members = torch.tensor(edges).int(), torch.arange(len(layout)).int()
        kind = torch.zeros(int(label.max()) + 1, dtype=torch.uint8)
        return PoolPlan(members, offsets, offsets[:-1].clone(), kind, len(layout))

    def select(self, layout: Any, region: Any) -> Selection:
        return Selection(self.num_keep, torch.zeros(len(layout), dtype=torch.int8))


def decide(oracle: Any, sample: Any, method: Fixed) -> Any:
    return cases.decide(oracle, sample, method, [None] * len(sample.images))


@families(THOROUGH)
def test_greedy_is_generate(family):
    model, oracle, batch = get_model(family, "eager"), get_oracle(family), standard_batch(family, "left", 2)
    out = greedy(model, batch, 4)
    for row, sample in enumerate(batch.samples):
        steps = oracle.greedy(sample, oracle.keep_all(sample), 4)
        assert out.sequences[row, -4:].tolist() == steps.tokens
        for cached, logits in zip(out.logits, steps.logits, strict=True):
            torch.testing.assert_close(cached[row], logits, atol=EXACT, rtol=0)


def attend_only() -> list[str]:
    """Families without recurrent layers, from which no mask hides what has been added to their state."""
    kinds = {name: getattr(get_config(name).get_text_config(), "layer_types", None) or () for name in FAMILIES}
    return [name for name, found in kinds.items() if {*found} <= {"full_attention", "sliding_attention"}]


@pytest.mark.parametrize("layer", range(1, NUM_LAYERS))
@families(attend_only())
def test_removing_is_hiding(family, layer):
    """The model itself, on all tokens, with masks in which no later layer sees the dropped ones."""
    model, oracle = get_model(family, "eager"), get_oracle(family)
    sample = standard_batch(family, "single", 2).samples[0]
    decision = oracle.keep_all(sample)
    half = {image: tuple(range(0, len(span), 2)) for image, span in enumerate(sample.spans())}
    decision = decision.cut(layer, half)
    logits, places = oracle.forward(sample, decision)
    dropped = oracle.dropped(sample, decision, decision.kept)
    assert sorted([*places, *dropped]) == list(range(len(sample.ids))) and dropped

    def hide(index, kind):
        seen = oracle.visible(sample, torch.arange(len(sample.ids)), kind)
        if index >= layer:
            seen[:, dropped] = False
            seen.fill_diagonal_(True)  # a dropped row sees itself only to stay finite; nobody sees it
        added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
        return lambda _module, args, kwargs: (args, {**kwargs, "attention_mask": added})

    layers = decoder_of(family, model).layers
    handles = [
        module.register_forward_pre_hook(hide(index, kind), with_kwargs=True)
        for index, (module, kind) in enumerate(zip(layers, oracle.kinds, strict=True))
    ]
    try:
        hidden = model(**sample.inputs()).logits[0, places]
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(hidden, logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("rows", ["text", "last"])
@families(THOROUGH)
def test_scores_are_the_models_attention(family, rows):
    model, oracle, batch = get_model(family, "eager"), get_oracle(family), standard_batch(family, "single", 2)
    (sample,) = batch.samples
    decision = decide(oracle, sample, Fixed(7, layer=3, rows=rows))
    weights = model(**batch.inputs, output_attentions=True).attentions[2][0].double()
    weights = weights[:, sample.spans()[-1][-1] + 1 :] if rows == "text" else weights[:, -1:]
    for image, span in enumerate(sample.spans()):
        expected = weights[..., list(span)].mean((0, 1))
        found = torch.tensor(decision.scores[image], dtype=torch.float64)
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
        assert decision.kept_original(image) == sorted(expected.topk(7).indices.tolist())
        assert expected.max() > 2 * expected.median()  # far from uniform


@families(THOROUGH)
def test_pooling_in_cells_of_one_changes_nothing(family):
    oracle, sample = get_oracle(family), standard_batch(family, "single", 2).samples[0]
    decision = decide(oracle, sample, Fixed(0, layer=None, stride=1))
    plain = oracle.forward(sample, oracle.keep_all(sample))[0]
    assert torch.equal(oracle.forward(sample, decision)[0], plain)


def test_pooled_rows_are_means_with_the_leaders_position():
    oracle = get_oracle("qwen2_5_vl")
    sample = make_sample("qwen2_5_vl", [3, (40, 32), 4])
    rows = oracle.rows(sample, decide(oracle, sample, Fixed(0, layer=None, stride=3)))
    full, _ = oracle.embed(sample)
    pooled = oracle.pool(full, rows, "mean", [1.0] * len(full))
    first = sample.spans()[0][0]  # text rows before the image stand for themselves
    torch.testing.assert_close(pooled[first], full[first : first + 3].mean(0))
    torch.testing.assert_close(pooled[first + 6], full[first + 18 : first + 20].mean(0))
    assert torch.equal(pooled[:first], full[:first])
    assert torch.equal(pooled[first + 7 :], full[first + 20 :])
    assert [leader for _, leader in rows][first : first + 7] == [first + 3 * n for n in range(7)]


@families(THOROUGH)
def test_the_oracle_tells_decisions_apart(family):
    """Another layer, other rows, other tokens, a cell more, another cut: each moves the logits by far more than the
    tolerance of the comparisons."""
    oracle, sample = get_oracle(family), standard_batch(family, "single", 2).samples[0]
    decisions = [
        oracle.keep_all(sample),
        decide(oracle, sample, Fixed(7)),
        decide(oracle, sample, Fixed(8)),
        decide(oracle, sample, Fixed(7, layer=1)),
        decide(oracle, sample, Fixed(7, layer=3)),
        decide(oracle, sample, Fixed(7, rows="last")),
        decide(oracle, sample, Fixed(0, layer=None, stride=3)),
        decide(oracle, sample, Fixed(0, layer=None, stride=4)),
        decide(oracle, sample, Fixed(5, stride=3)),
    ]
    decisions.append(decisions[1].cut(3, {0: decisions[1].kept[0][:2]}))
    logits = [oracle.forward(sample, decision)[0][-1] for decision in decisions]
    for a in range(len(logits)):
        for b in range(a):
            assert (logits[a] - logits[b]).abs().max() > 1e-2, (a, b)


def test_several_cuts_are_kept_apart():
    """A cut changes its images from its layer on; other cuts and images stay."""
    cells = tuple(((n,), n) for n in range(4))
    decision = cases.Decision(cells=(cells, cells)).cut(3, {0: (1, 2)})
    assert decision.kept_at(2) == ((0, 1, 2, 3),) * 2 and decision.kept == ((1, 2), (0, 1, 2, 3))
    decision = decision.cut(1, {1: (0, 3)})
    assert [decision.kept_at(layer)[1] for layer in range(4)] == [(0, 1, 2, 3), (0, 3), (0, 3), (0, 3)]
    assert [decision.kept_at(layer)[0] for layer in range(4)] == [(0, 1, 2, 3)] * 3 + [(1, 2)]
    assert decision.counts() == [(4, 4, 2), (4, 4, 2)]


def test_near_ties_are_reported():
    four = [0, 0, 0, 0]
    assert choose((0.5, 0.2, 0.1, 0.4), 2, four, None) == ((0, 3), False)
    assert choose((0.5, 0.2, 0.1, 0.2 + 1e-7), 2, four, None) == ((0, 3), True)
    assert choose((0.5, 0.2, 0.1, 0.2), 2, four, None) == ((0, 1), False)  # exact: the index decides
    assert choose((0.5, 0.2, 0.9, 0.4), 2, [0, 1, -1, 0], None) == ((0, 1), False)
    assert choose((0.5, 0.2, 0.9, 0.4), 2, [0, 1, -1, 0], torch.tensor([0.5, 1.0, 1.0, 1.0])) == ((1, 3), False)
