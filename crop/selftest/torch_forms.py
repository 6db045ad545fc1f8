"""The operators as one writes them in plain torch: what they are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from crop.geometry.pooling import PoolPlan

Crops = list[tuple[slice, slice, int]]  # rows, columns, stride


# --- mass: query (B, H, M, d), key (B, Hkv, N, d), lse (B, H, M) natural -> (B, N) ------------------------------------


def repeated(query: Tensor, key: Tensor) -> Tensor:
    """Keys with as many heads as the queries."""
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1)


def mass_rows(query: Tensor, key: Tensor) -> Tensor:
    """Repeated keys, float32 softmax."""
    logits = (query @ repeated(query, key).mT) * query.shape[3] ** -0.5
    return logits.float().softmax(-1).mean((1, 2))


def mass_grouped(query: Tensor, key: Tensor, lse: Tensor | None = None) -> Tensor:
    """Without repeated keys; with the log-sum-exp given one pass less over the logits."""
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    logits = ((grouped @ key.mT) * query.shape[3] ** -0.5).float()
    if lse is None:
        return logits.softmax(-1).mean((1, 2))
    return logits.sub_(lse.reshape(*logits.shape[:3], 1)).exp_().mean((1, 2))


def mass_flash_lse(query: Tensor, key: Tensor) -> Tensor:
    """torch's own flash attention for the log-sum-exp (keys stand in for values), then the grouped product."""
    wide, aten = repeated(query, key), torch.ops.aten
    flash = aten._scaled_dot_product_flash_attention
    flash = flash if query.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    return mass_grouped(query, key, flash(query, wide, wide)[1][..., : query.shape[2]])


# --- selection: score (B, N) float32 -> (B, k) ascending indices ------------------------------------------------------


def topk_sort(score: Tensor, k: int) -> Tensor:
    return score.topk(k, 1, sorted=False).indices.sort().values


def stable_sort(score: Tensor, k: int) -> Tensor:
    return score.sort(stable=True, descending=True).indices[:, :k].sort().values


# --- pooling ----------------------------------------------------------------------------------------------------------


def index_add(tokens: Tensor, members: Tensor, cell: Tensor, count: Tensor) -> Tensor:
    """Means of cells, summed in float32; cell: (num_members,) of every member, count: (num_out,) members of a cell."""
    total = torch.zeros(len(count), tokens.shape[1], dtype=torch.float32, device=tokens.device)
    return (total.index_add_(0, cell, tokens[members].float()) / count[:, None]).to(tokens.dtype)


def region_plan(size: int) -> tuple[PoolPlan, Tensor, Tensor, Crops]:
    """Grid of size x size: the middle quarter whole, a ring 2 x 2, the rest 4 x 4; also as crops for avg_pool2d.

    Returns:
        (plan, members (num_members,) int64, offsets (num_out + 1,) int64, crops).
    """
    b = -(-size // 16) * 4  # multiples of 4: cells and crops agree
    a, c, d = b - 4, size - b, size - b + 4
    row, col = torch.arange(size * size) // size, torch.arange(size * size) % size
    inside = (row >= b) & (row < c) & (col >= b) & (col < c)
    ring = ~inside & (row >= a) & (row < d) & (col >= a) & (col < d)
    stride = torch.where(inside, 1, torch.where(ring, 2, 4))
    key = (stride * size + row // stride) * size + col // stride
    _, cell = key.unique(return_inverse=True)
    order = cell.argsort(stable=True)
    counts = cell.bincount()
    first = order[counts.cumsum(0) - counts]
    groups = [g for _, g in sorted(zip(first.tolist(), order.split(counts.tolist()), strict=True), key=lambda p: p[0])]
    sizes = torch.tensor([len(g) for g in groups])
    members, offsets = torch.cat(groups), torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    leader = members[offsets[:-1]]
    plan = PoolPlan(
        members.int(), offsets.int(), leader.int(), torch.zeros(len(groups), dtype=torch.uint8), size * size
    )
    crops = [(slice(b, c), slice(b, c), 1)]
    crops += [(slice(a, b), slice(a, d), 2), (slice(c, d), slice(a, d), 2)]
    crops += [(slice(b, c), slice(a, b), 2), (slice(b, c), slice(c, d), 2)]
    crops += [(slice(0, a), slice(0, size), 4), (slice(d, size), slice(0, size), 4)]
    crops += [(slice(a, d), slice(0, a), 4), (slice(a, d), slice(d, size), 4)]
    return plan, members, offsets, [c for c in crops if c[0].stop > c[0].start and c[1].stop > c[1].start]


def crop_leaders(size: int, crops: Crops) -> Tensor:
    """Order that brings cells pooled crop by crop into the order of ``region_plan``."""
    number = torch.arange(size * size).view(size, size)
    return torch.cat([number[y, x][::s, ::s].flatten() for y, x, s in crops]).argsort()
