"""Predictions before a run, and ``patch(auto=True)`` that follows them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import crop
from crop.cost.estimate import Geometry, Speed
from crop.patching.planner import Planner

module = sys.modules["crop.cost.estimate"]  # its name in the package is the function
REGION = crop.Region.box(0.0, 0.0, 0.5, 0.5)
FREE = dict(attention=0.0, hook=0.0, call=0.0, image=0.0, step=0.0)
SLOW_MATRICES = Speed(**FREE | dict(matrices=(1.0, 4.0, 16.0, 64.0)))  # in proportion to the tokens
SLOW_HOOKS = Speed(**FREE | dict(matrices=(1e-6,) * 4, hook=1.0))
SLOW_STEPS = Speed(**FREE | dict(matrices=(1.0, 4.0, 16.0, 64.0), step=1e3))


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def prompt(request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, Any]]]:
    yield build_model(request.param, "sdpa"), standard_batch(request.param, "left", 1).inputs


def regions(inputs: dict[str, Any]) -> list[crop.Region]:
    return [crop.Region.whole()] * len(inputs["input_ids"])


METHODS = [
    crop.InnerLLMPruning(0.25, layer=1),
    crop.PreLLMCompression(keep=0.5),
    crop.Compose(crop.PreLLMCompression(keep=0.5), crop.InnerLLMPruning(0.25, layer=1)),
]


@pytest.mark.parametrize("method", METHODS, ids=["ilp", "plc", "both"])
def test_counts_are_those_of_the_run(prompt: tuple[Any, dict[str, Any]], method: crop.Method) -> None:
    model = prompt[0]
    inputs = standard_batch(model.config.model_type, "single", 1).inputs
    predicted = crop.estimate(model, inputs, method, regions(inputs))
    with torch.no_grad(), crop.patch(model, method, regions(inputs)) as stats:
        cache = model(**inputs, use_cache=True).past_key_values
    assert predicted.after.tokens == pytest.approx(stats.layer_average)
    assert predicted.before.tokens == stats.tokens_before
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert predicted.after.kv_bytes == held
    geometry = Geometry.of(model.model.language_model)
    token = 2 * geometry.num_kv_heads * geometry.head_dim * 4
    assert predicted.before.kv_bytes == token * geometry.num_layers * inputs["input_ids"].numel()
    assert predicted.after.flops < predicted.before.flops


def test_flops_by_hand(prompt: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = prompt
    config = model.config.text_config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = config.hidden_size * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    weights += 3 * config.hidden_size * config.intermediate_size
    lengths = inputs["attention_mask"].sum(1).tolist()
    per_layer = sum(2 * weights * n + 2 * config.num_attention_heads * head * n * n for n in lengths)
    predicted = crop.estimate(model, inputs, crop.InnerLLMPruning(0.25, layer=1), regions(inputs))
    assert predicted.before.flops == per_layer * config.num_hidden_layers


@pytest.mark.parametrize(("speed", "prunes"), [(SLOW_MATRICES, True), (SLOW_HOOKS, False), (SLOW_STEPS, False)])
def test_auto_follows_the_estimate(
    prompt: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, speed: Speed, prunes: bool
) -> None:
    model, inputs = prompt
    monkeypatch.setattr(module, "measure_speed", lambda *_: speed)
    method = crop.InnerLLMPruning(0.25, layer=1)
    with torch.no_grad():
        plain = model(**inputs).logits
        with crop.patch(model, method, regions(inputs), auto=True) as stats:
            auto = model(**inputs).logits
    assert stats.estimate.prune is prunes
    assert stats.estimate.advice.startswith("prune" if prunes else "do not prune")
    assert (stats.tokens_after_ilp == stats.tokens_before) is not prunes
    assert torch.equal(plain, auto) is not prunes


def test_what_cannot_pay_is_neither_planned_nor_hooked(
    prompt: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = prompt
    monkeypatch.setattr(module, "measure_speed", lambda *_: SLOW_HOOKS)
    planned = []
    monkeypatch.setattr(Planner, "plan", lambda self, *args, plan=Planner.plan, **kw: planned.append(1) or plan(self, *args, **kw))  # fmt: skip
    decoder = model.model.language_model
    with torch.no_grad(), crop.patch(model, METHODS[2], regions(inputs), auto=True) as stats:
        cache = model(**inputs, use_cache=True).past_key_values
        assert not planned and not any(layer._forward_pre_hooks for layer in decoder.layers)
        assert not decoder._forward_pre_hooks
        count = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
        assert stats.tokens_before == stats.tokens_after_ilp == count and planned
        assert stats.seconds == {} and [len(kept) for kept in stats.kept] == count
        monkeypatch.setattr(module, "measure_speed", lambda *_: SLOW_MATRICES)
        model(**inputs)  # the next one pays: the doors open
        assert decoder.layers[0]._forward_pre_hooks and max(stats.tokens_after_ilp) < max(count)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert not decoder.layers[0]._forward_pre_hooks


def test_a_cache_that_was_pruned_is_used_under_auto(
    prompt: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = prompt
    inputs = standard_batch(model.config.model_type, "single", 1).inputs
    text = torch.tensor([[5, 6, 7]])
    monkeypatch.setattr(module, "measure_speed", lambda *_: SLOW_HOOKS)

    def second_turn(**more: Any) -> torch.Tensor:
        with torch.no_grad():
            with crop.patch(model, METHODS[2], regions(inputs)):
                cache = model(**inputs, use_cache=True).past_key_values
            with crop.patch(model, METHODS[2], **more):
                return model(input_ids=text, past_key_values=cache).logits

    assert torch.equal(second_turn(auto=True), second_turn())


@pytest.mark.parametrize("method", [*METHODS, crop.PreLLMCompression(), crop.InnerLLMPruning(mode="strict", layer=1),
                                    crop.Pyramid.steps((1, 2), 0.5)])  # fmt: skip
def test_a_glance_promises_no_less_than_the_plan(prompt: tuple[Any, dict[str, Any]], method: crop.Method) -> None:
    model = prompt[0]
    inputs = standard_batch(model.config.model_type, "single", 1).inputs
    planner = Planner(model, method, regions(inputs), None, None)
    if isinstance(method, crop.InnerLLMPruning) and method.mode == "strict":
        planner = Planner(model, method, [REGION], _Resize(), None)
    chunk, decoder = planner.plan(inputs), model.model.language_model
    seen, known = module.glance(method, *planner.counts(inputs), decoder), module.compare(chunk, decoder)
    assert (seen.before.flops, seen.before.kv_bytes, seen.before.tokens) == (known.before.flops, known.before.kv_bytes,
                                                                             known.before.tokens)  # fmt: skip
    assert seen.after.flops <= known.after.flops and seen.after.tokens <= known.after.tokens
    assert seen.after.seconds <= known.after.seconds
    if method in METHODS:
        assert seen.after.flops == known.after.flops and seen.after.tokens == known.after.tokens


def test_localizer_must_be_earned_back(prompt: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = prompt
    monkeypatch.setattr(module, "measure_speed", lambda *_: SLOW_MATRICES)
    method = crop.InnerLLMPruning(0.25, layer=1)
    free = crop.estimate(model, inputs, method, regions(inputs))
    saved = free.before.seconds - free.after.seconds
    dear = crop.estimate(model, inputs, method, regions(inputs), localizer_seconds=saved)
    assert free.prune and not dear.prune and "localizer" in dear.advice


def test_speed_is_interpolated() -> None:
    speed = Speed(**FREE | dict(matrices=(1.0, 2.0, 4.0, 16.0)))
    assert [speed.matrix_seconds(n) for n in (1, 16, 40, 64, 256, 1024, 2048)] == [1, 1, 1.5, 2, 4, 16, 32]


def test_measured_speed_is_positive_and_remembered(prompt: tuple[Any, dict[str, Any]]) -> None:
    geometry = Geometry.of(prompt[0].model.language_model)
    speed = module.measure_speed(geometry, torch.device("cpu"), torch.float32)
    assert min(*speed.matrices, speed.attention, speed.hook, speed.step) > 0
    assert min(speed.call, speed.image) >= 0 and speed.call + speed.image > 0
    assert module.measure_speed(geometry, torch.device("cpu"), torch.float32) is speed


def test_nothing_runs_and_text_alone_is_refused(
    prompt: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = prompt
    monkeypatch.setattr(type(model), "forward", None)
    crop.estimate(model, inputs, crop.InnerLLMPruning(0.25, layer=1), regions(inputs))
    with pytest.raises(ValueError, match="must hold an image, got none"):
        crop.estimate(model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)}, crop.InnerLLMPruning(0.25))
    with pytest.raises(ValueError, match="region must be given once per image"):
        crop.estimate(model, inputs, crop.InnerLLMPruning(0.25, layer=1), [REGION] * 3, processor=_Resize())


class _Resize:
    do_resize, do_center_crop, do_pad = True, False, False
