"""The operators as one writes them in plain torch: what they are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crop import reference
from crop.geometry.pooling import PoolPlan
from crop.selftest.cases import Case
from crop.selftest.timing import Call

Crops = list[tuple[slice, slice, int]]  # rows, columns, stride
# Error up to which a form counts as right: logits in bfloat16 move tokens across the threshold.
ROUGH = {"score + select + compact": 0.05, "attention_mass, lse given": 0.05, "attention_mass, lse computed": 0.05}


def forms_of(case: Case) -> dict[str, Call]:
    """Plain-torch forms of a case by name."""
    given = case.inputs
    if case.op == "score + select + compact":
        return {"torch rows + topk + sort + gather": partial(rows_then_gather, **given)}
    if case.op.startswith("attention_mass"):
        pair = given["query"], given["key"]
        rows = partial(mass_rows, *pair)
        if case.op == "attention_mass, lse given":
            return {"torch rows": rows, "torch grouped, lse given": partial(mass_grouped, *pair, given["lse"])}
        grouped, flash = partial(mass_grouped, *pair), partial(mass_flash_lse, *pair)
        return {"torch rows": rows, "torch grouped": grouped, "torch flash lse, grouped": flash}
    if case.op == "select":
        return {"torch.topk + sort": partial(topk_sort, **given), "torch.sort stable": partial(stable_sort, **given)}
    if case.op == "compact":
        forms: dict[str, Call] = {"index_select each": partial(index_select, **given)}
        return forms if len(given["tensors"]) > 1 else forms | {"gather": partial(gather, **given)}
    if case.op == "pack":
        return {"torch flags + cumsum + scatter": partial(reference.pack, **given)}
    if case.op == "spread":
        return {"torch round by round": partial(reference.spread, **given)}
    if case.op == "saliency":
        return {"torch image by image": partial(reference.saliency, **given)}
    plan, tokens = given["plan"], given["tokens"]
    members, offsets = plan.members.long(), plan.offsets.long()
    if case.op == "adaptive_pool, gradient":
        return {"embedding_bag": bag_backward(tokens, members, offsets, given["grad"])}
    cell = torch.repeat_interleave(torch.arange(plan.num_out, device=tokens.device), plan.counts.long())
    return {
        "embedding_bag": partial(bag, tokens, members, offsets),
        "crops + avg_pool2d + cat": partial(crops_pooled, tokens, case.size["side"]),
        "segment_reduce": partial(segments, tokens, members, offsets),
        "index_add": partial(index_add, tokens, members, cell, plan.counts.long()),
    }


def in_order(case: Case, result: Any) -> Any:
    """The result of a form as crop returns it: cells pooled crop by crop come in another order."""
    if case.op == "adaptive_pool" and result.dim() == 3:
        side = case.size["side"]
        return result[:, crop_order(side, case.inputs["plan"].to("cpu")).to(result.device)].flatten(0, 1)
    return result


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


def rows_then_gather(query: Tensor, key: Tensor, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Score, select and compact."""
    kept = topk_sort(mass_rows(query, key), k)
    return kept, gather([hidden], kept)[0]


# --- movement: index (B, k), the same for every sample ----------------------------------------------------------------


def index_select(tensors: list[Tensor], index: Tensor, dims: list[int]) -> list[Tensor]:
    return [tensor.index_select(dim, index[0]) for tensor, dim in zip(tensors, dims, strict=True)]


def gather(tensors: list[Tensor], index: Tensor, dims: Any = None) -> list[Tensor]:
    """Of tensors (B, N, width)."""
    return [tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[2])) for tensor in tensors]


# --- pooling: tokens (num_tokens, width), members and offsets int64 of a plan -----------------------------------------


def bag(tokens: Tensor, members: Tensor, offsets: Tensor) -> Tensor:
    return F.embedding_bag(members, tokens, offsets, mode="mean", include_last_offset=True)


def bag_backward(tokens: Tensor, members: Tensor, offsets: Tensor, grad: Tensor) -> Call:
    """A call of the gradient alone."""
    leaf = tokens.detach().clone().requires_grad_()
    with torch.enable_grad(), side_stream(tokens.device):
        out = bag(leaf, members, offsets)
    return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own: autograd goes back on the stream of the forward, and the default one cannot be captured."""
    if device.type != "cuda":
        yield
        return
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


def segments(tokens: Tensor, members: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(tokens[members].float(), "mean", offsets=offsets).to(tokens.dtype)


def index_add(tokens: Tensor, members: Tensor, cell: Tensor, count: Tensor) -> Tensor:
    """Means of cells, summed in float32; cell: (num_members,) of every member, count: (num_out,) members of a cell."""
    total = torch.zeros(len(count), tokens.shape[1], dtype=torch.float32, device=tokens.device)
    return (total.index_add_(0, cell, tokens[members].float()) / count[:, None]).to(tokens.dtype)


def crops_of(side: int) -> Crops:
    """``crop.selftest.cases.region_plan`` as crops for avg_pool2d."""
    b = -(-side // 16) * 4
    a, c, d = b - 4, side - b, side - b + 4
    crops = [(slice(b, c), slice(b, c), 1)]
    crops += [(slice(a, b), slice(a, d), 2), (slice(c, d), slice(a, d), 2)]
    crops += [(slice(b, c), slice(a, b), 2), (slice(b, c), slice(c, d), 2)]
    crops += [(slice(0, a), slice(0, side), 4), (slice(d, side), slice(0, side), 4)]
    crops += [(slice(a, d), slice(0, a), 4), (slice(a, d), slice(d, side), 4)]
    return [c for c in crops if c[0].stop > c[0].start and c[1].stop > c[1].start]


def crops_pooled(tokens: Tensor, side: int) -> Tensor:
    """(images, num_out of one, width), cells crop by crop."""
    grid = tokens.view(-1, side, side, tokens.shape[1]).permute(0, 3, 1, 2)
    pooled = [F.avg_pool2d(grid[:, :, y, x], stride).flatten(2) for y, x, stride in crops_of(side)]
    return torch.cat(pooled, 2).mT.contiguous()


def crop_order(side: int, plan: PoolPlan) -> Tensor:
    """Order that brings cells pooled crop by crop into that of the plan of the first image."""
    number = torch.arange(side * side).view(side, side)
    first = torch.cat([number[y, x][::s, ::s].flatten() for y, x, s in crops_of(side)])
    return plan.inverse[first].argsort()
