"""The oracle against the plain models: it must be right before it may judge anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

EXACT = 3e-6


class Fixed:
    """A method that says what it is told: cells by hand, a priority and a number to keep."""

    def __init__(
        self,
        num_keep: int,
        *,
        layer: int | None = 2,
        rows: str = "text",
        stride: int = 0,
        priority: list[int] | None = None,
    ) -> None:
        self.num_keep, self.layer, self.rows, self.stride = num_keep, layer, rows, stride
        self.priority, self.pool_mode = priority, "mean"

    def plan(self, layout: Any, region: Any) -> Any:
        if not self.stride:
            return None
        cells = [list(range(n, min(n + self.stride, layout.size))) for n in range(0, layout.size, self.stride)]
        offsets = torch.tensor([0] + [len(c) for c in cells]).cumsum(0)
        members = torch.tensor([m for c in cells for m in c])
        return SimpleNamespace(members=members, offsets=offsets, leader=members[offsets[:-1]])

    def select(self, layout: Any, region: Any) -> Any:
        priority = torch.tensor(self.priority or [0] * layout.size, dtype=torch.int8)
        return SimpleNamespace(num_keep=self.num_keep, priority=priority, weight=None)


class Layout:
    def __init__(self, size: int) -> None:
        self.size = size

    def pool(self, plan: Any, position: torch.Tensor) -> Layout:
        return Layout(len(plan.leader))


def layouts(sample: Any) -> list[Layout]:
    return [Layout(h * w) for h, w in sample.grids]


def decide(oracle: Any, sample: Any, method: Fixed) -> Decision:
    return oracle.decide(sample, method, [None] * len(sample.grids), layouts(sample))


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("family", THOROUGH)
def test_nothing_dropped_is_the_plain_model(family, images):
    model, oracle = get_model(family, "eager"), get_oracle(family)
    batch = standard_batch(family, "left", images)
    plain = model(**batch.inputs).logits
    for row, sample in enumerate(batch.samples):
        logits, leaders, dropped, _ = oracle.forward(sample, oracle.keep_all(sample))
        assert leaders == list(range(len(sample.ids))) and dropped == []
        torch.testing.assert_close(plain[row, batch.offsets[row] :], logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("family", THOROUGH)
def test_greedy_is_generate(family):
    model, oracle = get_model(family, "eager"), get_oracle(family)
    batch = standard_batch(family, "left", 2)
    out = model.generate(
        **batch.inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for row, sample in enumerate(batch.samples):
        steps = oracle.greedy(sample, oracle.keep_all(sample), 4)
        assert out.sequences[row, batch.inputs["input_ids"].shape[1] :].tolist() == steps.tokens
        for cached, logits in zip(out.logits, steps.logits, strict=True):
            torch.testing.assert_close(cached[row], logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("layer", [1, 2, NUM_LAYERS - 1])
@pytest.mark.parametrize("family", THOROUGH)
def test_masking_is_slicing(family, layer):
    """Rows dropped from the sequence for good, by a hand-written loop over the layers."""
    oracle = get_oracle(family)
    sample = standard_batch(family, "single", 2).samples[0]
    decision = decide(oracle, sample, Fixed(7, layer=layer))
    logits, leaders, dropped, _ = oracle.forward(sample, decision)
    keep = [row for row in range(len(leaders)) if row not in dropped]
    assert len(dropped) == sum(h * w for h, w in sample.grids) - 14

    lm = oracle.language_model
    with torch.no_grad():
        hidden = oracle.embed(sample)[0][None]
        positions = oracle.positions(sample).unsqueeze(-2)
        for index, module in enumerate(lm.layers):
            if index == layer:
                hidden, positions = hidden[:, keep], positions[..., keep]
            size = hidden.shape[1]
            mask = torch.full((1, 1, size, size), -torch.inf).triu(1)
            rotary = lm.rotary_emb(hidden, positions)
            hidden = module(hidden, attention_mask=mask, position_embeddings=rotary)
        sliced = oracle.model.lm_head(lm.norm(hidden))[0]
    torch.testing.assert_close(sliced, logits[keep], atol=EXACT, rtol=0)


@pytest.mark.parametrize("rows", ["text", "last"])
@pytest.mark.parametrize("family", THOROUGH)
def test_scores_are_the_models_attention(family, rows):
    model, oracle = get_model(family, "eager"), get_oracle(family)
    batch = standard_batch(family, "single", 2)
    (sample,) = batch.samples
    decision = decide(oracle, sample, Fixed(7, layer=3, rows=rows))
    weights = model(**batch.inputs, output_attentions=True).attentions[2][0].double()
    last = sample.spans()[-1].stop
    weights = weights[:, last:] if rows == "text" else weights[:, -1:]
    for image, span in enumerate(sample.spans()):
        expected = weights[..., span.start : span.stop].mean((0, 1))
        found = torch.tensor(decision.scores[image], dtype=torch.float64)
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
        best = sorted(expected.topk(7).indices.tolist())
        assert decision.kept_original(image) == best
        assert expected.max() > 2 * expected.median()  # far from uniform


@pytest.mark.parametrize("family", THOROUGH)
def test_pooling_in_cells_of_one_changes_nothing(family):
    oracle = get_oracle(family)
    sample = standard_batch(family, "single", 2).samples[0]
    decision = decide(oracle, sample, Fixed(0, layer=None, stride=1))
    plain = oracle.forward(sample, oracle.keep_all(sample))[0]
    assert torch.equal(oracle.forward(sample, decision)[0], plain)


def test_pooled_rows_are_means_with_the_leaders_position():
    oracle = get_oracle("qwen2_5_vl")
    sample = make_sample("qwen2_5_vl", [3, (4, 5), 4])
    decision = decide(oracle, sample, Fixed(0, layer=None, stride=3))
    rows, _ = oracle._layout(sample, decision)
    full, _, _ = oracle.embed(sample)
    pooled = oracle._pooled(full, rows, "mean", [1.0] * len(full))
    start = sample.starts[0]
    first = start  # text rows before the image stand for themselves
    torch.testing.assert_close(pooled[first], full[start : start + 3].mean(0))
    torch.testing.assert_close(pooled[first + 6], full[start + 18 : start + 20].mean(0))
    assert torch.equal(pooled[:first], full[:first])
    assert torch.equal(pooled[first + 7 :], full[start + 20 :])
    assert [leader for _, leader in rows][first : first + 7] == [start + 3 * n for n in range(7)]


@pytest.mark.parametrize("family", THOROUGH)
def test_the_oracle_tells_decisions_apart(family):
    """Another layer, other rows, other tokens, a cell more: each moves the logits by far more than
    the tolerance of the comparisons."""
    oracle = get_oracle(family)
    sample = standard_batch(family, "single", 2).samples[0]
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
    logits = [oracle.forward(sample, decision)[0][-1] for decision in decisions]
    for a in range(len(logits)):
        for b in range(a):
            assert (logits[a] - logits[b]).abs().max() > 1e-2, (a, b)


def test_near_ties_are_reported():
    oracle = get_oracle("llava")
    choose = oracle._choose
    selection = SimpleNamespace(num_keep=2, priority=torch.zeros(4, dtype=torch.int8), weight=None)
    assert choose((0.5, 0.2, 0.1, 0.4), selection) == ((0, 3), False)
    assert choose((0.5, 0.2, 0.1, 0.2 + 1e-7), selection) == ((0, 3), True)
    assert choose((0.5, 0.2, 0.1, 0.2), selection) == ((0, 1), False)  # exact: the index decides
    selection.priority = torch.tensor([0, 1, -1, 0], dtype=torch.int8)
    assert choose((0.5, 0.2, 0.9, 0.4), selection) == ((0, 1), False)
    selection.weight = torch.tensor([0.5, 1.0, 1.0, 1.0])
    assert choose((0.5, 0.2, 0.9, 0.4), selection) == ((1, 3), False)
