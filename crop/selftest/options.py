"""Every operator with the options and types that no case has: kernel and twin must agree."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crop import ops
from crop.ops import DTYPES, MODES
from crop.selftest.cases import region_plan
from crop.selftest.timing import Call

# Largest difference of results, as a share of the largest value; integers must be equal.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def option_calls(device: torch.device) -> Iterator[tuple[str, str, Call]]:
    """Operator, what is special, and a call of it on small tensors."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    places = torch.arange(70, device=device).expand(2, -1).contiguous()
    some = places.masked_fill(places % 7 == 3, -1)
    start = torch.tensor([0, 9], device=device)
    length = torch.tensor([[70, 60, 3], [0, 50, 70]], device=device)
    plan = region_plan(16).to(device)
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for dim in (33, 64, 72, 80, 96, 128, 256):
            pair = normal(2, 4, 3, dim, dtype=dtype), normal(2, 2, 70, dim, dtype=dtype)
            call = partial(ops.attention_mass, *pair, some, visible_start=start, visible_len=length)
            yield "attention_mass", f"{name}, head_dim {dim}, lengths", call
        for mode in MODES:
            yield (
                "adaptive_pool",
                f"{name}, {mode}, gradient",
                partial(_pooled, normal(256, 24, dtype=dtype), plan, mode),
            )
        yield (
            "saliency",
            f"{name}, alone",
            partial(ops.saliency, normal(70, 40, dtype=dtype), some[:1], alone=some[0] > 60),
        )
    score, rank = normal(2, 70), (places % 5 - 1).to(torch.int8)
    for tokens in (70, 5000, 9000, 17000):  # a kernel each
        long = normal(1, tokens)
        yield "select", f"{tokens} tokens", partial(ops.select, long, tokens // 3)
    yield (
        "select",
        "weight, priority, index",
        partial(ops.select, score, [9, 40], weight=score.abs(), priority=rank, index=some),
    )
    yield (
        "pack",
        "two images of a sample",
        partial(ops.pack, places > 60, 40, kept=places[:, 5:20] * 2, sample=start * 0),
    )
    rows = normal(10000).unfold(0, 5000, 1)  # a number further each
    for tokens in (70, 5000):  # a kernel each
        part = rows[:tokens, :tokens]
        yield "spread", f"{tokens} tokens", partial(ops.spread, part, part[0], 30, 4)
    ties = normal(71, 70).round().masked_fill(places[0] % 9 == 5, torch.nan)
    yield "spread", "ties, NaN, fresh", partial(ops.spread, ties[1:], ties[0], 70, 3, fresh=True)
    for kind in (torch.bool, torch.int16, torch.float32, torch.int64):
        yield (
            "compact",
            f"{kind}, fillers",
            partial(ops.compact, [normal(2, 3, 70, 5).to(kind)], some[:, :20], token_dim=2),
        )
    yield "compact", "gradient", partial(_moved, normal(2, 70, 12), places[:, ::3].contiguous())


def difference(found: Any, wanted: Any) -> float:
    """0 where two results agree, else their largest difference as a share of the largest value."""
    if isinstance(found, (list, tuple)):
        return max(map(difference, found, wanted))
    if not found.is_floating_point():
        return float(not torch.equal(found, wanted))
    far = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    return 0.0 if far <= TOLERANCE[found.dtype] else far


def _pooled(tokens: Tensor, plan: Any, mode: str) -> list[Tensor]:
    leaf = tokens.clone().requires_grad_()
    weight = tokens[:, 0].float().exp().requires_grad_() if mode == "weighted" else None
    with torch.enable_grad():
        out = ops.adaptive_pool(leaf, plan, mode, weight)
        inputs = [leaf] if weight is None else [leaf, weight]
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


def _moved(tokens: Tensor, index: Tensor) -> list[Tensor]:
    leaf = tokens.clone().requires_grad_()
    with torch.enable_grad():
        (out,) = ops.compact([leaf], index)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaf)]
