"""Predictions before a run: counts against the run, FLOPs against torch's counter, advice for typed-in speeds."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import crop
from crop.cost.geometry import DecoderGeometry, LayerGeometry
from crop.cost.speed import COMPILED_LAYER, EAGER_LAYER, Speed, layer_host_seconds, measure_speed
from tests.support.batches import make_batch, standard_batch
from tests.support.tiny_families import build_model

module = sys.modules["crop.cost.estimate"]  # its name in the package is the function
REGION = crop.Region.box(0.0, 0.0, 0.5, 0.5)
FREE = dict(attention=0.0, hook=0.0, image=0.0, step=0.0)
SLOW_MATRICES = Speed(**FREE | dict(matrices=(1.0, 4.0, 16.0, 64.0)))  # in proportion to the tokens
SLOW_HOOKS = Speed(**FREE | dict(matrices=(1e-6,) * 4, hook=1.0))
SLOW_STEPS = Speed(**FREE | dict(matrices=(1.0, 4.0, 16.0, 64.0), step=1e9))


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def prompt(request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, Any]]]:
    yield build_model(request.param, "sdpa"), padded(request.param)


def padded(family: str) -> dict[str, Any]:
    """Two samples of an image each."""
    return make_batch(standard_batch(family, "left", 1).samples[:2], "left").inputs


def regions(inputs: dict[str, Any]) -> list[crop.Region]:
    return [crop.Region.whole()] * len(inputs["input_ids"])


METHODS = [
    crop.InnerLLMPruning(0.25, layer=1),
    crop.PreLLMCompression(keep=0.5),
    crop.Compose(crop.PreLLMCompression(keep=0.5), crop.InnerLLMPruning(0.25, layer=1)),
]


@pytest.mark.fast
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
    layers = DecoderGeometry.of(model.model.language_model).layers
    token = sum(layer.cached * 4 for layer in layers)
    assert predicted.before.kv_bytes == token * inputs["input_ids"].numel()
    assert predicted.after.flops < predicted.before.flops


@pytest.mark.fast
def test_flops_by_hand(prompt: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = prompt
    config = model.config.text_config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = config.hidden_size * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    weights += 3 * config.hidden_size * config.intermediate_size
    lengths = inputs["attention_mask"].sum(1).tolist()
    per_layer = sum(2 * weights * n + 4 * config.num_attention_heads * head * n * n for n in lengths)
    predicted = crop.estimate(model, inputs, crop.InnerLLMPruning(0.25, layer=1), regions(inputs))
    assert predicted.before.decoder_flops == per_layer * config.num_hidden_layers


@pytest.mark.fast
@pytest.mark.parametrize(("speed", "prunes"), [(SLOW_MATRICES, True), (SLOW_HOOKS, False), (SLOW_STEPS, False)])
def test_advice_follows_the_speed(
    prompt: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, speed: Speed, prunes: bool
) -> None:
    model, inputs = prompt
    monkeypatch.setattr(module, "measure_speed", lambda *_: speed)
    found = crop.estimate(model, inputs, crop.InnerLLMPruning(0.25, layer=1), regions(inputs))
    assert found.prune is prunes
    assert found.advice.startswith("prune" if prunes else "do not prune")


@pytest.mark.fast
def test_deciding_by_features_is_counted(prompt: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = prompt
    monkeypatch.setattr(module, "measure_speed", lambda *_: Speed(**FREE | dict(matrices=(0.0,) * 4)))
    waits, state = [], torch.get_rng_state()

    class Slow(crop.DiverseCompression):
        def plan(self, layout: crop.VisionLayout, region: crop.Region) -> Any:
            found = super().plan(layout, region)

            def decide(*given: Any) -> Any:
                waits.append(time.sleep(0.01))
                return found.decide(*given)

            return dataclasses.replace(found, decide=decide)

    seconds = [crop.estimate(model, inputs, one(keep=0.5), regions(inputs)).after.decoder_seconds
               for one in (crop.PreLLMCompression, crop.DiverseCompression, Slow)]  # fmt: skip
    assert seconds[0] == 0 < seconds[1] and seconds[2] > 0.01 * len(inputs["input_ids"]) and len(waits) >= 4
    assert torch.equal(torch.get_rng_state(), state)
    watching = crop.by_name("vispruner", 0.5)  # reads attention of a tower that does not run
    assert watching.observes and crop.estimate(model, inputs, watching, regions(inputs)).after.decoder_seconds == 0


GPU = Speed(**FREE | dict(matrices=tuple(size * 1e-7 for size in (16, 64, 256, 1024)), image=1e-4, step=1e-4))


@pytest.mark.fast
def test_what_the_host_takes_to_launch_is_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that does a layer of one prompt in half the time in which the host asks for it, and of eight in four times that."""
    model = build_model("llava", "sdpa")
    sample, method = standard_batch("llava", "single", 1).samples[0], crop.InnerLLMPruning(0.25, layer=1)
    monkeypatch.setattr(module, "measure_speed", lambda *_: GPU)
    layers = DecoderGeometry.of(model.model.language_model).layers
    host = 2 * GPU.matrix_seconds(layers[0], len(sample.ids))

    def asked(count: int, host: float) -> crop.Estimate:
        inputs = make_batch([sample] * count, "none").inputs
        return crop.estimate(model, inputs, method, regions(inputs), host_seconds=host)

    alone, eight, graph = asked(1, host), asked(8, host), asked(1, 0.0)
    assert (alone.prune, eight.prune, graph.prune) == (False, True, True)
    assert alone.before.decoder_seconds == pytest.approx(len(layers) * host) and alone.before.launched == len(layers)
    assert "compile the layers" in alone.advice and "host" not in eight.advice + graph.advice
    assert asked(1, host / 8).prune  # compiled


@pytest.mark.fast
def test_the_loop_of_compiled_layers_is_shorter() -> None:
    layers = build_model("llava", "sdpa").model.language_model.layers
    assert layer_host_seconds(layers, torch.device("cpu")) == 0
    assert layer_host_seconds(layers, torch.device("cuda")) == EAGER_LAYER
    for layer in layers:
        layer.compile()
    assert layer_host_seconds(layers, torch.device("cuda")) == COMPILED_LAYER < EAGER_LAYER


def test_a_budget_costs_the_same_wherever_the_region_is(
    prompt: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prompt[0]
    inputs = standard_batch(model.config.model_type, "single", 1).inputs
    monkeypatch.setattr(module, "measure_speed", lambda *_: SLOW_MATRICES)
    for method in METHODS:
        asked = crop.estimate(model, inputs, method)
        known = crop.estimate(model, inputs, method, [REGION], processor=_Resize())
        assert (asked.before, asked.after.tokens, asked.after.flops) == (
            known.before,
            known.after.tokens,
            known.after.flops,
        )
    with pytest.raises(ValueError, match="plan must be left out, got False; leave region out"):
        crop.estimate(model, inputs, METHODS[0], plan=False)


def test_localizer_must_be_earned_back(prompt: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = prompt
    monkeypatch.setattr(module, "measure_speed", lambda *_: SLOW_MATRICES)
    method = crop.InnerLLMPruning(0.25, layer=1)
    free = crop.estimate(model, inputs, method, regions(inputs))
    saved = free.before.seconds - free.after.seconds
    dear = crop.estimate(model, inputs, method, regions(inputs), localizer_seconds=saved)
    assert free.prune and not dear.prune and "localizer" not in free.advice
    asked = re.search(r"ms for the localizer, which may take ([\d.]+) ms", dear.advice)
    spare = float(asked[1]) / 1000
    assert 0 < spare < saved
    for share, prune in ((0.9, True), (1.1, False)):
        found = crop.estimate(model, inputs, method, regions(inputs), localizer_seconds=share * spare)
        assert found.prune is prune
    keeps_all = crop.estimate(model, inputs, crop.InnerLLMPruning(1.0, layer=1), regions(inputs), localizer_seconds=1.0)
    assert not keeps_all.prune and "for the localizer (predicted)" in keeps_all.advice


@pytest.mark.fast
def test_speed_is_interpolated() -> None:
    speed = Speed(**FREE | dict(matrices=(1.0, 2.0, 4.0, 16.0)))
    layer = LayerGeometry(weights=3, num_heads=1, head_dim=1, value_dim=1, cached=2)
    found = [speed.matrix_seconds(layer, n) for n in (1, 16, 40, 64, 256, 1024, 2048)]
    assert found == [3, 3, 4.5, 6, 12, 48, 96]


def test_measured_speed_is_positive_and_remembered(prompt: tuple[Any, dict[str, Any]]) -> None:
    geometry = DecoderGeometry.of(prompt[0].model.language_model)
    speed = measure_speed(geometry, torch.device("cpu"), torch.float32)
    assert min(*speed.matrices, speed.attention, speed.hook, speed.image, speed.step) > 0
    assert measure_speed(geometry, torch.device("cpu"), torch.float32) is speed


# ------------------------------------------------------------------------------------------------- kinds of layers
SIZES = dict(
    vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


def moe(shared: bool) -> Any:
    """A decoder whose layers, but for the first, hold five experts of which a token passes two."""
    from transformers import Qwen2MoeConfig, Qwen2MoeModel, Qwen3MoeConfig, Qwen3MoeModel

    experts = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[0])
    more = dict(intermediate_size=20, experts_implementation="eager", attn_implementation="eager")
    if shared:
        return Qwen2MoeModel(Qwen2MoeConfig(**SIZES, **experts, **more, shared_expert_intermediate_size=24)).eval()
    return Qwen3MoeModel(Qwen3MoeConfig(**SIZES, **experts, **more)).eval()


@pytest.mark.parametrize("shared", [False, True])
def test_of_a_mixture_the_experts_that_run_are_counted(shared: bool) -> None:
    model, length = moe(shared), 11
    geometry = DecoderGeometry.of(model)
    first, second, third = geometry.layers
    assert first.experts is None and second is third
    assert (second.experts.count, second.experts.per_token, second.experts.weights) == (5, 2, 3 * 16 * 12)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(length)[None])
    counts = counter.get_flop_counts()["Global"]
    # Attention is a product of batches, rotary angles too; all else are matrices.
    matrices = sum(flops for name, flops in counts.items() if name in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert sum(layer.matrix_flops(length) for layer in geometry.layers) == matrices


def test_the_experts_of_a_short_prompt_are_read_once_each() -> None:
    layer = DecoderGeometry.of(moe(False)).layers[1]
    speed = Speed(**FREE | dict(matrices=(1.0, 1.0, 1.0, 1.0)))  # what a matrix takes where reading it is all
    expert = layer.experts.weights
    assert [speed.matrix_seconds(layer, n) - layer.weights for n in (1, 2, 3, 100)] == [2 * expert, 4 * expert, 5 * expert, 5 * expert]  # fmt: skip


def test_windows_bound_attention_and_cache() -> None:
    from transformers import Gemma3TextConfig, Gemma3TextModel

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = Gemma3TextModel(Gemma3TextConfig(**SIZES, intermediate_size=20, sliding_window=4, layer_types=kinds)).eval()
    layers = DecoderGeometry.of(model).layers
    assert [layer.window for layer in layers] == [4, None, 4] and layers[0] is layers[2]
    length = 11
    band = sum(abs(row - column) < 4 for row in range(length) for column in range(length))
    assert layers[1].attention_flops(length) == 4 * 4 * 8 * length**2
    assert layers[0].attention_flops(length) == 4 * 4 * 8 * band
    assert layers[0].attention_flops(3) == layers[1].attention_flops(3)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(length)[None], use_cache=True).past_key_values
    for layer, held in zip(layers, cache.layers, strict=True):
        assert layer.kv_bytes(length, 4) == sum(t.numel() * t.element_size() for t in (held.keys, held.values))


def test_a_state_does_not_grow() -> None:
    model, batch = build_model("qwen3_5"), standard_batch("qwen3_5", "single", 1)
    layers = DecoderGeometry.of(model.model.language_model).layers
    assert [layer.state is not None for layer in layers] == [True, False, True, False]
    assert layers[0].attention_flops(64) == layers[0].attention_flops(1) == layers[0].attention_flops(65) / 2
    assert layers[0].kv_bytes(10, 4) == layers[0].kv_bytes(20, 4)
    cache = model(**batch.inputs, use_cache=True).past_key_values.layers[0]
    held = [*_tensors(cache.conv_states), *_tensors(cache.recurrent_states)]
    assert layers[0].kv_bytes(10, 4) == sum(tensor.numel() * tensor.element_size() for tensor in held)


def _tensors(states: Any) -> list[torch.Tensor]:
    """transformers 5.24 keeps several states of a layer by number."""
    return (
        [states] if isinstance(states, torch.Tensor) else list(states.values() if isinstance(states, dict) else states)
    )


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
