"""What pruning will save, before anything runs: tokens, FLOPs, cache bytes, seconds, and whether it pays at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .models import adapter_for
from .planner import Planner

if TYPE_CHECKING:
    from .chunk import ChunkPlan
    from .methods import Method
    from .region import Region

MARGIN = 0.02  # a saving below this share of the prefill is within what such an estimate can be wrong by
PLAN_SECONDS = 2e-3  # planning and the small tensors of one prefill, as measured on one core; grows little with tokens
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
        hook: seconds per hook call.
    """

    matrices: tuple[float, ...]
    attention: float
    hook: float

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
    hooked, empty = nn.Identity(), torch.empty(0)
    hooked.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
    with torch.no_grad():
        return Speed(
            matrices=tuple(matrices(tokens) for tokens in _SIZES),
            attention=attention / geometry.attention_flops(length),
            hook=_seconds(lambda: hooked(empty), torch.device("cpu")),
        )


def _seconds(call: Callable[[], Any], device: torch.device, rounds: int = 3) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(rounds))  # what disturbs only adds


def lengths(chunk: ChunkPlan, layer: int | None) -> list[int]:
    """Tokens per sample that decoder layer ``layer`` sees; None: unpruned."""
    found = chunk.real.sum(1).tolist()
    for image in chunk.images:
        found[image.sample] -= len(image.layout) - (len(image.layout) if layer is None else image.tokens_at(layer))
    return found


def compare(chunk: ChunkPlan, language_model: nn.Module, localizer_seconds: float = 0.0) -> Estimate:
    """Estimate a planned prefill.

    Args:
        chunk: what the patch planned.
        language_model: the decoder.
        localizer_seconds: what finding the region takes, 0 where it is spent already.
    Returns:
        Estimate.
    """
    geometry, weight = Geometry.of(language_model), next(language_model.layers[0].parameters())
    speed = measure_speed(geometry, weight.device, weight.dtype)
    layers = range(geometry.num_layers)
    full = lengths(chunk, None)
    before = _cost(geometry, speed, [full for _ in layers], weight.element_size())
    pruned = _cost(geometry, speed, [lengths(chunk, layer) for layer in layers], weight.element_size())
    own = PLAN_SECONDS + speed.hook * (geometry.num_layers + 8)
    for layer, step in chunk.steps.items():
        if step.rows is not None:
            seen = lengths(chunk, layer - 1)
            flops = sum(geometry.score_flops(step.rows.shape[1], seen[sample]) for sample in step.sample.tolist())
            own += flops * speed.attention * 2  # logits once; exponentials weigh as much again
    after = Cost(
        [sum(image.tokens_at(layer) for layer in layers) / geometry.num_layers for image in chunk.images],
        pruned.flops,
        pruned.kv_bytes,
        pruned.seconds + own,
    )
    before = Cost([float(len(image.layout)) for image in chunk.images], before.flops, before.kv_bytes, before.seconds)
    saved = before.seconds - after.seconds - localizer_seconds
    prune = saved > MARGIN * before.seconds
    share = f"{1000 * before.seconds:.1f} ms of prefill, {1000 * after.seconds:.1f} ms pruned"
    if localizer_seconds:
        share += f" and {1000 * localizer_seconds:.1f} ms for the localizer"
    verdict = "prune" if prune else "do not prune"
    return Estimate(before, after, prune, f"{verdict}: {share} (predicted)")


def _cost(geometry: Geometry, speed: Speed, per_layer: Sequence[list[int]], element_size: int) -> Cost:
    flops, seconds, kv_tokens = 0.0, 0.0, 0
    for counts in per_layer:
        padded = len(counts) * max(counts)
        attention = sum(geometry.attention_flops(count) for count in counts)
        flops += geometry.matrix_flops(sum(counts)) + attention
        padded_attention = len(counts) * geometry.attention_flops(max(counts))
        seconds += speed.matrix_seconds(padded) + speed.attention * padded_attention
        kv_tokens += sum(counts)
    return Cost([], flops, 2 * geometry.num_kv_heads * geometry.head_dim * element_size * kv_tokens, seconds)


def estimate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: Method,
    region: Region | Sequence[Region] | None = None,
    *,
    processor: Any = None,
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    localizer_seconds: float = 0.0,
) -> Estimate:
    """Predict what pruning one prompt saves; nothing runs on the model.

    Args:
        model, method, region, processor, image_size: as for ``patch``.
        inputs: what the model would be called with: ``input_ids``, ``pixel_values`` and so on.
        localizer_seconds: what finding the region costs, to be earned back.
    Returns:
        Estimate: tokens and FLOPs are exact, seconds come from measured constants of this device
        (``measure_speed``, a fraction of a second at first use).
    Raises:
        TypeError, ValueError: as ``patch``; ValueError: the prompt holds no image.
    """
    chunk = Planner(model, method, region, processor, image_size).plan(inputs)
    if chunk is None:
        raise ValueError("estimate: the prompt must hold an image, got none")
    return compare(chunk, adapter_for(model).language_model(model), localizer_seconds)
