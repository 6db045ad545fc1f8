"""Gradients through a patched model are those of pooling and masking written out."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from crop.geometry.layout import _grid
from crop.methods import PreLLMCompression
from tests.support.batches import standard_batch
from tests.support.cases import METHODS, decide, families, get_oracle, patched, regions_for, regions_of
from tests.support.oracle import Oracle
from tests.support.tiny_families import FAMILIES, THOROUGH, build_model

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

HOOKS_INSIDE = "__call__" in vars(GradientCheckpointingLayer)  # of the checkpoint, in older versions of transformers
TRAINED = {
    **{name: METHODS[name] for name in ("plc", "budget", "compose")},
    "max": PreLLMCompression(2, 2, 4, mode="max"),
}
LABELS = 4  # the last tokens of a prompt


def trainable(family, attention):
    return build_model(family, attention).requires_grad_(True)


def labelled(batch):
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    for row, sample in enumerate(batch.samples):
        end = batch.offsets[row] + len(sample.ids)
        labels[row, end - LABELS : end] = torch.tensor(sample.ids[-LABELS:])
    return {**batch.inputs, "labels": labels}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(got, wanted):
    assert got.keys() == wanted.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], atol=2e-5 * max(1.0, float(wanted[name].abs().max())), rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(TRAINED))
@families(THOROUGH)
def test_gradients_are_the_oracles(family, name, checkpointing):
    if checkpointing and (HOOKS_INSIDE or name == "max"):
        return  # refused, see below; or covered by the others
    method, batch = TRAINED[name], standard_batch(family, "left", 1)
    reference, losses = Oracle(trainable(family, "eager"), FAMILIES[family], grad=True), []
    for row, sample in enumerate(batch.samples):
        decision = decide(get_oracle(family), sample, method, regions_for(row, sample))
        logits = reference.forward(sample, decision)[0][-LABELS - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sample.ids[-LABELS:])))
    wanted = torch.stack(losses).mean()
    wanted.backward()

    model = trainable(family, "sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    with patched(model, method, batch, regions_of(batch)):
        loss = model(**labelled(batch)).loss
    loss.backward()  # also after the block
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)
    assert_close(gradients(model), gradients(reference.model))


@families(THOROUGH)
def test_training_after_inference(family):
    """Layouts that are remembered from inference mode can be trained with."""
    _grid.cache_clear()
    model, batch, method = trainable(family, "sdpa"), standard_batch(family, "left", 1), TRAINED["compose"]
    with torch.inference_mode(), patched(model, method, batch, regions_of(batch)):
        model(**batch.inputs)
    with patched(model, method, batch, regions_of(batch)):
        model(**labelled(batch)).loss.backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values()) and gradients(model)


@families(THOROUGH)
def test_two_losses_at_once(family):
    """Two forwards, then one backward, as preference training does; checkpointed is as kept in memory."""
    if HOOKS_INSIDE:
        return
    batches, found = (standard_batch(family, "left", 1), standard_batch(family, "single", 1)), []
    for checkpointing in (False, True):
        model = trainable(family, "sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses = []
        for batch in batches:
            with patched(model, METHODS["compose"], batch, regions_of(batch)):
                losses.append(model(**labelled(batch)).loss)
        (losses[0] - losses[1]).backward()
        found.append(gradients(model))
    assert_close(*found)


def test_checkpointing_where_hooks_run_again():
    """Older versions of transformers run hooks in the backward pass: refused, before the model runs."""
    if not HOOKS_INSIDE:
        return
    model, batch = build_model("llava").train(), standard_batch("llava", "single", 1)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing must be off .* transformers 5"):
        with patched(model, METHODS["budget"], batch, regions_of(batch)):
            model(**batch.inputs)
