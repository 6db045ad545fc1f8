"""``adaptive_pool`` in plain torch and its gradient, see ``crop.ops.reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from crop.geometry.pooling import PoolPlan


def adaptive_pool(
    tokens: Tensor,  # (num_tokens, D)
    plan: PoolPlan,
    mode: str = "mean",
    weight: Tensor | None = None,  # (num_tokens,)
) -> Tensor:  # (C, D)
    """Merge groups of vision tokens into one token each.

    With ``cell = members[offsets[i] : offsets[i + 1]]``, accumulated in float32 in stored order and rounded once:
    mean ``sum(x) / count``; weighted ``sum(w * x) / sum(w)``, the plain mean where ``sum(w) == 0``; max: the largest
    member per channel, a NaN wins, the first of equals wins. A cell of one member is copied bit for bit in every mode,
    whatever its weight; a cell without members gives zeros.

    Gradients: mean ``gx = gy / count``; weighted ``gx = gy * w / sum(w)`` and ``gw = <gy, x - y> / sum(w)`` (mean rule
    and 0 where ``sum(w) == 0``, and 0 for single members); max: to the member that won. Tokens in no cell get 0.

    Args:
        tokens: (num_tokens, D) float32, bfloat16 or float16; unit last stride, any row stride.
        plan: the groups of num_tokens tokens. mode: "mean", "weighted" or "max".
        weight: (num_tokens,) float32, for "weighted" only. Not validated: IEEE arithmetic decides.
    Returns:
        (plan.num_out, D), dtype of ``tokens``, contiguous.
    Raises:
        ValueError: device, rank, shape, stride, mode or weight does not fit. TypeError: unsupported dtype.
    Source: own choice; training-free stand-in for the paper's Pre-LLM Compression, which learns query tokens.
    """
    return pool(tokens, plan.members, plan.offsets, weight, mode)[0]


def pool(
    tokens: Tensor,  # (num_tokens, D)
    members: Tensor,  # (num_members,)
    offsets: Tensor,  # (C + 1,)
    weight: Tensor | None,  # (num_tokens,)
    mode: str,
) -> tuple[Tensor, Tensor]:  # (C, D), saved
    """:func:`adaptive_pool` on the arrays of a plan.

    Returns:
        The pooled tokens, and what the backward pass needs: the sums of weights (C,) for "weighted", the winning token
        of each channel (C, D) int32 for "max" (-1 in a cell without members), empty for "mean".
    """
    real = torch.promote_types(tokens.dtype, torch.float32)
    count = offsets.diff().long()
    x = tokens.to(real)
    zeros = x.new_zeros(len(count), tokens.shape[1])
    total, weighted, weights, best = zeros, zeros, zeros.new_zeros(len(count), 1), zeros
    winner = torch.full(zeros.shape, -1, dtype=torch.int32, device=x.device)
    for step in range(int(count.max()) if len(count) else 0):
        cell = (count > step).nonzero().squeeze(1)  # the cells that have a member number `step`
        row = members[offsets[:-1].long()[cell] + step].long()
        new = x[row]

        def put(total: Tensor, term: Tensor, cell: Tensor = cell, step: int = step) -> Tensor:
            return total.index_copy(0, cell, total[cell] + term if step else term)  # keeps -0

        total = put(total, new)
        if mode == "weighted":
            w = weight[row].to(real)[:, None]  # type: ignore[index]
            weights, weighted = put(weights, w), put(weighted, w * new)
        if mode == "max":
            old = best[cell]
            wins = (new > old) | (new.isnan() & ~old.isnan()) | (step == 0)
            best = best.index_copy(0, cell, torch.where(wins, new, old))
            number = row.to(torch.int32)[:, None]
            winner = winner.index_copy(0, cell, torch.where(wins, number, winner[cell]))
    single = (count == 1)[:, None]
    mean = total / count.clamp(min=1)[:, None]
    plain = (weights == 0) | single
    average = torch.where(plain, mean, weighted / torch.where(plain, 1, weights))
    out = {"mean": mean, "max": best, "weighted": average}[mode].to(tokens.dtype)
    if bool(single.any()):  # the very bits: conversions may change those of a NaN
        out = torch.where(single, tokens[members[offsets[:-1].long().clamp(max=len(members) - 1)].long()], out)
    return out, {"mean": zeros.new_empty(0), "max": winner, "weighted": weights[:, 0]}[mode]


def pool_backward(
    grad: Tensor,  # (C, D)
    tokens: Tensor | None,  # (num_tokens, D), for "weighted"
    out: Tensor | None,  # (C, D), for "weighted"
    saved: Tensor,
    offsets: Tensor,  # (C + 1,)
    inverse: Tensor,  # (num_tokens,)
    weight: Tensor | None,  # (num_tokens,)
    mode: str,
) -> tuple[Tensor, Tensor]:  # (num_tokens, D), (num_tokens,) or empty
    """Gradients of :func:`pool` by the rules of :func:`adaptive_pool`: a token reads the gradient of its own cell."""
    real = torch.promote_types(grad.dtype, torch.float32)
    num_tokens = len(inverse)
    grad_weight = torch.zeros(num_tokens if mode == "weighted" else 0, dtype=real, device=grad.device)
    if len(grad) == 0:
        return grad.new_zeros(num_tokens, grad.shape[1]), grad_weight
    cell = inverse.long().clamp(min=0)
    count = offsets.diff().long()[cell][:, None]
    gy = grad.to(real)[cell]
    gx = gy / count
    if mode == "weighted":
        total = saved[cell][:, None]
        plain = (total == 0) | (count == 1)
        total = torch.where(plain, 1, total)
        gx = torch.where(plain, gx, gy * weight[:, None] / total)  # type: ignore[index]
        offset = tokens.to(real) - out.to(real)[cell]  # type: ignore[union-attr]
        grad_weight = torch.where(plain, 0, (gy * offset).sum(1, keepdim=True) / total)[:, 0]
        grad_weight = torch.where(inverse < 0, 0, grad_weight)
    if mode == "max":
        number = torch.arange(num_tokens, device=grad.device)[:, None]
        gx = torch.where(saved[cell] == number, gy, 0)
    return torch.where((inverse < 0)[:, None], 0, gx).to(grad.dtype), grad_weight
