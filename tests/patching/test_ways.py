"""The table of ways of use: each equal to the unpatched model where all is kept, right at a real cut, or refused by name."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from crop.methods import Compose, InnerLLMPruning, PreLLMCompression
from tests.support.batches import Batch, standard_batch
from tests.support.cases import (
    ATOL,
    METHODS,
    Expected,
    decide,
    expected,
    patched,
    regions_for,
    regions_of,
)
from tests.support.oracle import Oracle
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import FAMILIES, build_model
from tests.support.uses import LABELS, Row, Trained
from tests.support.ways import SIX, WAYS, Way

pytestmark = pytest.mark.usefixtures("one_thread")

KEEP_ALL = Compose(PreLLMCompression(1, 1, 1), InnerLLMPruning(keep=1.0))
CUT = METHODS["compose"]
HOOKS_INSIDE = "__call__" in vars(GradientCheckpointingLayer)  # of the checkpoint, in older versions of transformers
SLOW = ("compiled", "Trainer", "checkpointing")


def cases() -> list[Any]:
    """The fast ones: one family."""
    fast = {name for name in WAYS if name not in SLOW}
    return [
        pytest.param(name, family, marks=pytest.mark.fast if family == SIX[0] and name in fast else ())
        for name in WAYS
        for family in SIX
    ]


@pytest.mark.parametrize("name,family", cases())
def test_way(name: str, family: str) -> None:
    way = WAYS[name]
    batch = standard_batch(family, "single" if way.single else "left", 1)
    if name == "checkpointing" and HOOKS_INSIDE:
        pytest.skip("refused with this version of transformers: test_training.py")
    if family in way.unable:
        pytest.skip(f"{way.unable[family]}: transformers fails without a block, too")

    def use(method: Any) -> Any:
        model = way.make(family)
        if method is None:
            return way.use(model, batch, contextlib.nullcontext)
        return way.use(model, batch, lambda it: patched(it, method, batch, regions_of(batch), cache=way.cache))

    if way.refusal(family):
        assert_refused(way, family, batch)
        return
    if way.exact is not None:
        assert_same(use(KEEP_ALL), use(None), way.exact)
    found = use(CUT)
    if isinstance(found, Trained):
        assert_trained(found, family, batch)
        return
    for row in found:
        expect = expected(batch, "compose")[row.sample]
        wanted = logits_of(expect, row, way)
        if row.logits is None:
            score = wanted.log_softmax(-1).gather(1, torch.tensor(row.tokens)[:, None]).mean()
            assert abs(float(score) - row.score) < ATOL
            continue
        torch.testing.assert_close(row.logits, wanted, atol=ATOL, rtol=0)
        if expect.sample.images and not row.said:  # else the comparison shows nothing
            assert (row.logits[0] - expect.plain[-1]).abs().max() > 1e-3


def assert_refused(way: Way, family: str, batch: Batch) -> None:
    """By name, and the model is as it was."""
    model = way.make(family)
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError), match=way.refusal(family)):
        way.use(model, batch, lambda it: patched(it, CUT, batch, regions_of(batch), cache=way.cache))
    assert_unchanged(before, model)


def assert_same(kept: Any, plain: Any, exact: bool) -> None:
    """What keeps everything, and the model alone."""
    close = dict(atol=0 if exact else ATOL, rtol=0)
    if isinstance(plain, Trained):
        assert kept.gradients.keys() == plain.gradients.keys()
        assert abs(kept.loss - plain.loss) <= close["atol"]
        for name, gradient in kept.gradients.items():
            torch.testing.assert_close(gradient, plain.gradients[name], **close)
        return
    for one, other in zip(kept, plain, strict=True):
        assert (one.tokens, one.score) == (other.tokens, other.score)
        if one.logits is not None:
            torch.testing.assert_close(one.logits, other.logits, **close)


def logits_of(expect: Expected, row: Row, way: Way) -> Tensor:
    """What the oracle says behind every token of a row."""
    sample, found = expect.sample, []
    for number in range(len(row.tokens)):
        longer, decision = sample.extended([*row.said, *row.tokens[:number]]), expect.decision
        if way.again:
            decision = decide(expect.oracle, longer, CUT, regions_for(row.sample, sample))
        prompt = len(sample.ids) if way.cache == "uniform" else None
        found.append(expect.oracle.forward(longer, decision, prompt)[0][-1])
    return torch.stack(found)


def assert_trained(found: Trained, family: str, batch: Batch) -> None:
    """Loss and gradients are those of pooling and cutting written out."""
    reference, losses = Oracle(build_model(family, "eager").requires_grad_(True), FAMILIES[family], grad=True), []
    for expect in expected(batch, "compose"):
        logits = reference.forward(expect.sample, expect.decision)[0][-LABELS - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(expect.sample.ids[-LABELS:])))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert abs(found.loss - float(loss)) < ATOL
    for name, parameter in reference.model.named_parameters():
        if parameter.grad is not None:
            size = max(1.0, float(parameter.grad.abs().max()))
            torch.testing.assert_close(found.gradients[name], parameter.grad, atol=2e-5 * size, rtol=0)
