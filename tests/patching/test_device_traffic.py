"""What a prefill on a GPU copies between host and device, and whether it waits for the device; on a pretended one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from crop.methods import by_name
from crop.patching import planner
from tests.support.batches import standard_batch
from tests.support.cases import families, get_model, patched, regions_of
from tests.support.pretend_cuda import Log, OnDevice, move, pretended


def prefill(family: str, size: str, name: str) -> tuple[Log, Log, Tensor, Tensor]:
    """Log of an unpatched and of a patched prefill, the latter's logits, and those of the same on the CPU."""
    model, batch = copy.deepcopy(get_model(family)), standard_batch(family, size, 1)
    asked = dict(use_cache=True, logits_to_keep=1)
    with torch.no_grad(), patched(model, by_name(name, 0.25), batch, regions_of(batch)):
        wanted = model(**batch.inputs, **asked).logits
    plain, log = Log(), Log()
    move(model, log)
    inputs = {key: OnDevice(value, log) if isinstance(value, Tensor) else value for key, value in batch.inputs.items()}
    with pretended(log):
        model(**inputs, **asked)
        plain += log
        log.clear()
        with patched(model, by_name(name, 0.25), batch, regions_of(batch)):
            logits = model(**inputs, **asked).logits
    return plain, log, logits.inner, wanted


@pytest.mark.parametrize("name", ["ilp", "plc", "crop"])
@pytest.mark.parametrize("size", ["single", "left"])
@families(["llava"], fast=True)
def test_one_copy_each_way_and_no_waiting(family, size, name):
    """Token ids and mask come to the host once, the plan goes to the device once, from pinned memory."""
    plain, log, logits, wanted = prefill(family, size, name)
    assert not plain.ours("kernel", "wait", "to host", "to device", "to device, pinned")
    assert torch.equal(logits, wanted)  # the pretended device computes as the CPU does
    assert log.ours("wait", "to device") == []
    assert len(log.ours("to host")) == len(log.ours("to device, pinned")) == 1
    model = [event for event in log if event.where == "model"]
    for kind in ("wait", "to host", "to device"):  # what we do must not make the model wait, either
        assert sum(e.kind == kind for e in model) <= sum(e.kind == kind for e in plain)


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_planning_while_the_encoder_runs(way, monkeypatch):
    """Tokens come down before it is launched; the plan is made before anything waits for it, and goes up before the decoder."""
    make = planner.plan_batch

    def noted(*args, **kwargs):
        log.note("plan", "plan_batch")
        return make(*args, **kwargs)

    monkeypatch.setattr(planner, "plan_batch", noted)
    model, batch = copy.deepcopy(get_model("llava")), standard_batch("llava", "single", 1)
    log = Log()
    move(model, log)
    inputs = {key: OnDevice(value, log) if isinstance(value, Tensor) else value for key, value in batch.inputs.items()}
    with pretended(log), patched(model, by_name("crop", 0.25), batch, regions_of(batch)):
        if way == "forward":
            model(**inputs, logits_to_keep=1)
        else:
            model.generate(**inputs, max_new_tokens=1)

    def at(kind: str, operator: str = "", after: int = -1) -> int:
        return next(n for n, e in enumerate(log) if n > after and e.kind == kind and operator in (e.operator, ""))

    encoder = at("kernel", "convolution")
    asked, planned, up = at("to host"), at("plan"), at("to device, pinned")
    assert asked < encoder < planned < at("wait", after=encoder) and planned < up < at("kernel", "adaptive_pool")
    assert sum(e.kind == "plan" for e in log) == sum(e.kind == "to host" for e in log.ours("to host")) == 1


def test_the_plan_goes_up_before_the_language_model_begins():
    """Nothing is copied between two layers."""
    _, log, _, _ = prefill("llava", "single", "crop")
    copies = [n for n, event in enumerate(log) if event.kind.startswith("to ") and event.where != "model"]
    first = next(n for n, event in enumerate(log) if event.operator == "attention_mass")
    assert max(copies) < first


@pytest.mark.parametrize("size,name,most", [("single", "ilp", 8), ("single", "plc", 4), ("single", "crop", 11),
                                            ("left", "ilp", 11), ("left", "plc", 4), ("left", "crop", 14),
                                            ("right", "ilp", 11), ("right", "plc", 4), ("right", "crop", 14)])  # fmt: skip
def test_few_kernels_are_ours(size, name, most):
    """A launch costs the host some microseconds, whatever it does."""
    _, log, _, _ = prefill("llava", size, name)
    assert len(log.ours("kernel")) <= most, log.ours("kernel")
