"""How fast a device is at what a decoder and the patch do: constants measured once, in a fraction of a second."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from crop import ops
from crop.cost.geometry import DecoderGeometry, LayerGeometry
from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods.registry import by_name
from crop.patching.batch_plan import BatchPlan, plan_batch
from crop.patching.feature_pooling import settle

SIZES = (16, 64, 256, 1024)  # tokens at which matrices are timed

# Seconds in which the host launches one decoder layer. transformers takes 16 to 20 ms for the 32 layers of a 7B model in its
# eager loop on server CPUs; a compiled layer is a handful of launches behind its guards.
EAGER_LAYER = 0.55e-3
COMPILED_LAYER = 0.1e-3
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Speed:
    """Measured on one device for one decoder and dtype; seconds."""

    matrices: tuple[float, ...]  # per element of a matrix that a number of tokens pass, at each of SIZES tokens
    attention: float  # per FLOP of causal attention, of which the full square is counted and half is done
    hook: float  # per hook: registered, called once, removed
    image: float  # of planning one image
    step: float  # of the operators of one cut or pooling on few tokens, which is what their calls cost

    def matrix_seconds(self, layer: LayerGeometry, tokens: int) -> float:
        """One layer's matrices on ``tokens`` tokens, which its experts share evenly."""
        seconds = self.product_seconds(layer.weights, tokens)
        if layer.experts is not None:
            runs = tokens * layer.experts.per_token
            busy = min(layer.experts.count, runs)
            seconds += self.product_seconds(busy * layer.experts.weights, -(-runs // max(busy, 1)))
        return seconds

    def product_seconds(self, weights: int, tokens: int) -> float:
        """Of so many tokens with matrices of so many elements: between the measured sizes on a line, beyond in proportion."""
        return weights * float(np.interp(tokens, SIZES, self.matrices)) * max(1.0, tokens / SIZES[-1])


def layer_host_seconds(layers: Iterable[nn.Module], device: torch.device) -> float:
    """What the host takes per decoder layer beside the device: one does not begin before the other asks for it.

    0 on a CPU, which does the work itself and pays for the loop with and without pruning.
    Source: own choice of constants.
    """
    if device.type in ("cpu", "meta"):
        return 0.0
    compiled = all(getattr(layer, "_compiled_call_impl", None) is not None for layer in layers)
    return COMPILED_LAYER if compiled else EAGER_LAYER


UNKNOWN = Speed((math.nan,) * len(SIZES), *[math.nan] * 4)  # of the meta device


@lru_cache(maxsize=16)
def measure_speed(geometry: DecoderGeometry, device: torch.device, dtype: torch.dtype) -> Speed:
    """Time a layer's worth of work: a few matrix products, one attention call, empty hooks; remembered per arguments.

    Source: own choice.
    """
    if device.type == "meta":
        return UNKNOWN
    layer = geometry.attending
    width = max(1, layer.active_weights // geometry.hidden // 8)  # an eighth of the layer is enough to time
    weight = torch.randn(width, geometry.hidden, device=device, dtype=dtype)

    def per_element(tokens: int) -> float:
        x = torch.randn(tokens, geometry.hidden, device=device, dtype=dtype)
        return _seconds(lambda: nn.functional.linear(x, weight), device) / weight.numel()

    length = SIZES[-1]
    query = torch.randn(1, layer.num_heads, length, layer.head_dim, device=device, dtype=dtype)
    attend = nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        attention = _seconds(lambda: attend(query, query, query, is_causal=True), device)
        return Speed(
            matrices=tuple(map(per_element, SIZES)),
            attention=attention / (4.0 * layer.num_heads * layer.head_dim * length * length),
            hook=_hook_seconds(),
            image=_planning_seconds(),
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


def _planning_seconds() -> float:
    """Pooling and a cut of one image of 16 x 16 tokens."""
    method, layout, fresh = by_name("crop", 0.11), VisionLayout.grid(16, 16), itertools.count(1e-6, 1e-6)
    real = torch.ones(1, len(layout) + 32, dtype=torch.bool)

    def once() -> None:
        region = Region.box(0.3, 0.25, 0.7, 0.55 + next(fresh))  # plans are remembered by region
        plan_batch(method, [(0, layout)], [region], real)

    return _seconds(once, _CPU)


def _step_seconds(geometry: DecoderGeometry, device: torch.device, dtype: torch.dtype) -> float:
    layer, index = geometry.attending, torch.arange(16, device=device).unsqueeze(0)
    key = torch.randn(1, layer.num_heads, 32, layer.head_dim, device=device, dtype=dtype)
    query = torch.randn(1, layer.num_heads, 4, layer.head_dim, device=device, dtype=dtype)
    hidden = torch.randn(1, 32, geometry.hidden, device=device, dtype=dtype)

    def once() -> None:
        kept = ops.select(ops.attention_mass(query, key, index), 8)
        for _ in range(4):  # hidden states, rotary tables, and the way back
            ops.compact([hidden], kept)

    return _seconds(once, device)


def deciding_seconds(plan: BatchPlan, hidden: int, device: torch.device, dtype: torch.dtype) -> float:
    """What a plan leaves to features, decided by made-up ones of the same sizes.

    Args:
        plan: on the CPU, of a method that observes nothing in the vision tower. hidden: width of the decoder.
    """
    batch, length = plan.valid.shape
    features = torch.arange(batch * length * hidden, device=device, dtype=torch.float32).sin_()
    embeds, placed = features.view(batch, length, hidden).to(dtype), plan.to(device)
    with torch.no_grad():
        return _seconds(lambda: settle(placed, embeds, None), device, rounds=2)


def _seconds(call: Callable[[], Any], device: torch.device, rounds: int = 3) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(rounds))  # what disturbs only adds
