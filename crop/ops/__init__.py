"""The operators of the package: what users call. Checks here, registration in `dispatch.py`, launches in `launchers.py`.

Checks run in the order users err: device, dtype, rank, shape, stride. `crop.ops.reference` holds the specification of each
operator under the same name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crop.backend import use_backend
from crop.geometry.pooling import PoolPlan
from crop.ops import launchers, reference
from crop.ops.launchers import DTYPES, MODES

__all__ = [
    "adaptive_pool",
    "attention_mass",
    "compact",
    "pack",
    "region_topk",
    "saliency",
    "select",
    "spread",
    "use_backend",
]

_INTS, _FLOAT = (torch.int64, torch.int32), (torch.float32,)
_MAX_HEAD_DIM = 256


def _check(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int | None, ...],  # None: any size
    device: torch.device | None = None,
    unit_stride: bool = False,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {allowed}, got {tensor.dtype}")
    got = tensor.shape
    if len(got) != len(shape):
        raise ValueError(f"{op}: {name} must have {len(shape)} dimensions, got shape {tuple(got)}")
    for size, want in zip(got, shape, strict=True):
        if want is not None and size != want:
            expected = tuple("any" if want is None else want for want in shape)
            raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(got)}".replace("'", ""))
    if unit_stride and tensor.stride(-1) != 1 and got[-1] > 1:
        raise ValueError(f"{op}: {name} must have a last stride of 1, got strides {tensor.stride()}")


def attention_mass(
    query: Tensor,  # (B, num_heads, M, d)
    key: Tensor,  # (B, num_kv_heads, T, d)
    vision_index: Tensor,  # (I, N)
    *,
    sample: Tensor | None = None,  # (I,)
    lse: Tensor | None = None,  # (B, num_heads, M)
    scale: float | None = None,
    visible_start: Tensor | None = None,  # (B,)
    visible_len: Tensor | None = None,  # (B, M)
) -> Tensor:  # (I, N)
    op, device = "attention_mass", query.device
    _check(op, "query", query, tuple(DTYPES), (None, None, None, None), unit_stride=True)
    batch, heads, rows, dim = query.shape
    _check(op, "key", key, (query.dtype,), (batch, None, None, dim), device, unit_stride=True)
    if not 1 <= dim <= _MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim must be in [1, {_MAX_HEAD_DIM}], got {dim}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{op}: num_heads must be a multiple of num_kv_heads={key.shape[1]}, got {heads}")
    _check(op, "vision_index", vision_index, _INTS, (None, None), device)
    images = vision_index.shape[0]
    if sample is None and images != batch:
        raise ValueError(f"{op}: sample must be given unless images={images} equals batch={batch}, got None")
    if sample is not None:
        _check(op, "sample", sample, _INTS, (images,), device)
    if lse is not None:
        _check(op, "lse", lse, _FLOAT, (batch, heads, rows), device)
    if visible_start is not None:
        _check(op, "visible_start", visible_start, _INTS, (batch,), device)
    if visible_len is not None:
        _check(op, "visible_len", visible_len, _INTS, (batch, rows), device)
    scale = dim**-0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return launchers.attention_mass(query, key, vision_index, sample, lse, scale, visible_start, visible_len)


def select(
    score: Tensor,  # (I, N)
    num_keep: int | Sequence[int],
    *,
    weight: Tensor | None = None,  # (I, N)
    priority: Tensor | None = None,  # (I, N)
    index: Tensor | None = None,  # (I, N)
) -> Tensor:  # (I, K)
    op, device = "select", score.device
    _check(op, "score", score, _FLOAT, (None, None))
    images, tokens = score.shape
    budget = _budget(op, num_keep, images, tokens)
    optional = (("weight", weight, _FLOAT), ("priority", priority, (torch.int8,)), ("index", index, _INTS))
    for name, tensor, dtypes in optional:
        if tensor is not None:
            _check(op, name, tensor, dtypes, (images, tokens), device)
    return launchers.select(score, budget, weight, priority, index)


def _budget(op: str, num_keep: int | Sequence[int], images: int, tokens: int) -> list[int]:
    if type(num_keep) is int and 0 <= num_keep <= tokens:
        return [num_keep] * images
    if isinstance(num_keep, Tensor):
        raise TypeError(f"{op}: num_keep must be an int or a list of ints on the host, got a Tensor")
    budget = list(num_keep) if isinstance(num_keep, Sequence) else [num_keep] * images
    if len(budget) != images:
        raise ValueError(f"{op}: num_keep must have one entry per image ({images}), got {len(budget)}")
    for image, keep in enumerate(budget):
        if isinstance(keep, (bool, float)):
            raise TypeError(f"{op}: num_keep[{image}] must be an int, got {keep!r}")
        if not 0 <= keep <= tokens:
            raise ValueError(f"{op}: num_keep[{image}] must be in [0, num_vision={tokens}], got {keep}")
    return budget


def region_topk(
    query: Tensor,  # (B, num_heads, M, d)
    key: Tensor,  # (B, num_kv_heads, T, d)
    vision_index: Tensor,  # (I, N)
    num_keep: int | Sequence[int],
    *,
    weight: Tensor | None = None,  # (I, N)
    priority: Tensor | None = None,  # (I, N)
    return_scores: bool = False,
    **scoring: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # (I, K) [, (I, N)]
    if isinstance(vision_index, Tensor) and vision_index.dim() == 2:
        _budget("region_topk", num_keep, *vision_index.shape)  # refuse before the expensive half
    mass = attention_mass(query, key, vision_index, **scoring)
    kept = select(mass, num_keep, weight=weight, priority=priority, index=vision_index)
    return (kept, mass) if return_scores else kept


def pack(
    stays: Tensor,  # (B, L)
    width: int,
    *,
    kept: Tensor | None = None,  # (I, K)
    sample: Tensor | None = None,  # (I,)
) -> tuple[Tensor, Tensor]:  # (B, width), (B, L)
    op, device = "pack", stays.device if isinstance(stays, Tensor) else None
    _check(op, "stays", stays, (torch.bool,), (None, None))
    if isinstance(width, (bool, float)):
        raise TypeError(f"{op}: width must be an int, got {width!r}")
    if width < 0:
        raise ValueError(f"{op}: width must be at least 0, got {width}")
    batch = stays.shape[0]
    if kept is None and sample is not None:
        raise ValueError(f"{op}: sample must be left out without kept, got a tensor")
    if kept is not None:
        _check(op, "kept", kept, _INTS, (None, None), device)
        if sample is None and len(kept) != batch:
            raise ValueError(f"{op}: sample must be given unless images={len(kept)} equals batch={batch}, got None")
        if sample is not None:
            _check(op, "sample", sample, _INTS, (len(kept),), device)
    return launchers.pack(stays, width, kept, sample)


def compact(
    tensors: Sequence[Tensor],
    index: Tensor,  # (B, K)
    *,
    token_dim: int | Sequence[int] = 1,
) -> list[Tensor]:
    op = "compact"
    if isinstance(tensors, Tensor) or len(tensors) == 0:
        raise ValueError(f"{op}: tensors must be a non-empty sequence of tensors, got {type(tensors).__name__}")
    tensors = list(tensors)
    dims = [token_dim] * len(tensors) if isinstance(token_dim, int) else list(token_dim)
    if len(dims) != len(tensors):
        raise ValueError(f"{op}: token_dim must have one entry per tensor ({len(tensors)}), got {len(dims)}")
    if type(index) is not Tensor or index.dtype not in _INTS or index.dim() != 2:  # spares the usual call one check
        _check(op, "index", index, _INTS, (None, None))
    device = index.device
    for i, tensor in enumerate(tensors):
        if tensor.device != device:
            raise ValueError(f"{op}: tensors[{i}] must be on {device}, got {tensor.device}")
    return launchers.compact(tensors, index, dims)


def saliency(
    tokens: Tensor,  # (num_tokens, D)
    index: Tensor,  # (I, N)
    *,
    alone: Tensor | None = None,  # (num_tokens,)
    sharpness: float = reference.SHARPNESS,
    farthest: float = reference.FARTHEST,
    flat: float = reference.FLAT,
) -> Tensor:  # (num_tokens,)
    op = "saliency"
    _check(op, "tokens", tokens, tuple(DTYPES), (None, None), unit_stride=True)
    _check(op, "index", index, _INTS, (None, None), tokens.device)
    if alone is not None:
        _check(op, "alone", alone, (torch.bool,), (len(tokens),), tokens.device)
    constants = [float(sharpness), float(farthest), float(flat)]
    for name, value in zip(("sharpness", "farthest", "flat"), constants, strict=True):
        if not 0 < value < math.inf:
            raise ValueError(f"{op}: {name} must be above 0 and finite, got {value}")
    return launchers.saliency(tokens.detach(), index, alone, *constants)


def spread(
    alike: Tensor,  # (N, N)
    near: Tensor,  # (N,)
    count: int,
    at_once: int = 1,
    *,
    fresh: bool = False,
) -> Tensor:  # (count,)
    op = "spread"
    _check(op, "near", near, _FLOAT, (None,))
    tokens = len(near)
    _check(op, "alike", alike, _FLOAT, (tokens, tokens), near.device, unit_stride=True)
    for name, value, low, high in (("count", count, 0, tokens), ("at_once", at_once, 1, None)):
        if isinstance(value, (bool, float, Tensor)):
            raise TypeError(f"{op}: {name} must be an int, got {value!r}")
        if value < low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"in [{low}, num_tokens={high}]"
            raise ValueError(f"{op}: {name} must be {bound}, got {value}")
    return launchers.spread(alike.detach(), near.detach(), count, at_once, bool(fresh))


def adaptive_pool(
    tokens: Tensor,  # (num_tokens, D)
    plan: PoolPlan,
    mode: str = "mean",
    weight: Tensor | None = None,  # (num_tokens,)
) -> Tensor:  # (C, D)
    op = "adaptive_pool"
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if (weight is not None) != (mode == "weighted"):
        got = "None" if weight is None else "a tensor"
        raise ValueError(f'{op}: weight must be given if and only if mode is "weighted", got {got} with mode {mode!r}')
    _check(op, "tokens", tokens, tuple(DTYPES), (plan.num_tokens, None), unit_stride=True)
    if weight is not None:
        _check(op, "weight", weight, _FLOAT, (plan.num_tokens,), tokens.device)
    plan = plan.to(tokens.device)
    grad = torch.is_grad_enabled() and (tokens.requires_grad or (weight is not None and weight.requires_grad))
    inverse = plan.inverse if grad else None
    return launchers.adaptive_pool(tokens, plan.members, plan.offsets, inverse, weight, mode)[0]


for _name in reference.__all__:
    globals()[_name].__doc__ = getattr(reference, _name).__doc__
