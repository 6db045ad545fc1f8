"""What pruning will save, before anything runs: tokens, FLOPs, cache bytes, seconds, and whether it pays at all."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from crop import ops
from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods.base import Method
from crop.methods.registry import by_name
from crop.patching.batch_plan import BatchPlan, plan_batch
from crop.patching.planner import Planner

MARGIN = 0.02  # a saving below this share of the prefill is within what such an estimate can be wrong by
_CPU = torch.device("cpu")
_SIZES = (16, 64, 256, 1024)  # tokens at which a layer's matrices are timed


@dataclass(frozen=True)
class Cost:
    """One prefill of the decoder.

    Args:
        tokens: vision tokens per image, averaged over the decoder layers.
        flops: multiply-adds of all samples, times two.
        kv_bytes: keys and values of all samples after it.
        seconds: predicted, the patch's own work included.
    """

    tokens: list[float]
    flops: float
    kv_bytes: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """Prediction for one prompt.

    Args:
        before: the model as it is. after: under the method.
        prune: whether the predicted saving, less ``localizer_seconds``, is worth it.
        advice: the same in words.
    """

    before: Cost
    after: Cost
    prune: bool
    advice: str


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder that its cost depends on."""

    num_layers: int
    hidden: int
    layer_weights: int  # elements of the matrices of one layer
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @staticmethod
    def of(language_model: nn.Module) -> Geometry:
        config, layers = language_model.config, language_model.layers
        heads = config.num_attention_heads
        return Geometry(
            num_layers=len(layers),
            hidden=config.hidden_size,
            layer_weights=sum(p.numel() for p in layers[0].parameters() if p.dim() > 1),
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    def matrix_flops(self, tokens: int) -> float:
        return 2.0 * self.layer_weights * tokens

    def attention_flops(self, length: int) -> float:
        """Causal: half of the square, two products."""
        return 2.0 * self.num_heads * self.head_dim * length * length

    def score_flops(self, rows: int, length: int) -> float:
        return 2.0 * self.num_heads * self.head_dim * rows * length


@dataclass(frozen=True)
class Speed:
    """Measured on one device for one geometry and dtype.

    Args:
        matrices: seconds of one layer's matrices at each of ``_SIZES`` tokens.
        attention: seconds per FLOP of causal attention.
        hook: seconds per hook: registered, called once, removed.
        call: seconds of planning a prefill, whatever it holds. image: the same per image.
        step: seconds of the operators of one cut or pooling on few tokens, which is what their calls cost.
    """

    matrices: tuple[float, ...]
    attention: float
    hook: float
    call: float
    image: float
    step: float

    def matrix_seconds(self, tokens: int) -> float:
        """Between the measured sizes on a line, beyond them in proportion."""
        if tokens <= _SIZES[0]:
            return self.matrices[0]
        for low, high, a, b in zip(_SIZES, _SIZES[1:], self.matrices, self.matrices[1:], strict=False):
            if tokens <= high:
                return a + (b - a) * (tokens - low) / (high - low)
        return self.matrices[-1] * tokens / _SIZES[-1]


@lru_cache(maxsize=16)
def measure_speed(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> Speed:
    """Time a layer's worth of work: a few matrix products, one attention call, empty hooks.

    Args:
        geometry, device, dtype: of the decoder.
    Returns:
        Speed; remembered per geometry, device and dtype.
    Source: own choice.
    """
    width = max(1, geometry.layer_weights // geometry.hidden // 8)  # an eighth of the layer, eight times
    weight = torch.randn(width, geometry.hidden, device=device, dtype=dtype)

    def matrices(tokens: int) -> float:
        x = torch.randn(tokens, geometry.hidden, device=device, dtype=dtype)
        share = geometry.layer_weights / weight.numel()
        return share * _seconds(lambda: torch.nn.functional.linear(x, weight), device)

    length = _SIZES[-1]
    query = torch.randn(1, geometry.num_heads, length, geometry.head_dim, device=device, dtype=dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    attention = _seconds(lambda: attend(query, query, query, is_causal=True), device)
    call, image = _planning_seconds()
    with torch.no_grad():
        return Speed(
            matrices=tuple(matrices(tokens) for tokens in _SIZES),
            attention=attention / geometry.attention_flops(length),
            hook=_hook_seconds(),
            call=call,
            image=image,
            step=_step_seconds(geometry, device, dtype),
        )


def _hook_seconds() -> float:
    hooked, empty = nn.Identity(), torch.empty(0)
    call = torch.compiler.disable(lambda first, module, args, kwargs: (args, kwargs))

    def once() -> None:
        handle = hooked.register_forward_pre_hook(partial(call, None), with_kwargs=True)
        hooked(empty)
        handle.remove()

    return _seconds(once, _CPU)


def _planning_seconds() -> tuple[float, float]:
    """Of a prefill, and of each image in it: pooling and a cut, a grid of 16 x 16 tokens."""

    def plan(images: int) -> float:
        def once() -> None:
            layouts = [(0, VisionLayout.grid(16, 16, start=256 * number)) for number in range(images)]
            region = Region.box(0.3, 0.25, 0.7, 0.55 + next(fresh))  # plans are remembered by region
            plan_batch(method, layouts, [region] * images, torch.ones(1, 256 * images + 32, dtype=torch.bool))

        return _seconds(once, _CPU)

    method, fresh = by_name("crop", 0.11), itertools.count(1e-6, 1e-6)
    one, four = plan(1), plan(4)
    image = max(0.0, (four - one) / 3)
    return max(0.0, one - image), image


def _step_seconds(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> float:
    index = torch.arange(16, device=device).unsqueeze(0)
    key = torch.randn(1, geometry.num_kv_heads, 32, geometry.head_dim, device=device, dtype=dtype)
    query = torch.randn(1, geometry.num_heads, 4, geometry.head_dim, device=device, dtype=dtype)
    hidden = torch.randn(1, 32, geometry.hidden, device=device, dtype=dtype)

    def once() -> None:
        kept = ops.select(ops.attention_mass(query, key, index), 8)
        for _ in range(4):  # hidden states, rotary tables, and the way back
            ops.compact([hidden], kept)

    return _seconds(once, device)


def _seconds(call: Callable[[], Any], device: torch.device, rounds: int = 3) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(rounds))  # what disturbs only adds


Facts = tuple[Geometry, torch.device, torch.dtype]
Stages = list[tuple[int, list[int]]]  # (first decoder layer, tokens per sample from there on), ascending from layer 0


def compare(chunk: BatchPlan, language_model: nn.Module, localizer_seconds: float = 0.0) -> Estimate:
    """Estimate a planned prefill.

    Args:
        chunk: what the patch planned.
        language_model: the decoder.
        localizer_seconds: what finding the region takes, 0 where it is spent already.
    Returns:
        Estimate.
    """
    layers = range(len(language_model.layers))
    stages = [(layer, _lengths(chunk, layer)) for layer in (0, *chunk.prunes)]
    scored = 0.0
    for layer, step in chunk.prunes.items():
        if step.rows is not None:
            seen = _lengths(chunk, layer - 1)
            scored += sum(step.rows.shape[1] * seen[sample] for sample in step.owners)
    before = [float(len(image.layout)) for image in chunk.images]
    after = [sum(image.tokens_at(layer) for layer in layers) / len(layers) for image in chunk.images]
    steps = len(chunk.prunes) + (chunk.pool is not None)
    facts = _facts(language_model)
    return _estimate(
        facts, measure_speed(*facts), _lengths(chunk, None), stages, scored, steps, before, after, localizer_seconds
    )


def is_short(samples: int, length: int, language_model: nn.Module) -> bool:
    """Whether a prefill takes less than our own work, whatever it holds: nothing else of it need be looked at.

    Args:
        samples, length: shape of the token ids.
        language_model: the decoder.
    """
    facts = _facts(language_model)
    return _is_short(samples, length, facts, measure_speed(*facts))


@lru_cache(maxsize=256)
def _is_short(samples: int, length: int, facts: Facts, speed: Speed) -> bool:
    whole = _cost(facts[0], speed, [(0, [length] * samples)], 0, [])
    return (1 - MARGIN) * whole.seconds <= 2 * _own_seconds(facts[0], speed, images=1, steps=1)


def glance(
    method: Method, real: list[int], vision: list[int], language_model: nn.Module, localizer_seconds: float = 0.0
) -> Estimate:
    """The most that a prefill can gain, before it is planned: planning alone would be too dear for the smallest ones.

    Args:
        method: what to prune.
        real, vision: tokens and vision tokens per sample.
        language_model, localizer_seconds: as in ``compare``.
    Returns:
        Estimate, tokens per sample; where its ``prune`` is False, that of ``compare`` would be too, but for what rounding
        does to several images of a sample.
    """
    facts = _facts(language_model)
    key = (method, tuple(real), tuple(vision), facts, measure_speed(*facts), localizer_seconds)
    try:
        hash(method)
    except TypeError:  # a method of the user's that cannot be remembered
        return _glance.__wrapped__(*key)
    return _glance(*key)


@lru_cache(maxsize=256)
def _glance(
    method: Method, real: tuple[int, ...], vision: tuple[int, ...], facts: Facts, speed: Speed, localizer_seconds: float
) -> Estimate:
    left, count = [method.least(count) for count in vision], facts[0].num_layers
    stages: Stages = []
    for layer in sorted({0, *(layer for one in left for layer in one)}):
        held = [_at(one, layer) for one in left]
        stages.append((layer, [all_ - seen + kept for all_, seen, kept in zip(real, vision, held, strict=True)]))
    steps = sum(one != other for (_, one), (_, other) in pairwise([(0, list(real)), *stages]))
    before = [float(seen) for seen in vision if seen]
    after = [
        sum(_at(one, layer) for layer in range(count)) / count for one, seen in zip(left, vision, strict=True) if seen
    ]
    return _estimate(facts, speed, list(real), stages, 0.0, steps, before, after, localizer_seconds)


_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Facts]] = weakref.WeakKeyDictionary()


def _facts(language_model: nn.Module) -> Facts:
    """Of a decoder; its sizes are read once."""
    norm = language_model.norm.weight  # what is quick to reach tells whether the model was moved or cast
    known = _known.get(language_model)
    if known is None or known[0] != (norm.device, norm.dtype):
        weight = next(language_model.layers[0].parameters())
        facts = Geometry.of(language_model), weight.device, weight.dtype
        known = _known[language_model] = (norm.device, norm.dtype), facts
    return known[1]


def _at(table: dict[int, int], layer: int) -> int:
    return table[max(first for first in table if first <= layer)]


def _estimate(
    facts: Facts,
    speed: Speed,
    full: list[int],
    stages: Stages,
    scored: float,
    steps: int,
    tokens_before: list[float],
    tokens_after: list[float],
    localizer_seconds: float,
) -> Estimate:
    """Price both ways. scored: rows x keys of all scoring; steps: cuts and poolings."""
    geometry, _, dtype = facts
    before = _cost(geometry, speed, [(0, full)], dtype.itemsize, tokens_before)
    after = _cost(geometry, speed, stages, dtype.itemsize, tokens_after)
    own = _own_seconds(geometry, speed, len(tokens_before), steps)
    own += geometry.score_flops(1, 1) * scored * speed.attention * 2  # logits once; exponentials weigh as much again
    after = replace(after, seconds=after.seconds + own)
    # Our own work counts twice: measured alone it is quicker than among the layers, and it is surely paid.
    prune = before.seconds - after.seconds - localizer_seconds > MARGIN * before.seconds + own
    share = f"{1000 * before.seconds:.1f} ms of prefill, {1000 * after.seconds:.1f} ms pruned"
    if localizer_seconds:
        share += f" and {1000 * localizer_seconds:.1f} ms for the localizer"
    verdict = "prune" if prune else "do not prune"
    return Estimate(before, after, prune, f"{verdict}: {share} (predicted)")


def _own_seconds(geometry: Geometry, speed: Speed, images: int, steps: int) -> float:
    """Of the patch: planning, hooks, operators."""
    return speed.call + speed.image * images + speed.hook * (geometry.num_layers + 8) + speed.step * steps


def _lengths(chunk: BatchPlan, layer: int | None) -> list[int]:
    """Tokens per sample that decoder layer ``layer`` sees; None: unpruned."""
    found = chunk.valid.sum(1).tolist()
    for image in chunk.images:
        found[image.sample] -= len(image.layout) - (len(image.layout) if layer is None else image.tokens_at(layer))
    return found


def _cost(geometry: Geometry, speed: Speed, stages: Stages, element_size: int, tokens: list[float]) -> Cost:
    flops, seconds, kv_tokens = 0.0, 0.0, 0
    for (layer, counts), (end, _) in zip(stages, [*stages[1:], (geometry.num_layers, [])], strict=True):
        attention = sum(geometry.attention_flops(count) for count in counts)
        padded_attention = len(counts) * geometry.attention_flops(max(counts))
        matrices = speed.matrix_seconds(len(counts) * max(counts))
        flops += (end - layer) * (geometry.matrix_flops(sum(counts)) + attention)
        seconds += (end - layer) * (matrices + speed.attention * padded_attention)
        kv_tokens += (end - layer) * sum(counts)
    held = 2 * geometry.num_kv_heads * geometry.head_dim * element_size * kv_tokens
    return Cost(tokens, flops, held, seconds)


def estimate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: Method,
    region: Region | Sequence[Region] | None = None,
    *,
    processor: Any = None,
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    localizer_seconds: float = 0.0,
    plan: bool = True,
) -> Estimate:
    """Predict what pruning one prompt saves; nothing runs on the model.

    Args:
        model, method, region, processor, image_size: as for ``patch``.
        inputs: what the model would be called with: ``input_ids``, ``pixel_values`` and so on.
        localizer_seconds: what finding the region costs, to be earned back.
        plan: False asks at a glance, before a region is known: what the method can gain at most, tokens per sample. Takes a
            tenth of a millisecond.
    Returns:
        Estimate: tokens and FLOPs are exact, seconds come from measured constants of this device
        (``measure_speed``, a fraction of a second at first use).
    Raises:
        TypeError, ValueError: as ``patch``; ValueError: the prompt holds no image.
    """
    planner = Planner(model, method, region, processor, image_size)
    found = planner.plan(inputs) if plan else planner.counts(inputs)
    if found is None:
        raise ValueError("estimate: the prompt must hold an image, got none")
    if plan:
        return compare(found, planner.language_model, localizer_seconds)
    return glance(planner.method, *found, planner.language_model, localizer_seconds)
