"""Every operator on named shapes: the call, the check of its result by the definition, the least work it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crop import ops
from crop.geometry import PoolPlan, Region, VisionLayout
from crop.geometry.strides import build_plan
from crop.selftest.timing import Call

BF16 = torch.bfloat16
HEADS, KV_HEADS, DIM, WIDTH = 32, 8, 128, 4096


@dataclass
class Case:
    """One operator on one shape.

    Args:
        op, shape: its name; the shape is the full one, also where smaller tensors are checked.
        crop: the operator's call.
        error: result -> 0 where it is right, else how far off it is.
        bytes, flop, exps: what every implementation must move and compute, at the full shape.
        size: the full shape by name. inputs: what other contenders can be called with.
    """

    op: str
    shape: str
    crop: Call
    error: Callable[[Any], float]
    bytes: float
    flop: float = 0.0
    exps: float = 0.0
    size: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


def _fit(size: int, full: bool, most: int = 96) -> int:
    return size if full else min(size, most)


# --- score, select, compact -----------------------------------------------------------------------------------------

SHAPES = [(1, 576, 1), (1, 576, 64), (1, 2304, 64), (1, 4096, 1), (1, 4096, 32), (1, 4096, 64), (1, 4096, 128)]
SHAPES += [(1, 16384, 32), (8, 576, 64), (8, 4096, 32), (32, 576, 64), (32, 2304, 64)]
SHAPES += [(1, 576, 64, 32), (1, 2880, 1, 32), (1, 2880, 64, 32), (8, 576, 64, 32)]  # a KV head for every query head


class Cut:
    """A cut inside a decoder layer: scoring rows, keys, their log-sum-exp, candidates and what is to be moved."""

    def __init__(
        self, device: torch.device, full: bool, batch: int, tokens: int, rows: int, kv_heads: int = KV_HEADS
    ) -> None:
        self.name = f"B{batch} N{tokens} M{rows}" + ("" if kv_heads == KV_HEADS else f" {HEADS}/{kv_heads} heads")
        self.size = {"batch": batch, "tokens": tokens, "rows": rows}
        self.bytes = 2.0 * batch * DIM * (kv_heads * tokens + HEADS * rows)
        self.moved = 2.0 * batch * (tokens // 4) * WIDTH * 2
        self.exps = float(batch * HEADS * rows * tokens)
        batch, tokens, rows = _fit(batch, full, 2), _fit(tokens, full), _fit(rows, full, 3)
        options = {"generator": torch.Generator(device).manual_seed(0), "device": device, "dtype": BF16}
        self.query = torch.randn(batch, HEADS, rows, DIM, **options)
        self.key = torch.randn(batch, kv_heads, tokens, DIM, **options)
        self.hidden = torch.randn(batch, tokens, _fit(WIDTH, full, 64), **options)
        self.index = torch.arange(tokens, device=device).expand(batch, tokens).contiguous()
        self.keep = tokens // 4
        exact = [self._logits(sample).logsumexp(-1) for sample in range(batch)]
        self.lse = torch.stack(exact).flatten(1, 2).float()
        masses = [torch.exp(self._logits(b) - lse[..., None]).mean((0, 1, 2)) for b, lse in enumerate(exact)]
        self.mass = torch.stack(masses)

    def _logits(self, sample: int) -> Tensor:
        grouped = self.query[sample].unflatten(0, (self.key.shape[1], -1)).double()
        return torch.einsum("kgmd,ktd->kgmt", grouped, self.key[sample].double()) * DIM**-0.5

    def mass_error(self, mass: Tensor) -> float:
        error = float((mass.double() / self.mass - 1).abs().max())
        return 0.0 if error < 2e-6 * (4 + float(self.lse.abs().max())) else error

    def moved_error(self, result: tuple[Tensor, Tensor]) -> float:
        """1 for wrong rows or order, else the share of tokens chosen wrongly, those at the threshold aside."""
        kept, moved = result
        chosen = torch.zeros_like(self.mass, dtype=torch.bool).scatter_(1, kept, True)
        threshold = self.mass.topk(self.keep, 1).values[:, -1:]
        sure = (self.mass / threshold - 1).abs() > 1e-4
        same = torch.equal(moved, self.hidden.gather(1, kept[..., None].expand_as(moved)))
        ascending = bool((kept.diff(dim=1) > 0).all())
        return float(((chosen != (self.mass >= threshold)) & sure).double().mean()) if same and ascending else 1.0

    def run(self) -> tuple[Tensor, Tensor]:
        kept = ops.region_topk(self.query, self.key, self.index, self.keep, lse=self.lse)
        return kept, ops.compact([self.hidden], kept)[0]


def pipeline_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """Score, select and compact one after another."""
    for shape in SHAPES:
        cut = Cut(device, full, *shape)
        work = (cut.bytes + cut.moved, 2 * DIM * cut.exps, cut.exps)
        inputs = {"query": cut.query, "key": cut.key, "hidden": cut.hidden, "k": cut.keep}
        yield Case("score + select + compact", cut.name, cut.run, cut.moved_error, *work, cut.size, inputs)


def mass_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """Attention mass, with the log-sum-exp of the rows given and without."""
    for shape in SHAPES:
        cut = Cut(device, full, *shape)
        call = partial(ops.attention_mass, cut.query, cut.key, cut.index)
        work = (cut.bytes, 2 * DIM * cut.exps, cut.exps)
        inputs = {"query": cut.query, "key": cut.key, "lse": cut.lse}
        given = partial(call, lse=cut.lse)
        yield Case("attention_mass, lse given", cut.name, given, cut.mass_error, *work, cut.size, inputs)
        work = tuple(2 * value for value in work)
        yield Case("attention_mass, lse computed", cut.name, call, cut.mass_error, *work, cut.size, inputs)


def select_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """The best quarter of scores that look like masses: few exponents."""
    for batch, length in ((1, 576), (1, 2304), (1, 4096), (1, 8192), (1, 16384), (32, 4096), (32, 16384)):
        tokens = _fit(length, full)
        g = torch.Generator(device).manual_seed(tokens)
        score = torch.randn(batch, tokens, generator=g, device=device).div(4).exp() / tokens
        keep = tokens // 4
        expected = score.sort(stable=True, descending=True).indices[:, :keep].sort().values

        def error(kept: Tensor, expected: Tensor = expected) -> float:
            return float((kept.long() != expected).double().mean())

        name, moved = f"B{batch} N{length} k{length // 4}", batch * (4.0 * length + 8 * (length // 4))
        size, inputs = {"batch": batch, "tokens": length}, {"score": score, "k": keep}
        yield Case("select", name, partial(ops.select, score, keep), error, moved, size=size, inputs=inputs)


def pack_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """Every third token between ten of text on either side stays."""
    for batch, length in ((1, 576), (1, 4096), (8, 4096), (1, 16384)):
        tokens = _fit(length, full)
        place = torch.arange(tokens + 20, device=device).expand(batch, -1)
        stays = (place < 10) | (place >= tokens + 10)
        kept = place[:, 10 : tokens + 10 : 3].contiguous()
        width = kept.shape[1] + 25  # five fillers
        row = torch.cat([kept.new_full((5,), -1), place[0, :10], kept[0], place[0, -10:]])

        def error(result: tuple[Tensor, Tensor], row: Tensor = row) -> float:
            slots = torch.full_like(result[1][0], -1)
            slots[row[5:]] = torch.arange(5, len(row), device=row.device)
            return float(not (bool((result[0] == row).all()) and bool((result[1] == slots).all())))

        name, moved = f"B{batch} L{length + 20}", batch * (9.0 * length + 16 * (length // 3))
        inputs = {"stays": stays, "width": width, "kept": kept}
        size = {"batch": batch, "tokens": length}
        yield Case("pack", name, partial(ops.pack, **inputs), error, moved, size=size, inputs=inputs)


def compact_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """A quarter of the tokens of what leaves together at a cut."""
    g = torch.Generator(device).manual_seed(0)  # their own: a capture that fails can leave the common one unusable
    for batch, length, names in ((1, 4096, "hidden"), (1, 4096, "hidden + K + V"), (1, 576, "hidden + K + V + 3 ids"),
                                 (8, 4096, "hidden"), (8, 4096, "hidden + K + V")):  # fmt: skip
        tokens, width = _fit(length, full), _fit(WIDTH, full, 64)
        tensors, dims = [torch.randn(batch, tokens, width, generator=g, device=device).to(BF16)], [1]
        if "K + V" in names:
            caches = [torch.randn(batch, KV_HEADS, tokens, DIM, generator=g, device=device) for _ in range(2)]
            tensors += [cache.to(BF16) for cache in caches]
            dims += [2, 2]
        if "ids" in names:
            tensors += [torch.arange(tokens, device=device).expand(batch, tokens).contiguous() for _ in range(3)]
            dims += [1, 1, 1]
        one = torch.randperm(tokens, generator=g, device=device)[: tokens // 4].sort().values
        index = one.expand(batch, -1).contiguous()  # the same for every sample, so that index_select can take part
        expected = [tensor.index_select(dim, one) for tensor, dim in zip(tensors, dims, strict=True)]

        def error(outs: list[Tensor], expected: list[Tensor] = expected) -> float:
            return float(not all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True)))

        rows = sum(WIDTH * 2 if t.dim() == 3 else 2 * KV_HEADS * DIM if t.dim() == 4 else 8 for t in tensors)
        yield Case(
            "compact", f"B{batch} N{length} {names}", partial(ops.compact, tensors, index, token_dim=dims), error,
            2 * batch * (length // 4) * rows, size={"batch": batch, "tokens": length, "tensors": len(tensors)},
            inputs={"tensors": tensors, "index": index, "dims": dims},
        )  # fmt: skip


# --- pooling --------------------------------------------------------------------------------------------------------


def region_plan(side: int) -> PoolPlan:
    """Grid of side x side tokens: the middle quarter whole, a ring of four tokens 2 x 2, the rest 4 x 4."""
    edge = -(-side // 16) * 4  # a multiple of 4, so that no cell is cut
    layout, box = VisionLayout.grid(side, side), (edge / side, 1 - edge / side)
    level = layout.levels(Region.box(box[0], box[0], box[1], box[1]), 4)
    return build_plan(layout, level, (1, 2, 4))


def spread_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """A ninth of the tokens of an image, as pooling by features chooses them: 64 rounds at most."""
    for length in (576, 2304, 4096):
        tokens = _fit(length, full)
        rows = torch.nn.functional.normalize(torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)), dim=1)
        alike = rows @ rows.T
        count = tokens // 9
        at_once = -(-count // 64)
        given = (alike, alike[0], count, at_once)
        expected = ops.reference.spread(*given).tolist()  # on the CPU: a product on the device may round otherwise

        def error(chosen: Tensor, expected: list[int] = expected) -> float:
            return sum(a != b for a, b in zip(chosen.tolist(), expected, strict=True)) / len(expected)

        inputs = dict(zip(("alike", "near", "count", "at_once"), given, strict=True))
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        moved = 4.0 * length * (length // 9)
        yield Case("spread", f"N{length} k{length // 9}", partial(ops.spread, **inputs), error, moved,
                   size={"tokens": length}, inputs=inputs)  # fmt: skip


def saliency_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """Weights of every image of a batch."""
    g = torch.Generator(device).manual_seed(0)
    for images, length, dim in ((1, 576, 4096), (8, 576, 4096), (1, 2880, 4096), (1, 4096, 3584), (1, 16384, 3584)):
        tokens, width, count = _fit(length, full), _fit(dim, full, 64), _fit(images, full, 2)
        common = torch.randn(width, generator=g, device=device)
        x = (common + 0.7 * torch.randn(count * tokens, width, generator=g, device=device)).to(BF16)
        index = torch.arange(count * tokens, device=device).view(count, tokens)
        own = x.view(count, tokens, width).double()
        near = torch.cosine_similarity(own, own.mean(1, keepdim=True), dim=2)
        off = near.mean(1, keepdim=True) - near
        z = off / (off.std(1, correction=0, keepdim=True) + ops.reference.FLAT)
        exact = z.flatten()

        def error(weight: Tensor, exact: Tensor = exact) -> float:
            worst = float((weight.double().log() - exact).abs().max())
            return 0.0 if worst < 1e-3 else worst  # float32 distances, in their standard deviations

        size = {"images": images, "tokens": length, "dim": dim}
        inputs = {"tokens": x, "index": index, "sharpness": 1.0}  # weights that a float32 error does not hide in
        call, moved = partial(ops.saliency, **inputs), 4.0 * images * length * dim  # every token twice
        yield Case("saliency", f"{images} x {length}x{dim}", call, error, moved, size=size, inputs=inputs)


def pool_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """Pooling by ``region_plan`` and its gradient."""
    g = torch.Generator(device).manual_seed(0)
    for side, dim, count in ((24, 4096, 1), (24, 4096, 32), (64, 3584, 1), (128, 3584, 1), (128, 3584, 8)):
        width, images = _fit(dim, full, 16), _fit(count, full, 2)
        single = region_plan(side)
        plan = PoolPlan.concatenate([single] * images).to(device)
        members, sizes = plan.members.long(), plan.counts.long()
        cell = torch.repeat_interleave(torch.arange(plan.num_out, device=device), sizes)
        tokens = torch.randn(images * side * side, width, generator=g, device=device).to(BF16)
        grad = torch.randn(plan.num_out, width, generator=g, device=device).to(BF16)
        pooled = torch.zeros(plan.num_out, width, dtype=torch.float64, device=device)
        pooled.index_add_(0, cell, tokens[members].double()).div_(sizes[:, None])
        spread = torch.empty(plan.num_tokens, width, dtype=torch.float64, device=device)
        spread[members] = grad[cell].double() / sizes[cell][:, None]

        def error(result: Tensor, exact: Tensor) -> float:
            worst = float((result.double() - exact).abs().max())
            return 0.0 if worst < 0.02 else worst  # the rounding of bfloat16

        def backward(grad: Tensor = grad, plan: PoolPlan = plan) -> Tensor:
            nothing = torch.empty(0, device=grad.device)
            backward = torch.ops.crop.adaptive_pool_backward.default  # the very operator that autograd calls
            return backward(grad, None, None, nothing, plan.offsets, plan.inverse, None, "mean")[0]

        name = f"{count} x {side}x{side}x{dim} -> {count * single.num_out}"
        moved = 2.0 * count * (single.num_tokens + single.num_out) * dim
        known = {
            "size": {"side": side, "images": count, "dim": dim},
            "inputs": {"tokens": tokens, "plan": plan, "grad": grad},
        }
        pool = partial(ops.adaptive_pool, tokens, plan)
        yield Case("adaptive_pool", name, pool, partial(error, exact=pooled), moved, **known)
        yield Case("adaptive_pool, gradient", name, backward, partial(error, exact=spread), moved, **known)


# Name -> (device, full size?) -> cases. Small tensors where nothing is timed; a case keeps the name of the full size.
CASES: dict[str, Callable[[torch.device, bool], Iterator[Case]]] = {
    "pipeline": pipeline_cases,
    "mass": mass_cases,
    "select": select_cases,
    "pack": pack_cases,
    "compact": compact_cases,
    "spread": spread_cases,
    "saliency": saliency_cases,
    "pool": pool_cases,
}
