"""What a prefill on a GPU copies between host and device, and whether it waits for the device; on a pretended one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from crop.geometry.region import Region
from crop.methods import Compose, EncoderPruning, InnerLLMPruning, PreLLMCompression, by_name
from crop.methods.base import Method
from crop.patching import planner
from tests.support.batches import standard_batch
from tests.support.cases import families, get_model, patched, regions_of
from tests.support.pretend_cuda import Log, OnDevice, move, pretended

CORNER = Region.box(0.05, 0.05, 0.3, 0.3)
ENCODER = Compose(PreLLMCompression(keep=0.4), InnerLLMPruning(0.2), EncoderPruning(ring=0))


def prefill(family: str, size: str, method: Method, corner: bool = False) -> tuple[Log, Log, Tensor, Tensor]:
    """Log of an unpatched and of a patched prefill, the latter's logits, and those of the same on the CPU."""
    model, batch = copy.deepcopy(get_model(family)), standard_batch(family, size, 1)
    regions = [CORNER] * len(batch.rows()) if corner else regions_of(batch)
    asked = dict(use_cache=True, logits_to_keep=1)
    with torch.no_grad(), patched(model, method, batch, regions) as stats:
        wanted = model(**batch.inputs, **asked).logits
    assert not corner or stats.tokens_encoded[0] < stats.tokens_before[0]
    plain, log = Log(), Log()
    move(model, log)
    inputs = {key: OnDevice(value, log) if isinstance(value, Tensor) else value for key, value in batch.inputs.items()}
    with pretended(log):
        model(**inputs, **asked)
        plain += log
        log.clear()
        with patched(model, method, batch, regions):
            logits = model(**inputs, **asked).logits
    return plain, log, logits.inner, wanted


def assert_no_waiting(plain: Log, log: Log, uploads: int) -> None:
    """All that is read comes to the host at once; all that goes to the device is in ``uploads`` pinned buffers."""
    assert not plain.ours("kernel", "wait", "to host", "to device", "to device, pinned")
    assert log.ours("wait", "to device") == []
    assert len(log.ours("to host")) == 1 and len(log.ours("to device, pinned")) == uploads
    model = [event for event in log if event.where == "model"]
    for kind in ("wait", "to host", "to device"):  # what we do must not make the model wait, either
        assert sum(e.kind == kind for e in model) <= sum(e.kind == kind for e in plain)


@pytest.mark.parametrize("name", ["ilp", "plc", "crop"])
@pytest.mark.parametrize("size", ["single", "left"])
@families(["llava"], fast=True)
def test_one_copy_each_way_and_no_waiting(family, size, name):
    """Token ids and mask come to the host once, the plan goes to the device once, from pinned memory."""
    plain, log, logits, wanted = prefill(family, size, by_name(name, 0.25))
    assert torch.equal(logits, wanted)  # the pretended device computes as the CPU does
    assert_no_waiting(plain, log, 1)


@pytest.mark.parametrize("size", ["single", "left"])
@families(["llava_next", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "idefics3", "gemma3", "pixtral"])
def test_sizes_of_pictures_come_with_the_ids(family, size):
    """Whatever a family reads a layout of; further levels of vision features make nothing wait."""
    plain, log, logits, wanted = prefill(family, size, by_name("crop", 0.25))
    assert torch.equal(logits, wanted)
    assert_no_waiting(plain, log, 1)


@pytest.mark.parametrize("size", ["single", "left"])
@families(["llava", "llava_next", "llava_onevision", "internvl", "idefics3", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_the_encoder_stage_is_one_copy_more(family, size):
    """Which tiles, patches or tokens are encoded, and where they land, goes up at once before the encoder runs."""
    plain, log, logits, wanted = prefill(family, size, ENCODER, corner=True)
    assert torch.equal(logits, wanted)
    assert_no_waiting(plain, log, 2)


@pytest.mark.parametrize("name", ["diverse", "hiprune"])
@families(["llava"], fast=True)
def test_what_decides_by_features_comes_with_the_plan(family, name):
    """And behind the encoder stage with what that needs."""
    method = Compose(by_name(name, 0.2), encoder=EncoderPruning(ring=0)) if name == "diverse" else by_name(name, 0.2)
    plain, log, logits, wanted = prefill(family, "left", method, corner=name == "diverse")
    assert torch.equal(logits, wanted)
    assert_no_waiting(plain, log, 2 if name == "diverse" else 1)


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
    _, log, _, _ = prefill("llava", "single", by_name("crop", 0.25))
    copies = [n for n, event in enumerate(log) if event.kind.startswith("to ") and event.where != "model"]
    first = next(n for n, event in enumerate(log) if event.operator == "attention_mass")
    assert max(copies) < first


# Scores and pooling by planned cells: a launch or two each. Pooling by features: 20 to 30 an image for its decision, 23 for the
# cells of the batch; the greedy choice, tens of rounds, is one.
@pytest.mark.parametrize("size,name,most", [("single", "ilp", 8), ("single", "plc", 4), ("single", "crop", 79),
                                            ("left", "ilp", 11), ("left", "plc", 4), ("left", "crop", 114),
                                            ("right", "ilp", 11), ("right", "plc", 4), ("right", "crop", 114)])  # fmt: skip
def test_few_kernels_are_ours(size, name, most):
    """A launch costs the host some microseconds, whatever it does."""
    _, log, _, _ = prefill("llava", size, by_name(name, 0.25))
    assert len(log.ours("kernel")) <= most, log.ours("kernel")
    assert sum(event.operator == "spread" for event in log) <= (4 if name == "crop" else 0)  # two sides of two images
