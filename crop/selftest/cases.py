"""Every operator on named shapes: the call, plain-torch forms of it, the check of a result, and the least work it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crop import ops
from crop.geometry.pooling import PoolPlan
from crop.selftest import torch_forms as forms
from crop.selftest.timing import Call

BF16 = torch.bfloat16


@dataclass
class Case:
    """One operator on one shape.

    Args:
        op, shape: its name; the shape is the full one, also where smaller tensors are checked.
        crop: the operator's call. torch: plain-torch forms of the same, by name.
        error: result -> 0 where it is right, else how far off it is.
        bytes, flop, exps: what every implementation must move and compute, at the full shape.
        size: the full shape by name. inputs: what other contenders can be called with.
        rough: error up to which another contender counts as right, because it rounds earlier; crop has none to spare.
    """

    op: str
    shape: str
    crop: Call
    torch: dict[str, Call]
    error: Callable[[Any], float]
    bytes: float
    flop: float = 0.0
    exps: float = 0.0
    size: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    rough: float = 0.0


def _fit(size: int, full: bool, most: int = 96) -> int:
    return size if full else min(size, most)


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


# --- score, select, compact -----------------------------------------------------------------------------------------

HEADS, KV_HEADS, DIM, WIDTH = 32, 8, 128, 4096


@dataclass
class Cut:
    """A cut inside a decoder layer: scoring rows, keys, their log-sum-exp, candidates and what is to be moved."""

    batch: int
    tokens: int
    rows: int
    device: torch.device
    full: bool

    def __post_init__(self) -> None:
        g = torch.Generator(self.device).manual_seed(0)
        options = {"generator": g, "device": self.device, "dtype": BF16}
        batch, tokens, rows = (
            _fit(self.batch, self.full, 2),
            _fit(self.tokens, self.full),
            _fit(self.rows, self.full, 3),
        )
        self.query = torch.randn(batch, HEADS, rows, DIM, **options)
        self.key = torch.randn(batch, KV_HEADS, tokens, DIM, **options)
        self.hidden = torch.randn(batch, tokens, _fit(WIDTH, self.full, 64), **options)
        self.index = torch.arange(tokens, device=self.device).expand(batch, tokens).contiguous()
        self.keep = tokens // 4
        exact = [self._logits(b).logsumexp(-1) for b in range(batch)]
        self.lse = torch.stack(exact).flatten(1, 2).float()
        self.mass = torch.stack([self._mass(b, lse) for b, lse in enumerate(exact)])
        self.largest = float(self.lse.abs().max())

    def _logits(self, b: int) -> Tensor:
        grouped = self.query[b].unflatten(0, (KV_HEADS, -1)).double()
        return torch.einsum("kgmd,ktd->kgmt", grouped, self.key[b].double()) * DIM**-0.5

    def _mass(self, b: int, lse: Tensor) -> Tensor:
        return torch.exp(self._logits(b) - lse[..., None]).mean((0, 1, 2))

    def mass_error(self, mass: Tensor) -> float:
        error = float((mass.double() / self.mass - 1).abs().max())
        return 0.0 if error < 2e-6 * (4 + self.largest) else error

    def kept_error(self, kept: Tensor) -> float:
        """Tokens that differ from the exact choice without being at the threshold, as a share."""
        chosen = torch.zeros_like(self.mass, dtype=torch.bool).scatter_(1, kept, True)
        threshold = self.mass.topk(self.keep, 1).values[:, -1:]
        sure = (self.mass / threshold - 1).abs() > 1e-4
        ascending = bool((kept.diff(dim=1) > 0).all())
        return float(((chosen != (self.mass >= threshold)) & sure).double().mean()) if ascending else 1.0

    @property
    def name(self) -> str:
        return f"B{self.batch} N{self.tokens} M{self.rows}"

    @property
    def size(self) -> dict[str, int]:
        return {"batch": self.batch, "tokens": self.tokens, "rows": self.rows}

    @property
    def score_bytes(self) -> float:
        return 2.0 * self.batch * DIM * (KV_HEADS * self.tokens + HEADS * self.rows)

    @property
    def work(self) -> dict[str, float]:
        exps = float(self.batch * HEADS * self.rows * self.tokens)
        return {"flop": 2 * DIM * exps, "exps": exps}


SHAPES = [(1, 576, 1), (1, 576, 64), (1, 2304, 64), (1, 4096, 1), (1, 4096, 32), (1, 4096, 64), (1, 4096, 128)]
SHAPES += [(1, 16384, 32), (8, 576, 64), (8, 4096, 32), (32, 576, 64), (32, 2304, 64)]


def _cuts(device: torch.device, full: bool) -> Iterator[Cut]:
    for batch, tokens, rows in SHAPES:
        yield Cut(batch, tokens, rows, device, full)


def pipeline_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """Score, select and compact one after another."""
    for s in _cuts(device, full):

        def crop(s: Cut = s) -> Any:
            kept = ops.region_topk(s.query, s.key, s.index, s.keep, lse=s.lse)
            return kept, ops.compact([s.hidden], kept)[0]

        def plain(s: Cut = s) -> Any:
            kept = forms.topk_sort(forms.mass_rows(s.query, s.key), s.keep)
            return kept, s.hidden.gather(1, kept[..., None].expand(-1, -1, s.hidden.shape[2]))

        def error(result: Any, s: Cut = s) -> float:
            kept, moved = result
            same = torch.equal(moved, s.hidden.gather(1, kept[..., None].expand_as(moved)))
            return s.kept_error(kept) if same else 1.0

        moved = 2.0 * s.batch * (s.tokens // 4) * WIDTH * 2
        yield Case(
            "score + select + compact", s.name, crop, {"torch rows + topk + sort + gather": plain}, error,
            s.score_bytes + moved, **s.work, size=s.size,
            rough=0.05,  # logits in bfloat16 move tokens across the threshold
        )  # fmt: skip


def mass_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """Attention mass, with the log-sum-exp of the rows given and without."""
    for s in _cuts(device, full):
        pair = (s.query, s.key)
        known = {"size": s.size, "inputs": {"query": s.query, "key": s.key, "lse": s.lse}, "rough": 0.05}
        rows = partial(forms.mass_rows, *pair)
        given = {"torch rows": rows, "torch grouped, lse given": partial(forms.mass_grouped, *pair, s.lse)}
        own = {
            "torch rows": rows,
            "torch grouped": partial(forms.mass_grouped, *pair),
            "torch flash lse, grouped": partial(forms.mass_flash_lse, *pair),
        }
        crop = partial(ops.attention_mass, *pair, s.index, lse=s.lse)
        yield Case(
            "attention_mass, lse given", s.name, crop, given, s.mass_error, s.score_bytes, **s.work, **known,
        )  # fmt: skip
        twice = {key: 2 * value for key, value in s.work.items()}
        crop = partial(ops.attention_mass, *pair, s.index)
        yield Case(
            "attention_mass, lse computed", s.name, crop, own, s.mass_error, 2 * s.score_bytes, **twice, **known,
        )  # fmt: skip


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

        plain: dict[str, Call] = {
            "torch.topk + sort": partial(forms.topk_sort, score, keep),
            "torch.sort stable": partial(forms.stable_sort, score, keep),
        }
        name, moved = f"B{batch} N{length} k{length // 4}", batch * (4.0 * length + 8 * (length // 4))
        yield Case(
            "select", name, partial(ops.select, score, keep), plain, error, moved,
            size={"batch": batch, "tokens": length}, inputs={"score": score, "k": keep},
        )  # fmt: skip


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

        def each(tensors: Any = tensors, dims: Any = dims, one: Tensor = one) -> list[Tensor]:
            return [tensor.index_select(dim, one) for tensor, dim in zip(tensors, dims, strict=True)]

        expected = each()

        def error(outs: list[Tensor], expected: Any = expected) -> float:
            return float(not all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True)))

        plain: dict[str, Call] = {"index_select each": each}
        if names == "hidden":
            plain["gather"] = lambda x=tensors[0], index=index: [
                x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
            ]
        kept = batch * (length // 4)
        moved = kept * sum(WIDTH * 2 if t.dim() == 3 else 2 * KV_HEADS * DIM if t.dim() == 4 else 8 for t in tensors)
        yield Case(
            "compact", f"B{batch} N{length} {names}", partial(ops.compact, tensors, index, token_dim=dims), plain,
            error, 2 * moved, size={"batch": batch, "tokens": length, "tensors": len(tensors)},
            inputs={"tensors": tensors, "index": index},
        )  # fmt: skip


# --- pooling --------------------------------------------------------------------------------------------------------


def _repeat_plan(plan: PoolPlan, images: int) -> PoolPlan:
    """The plan of so many equal images, their tokens one after another."""
    shift = torch.arange(images)[:, None]
    members = (plan.members + shift * plan.num_tokens).flatten().int()
    starts = (plan.offsets[:-1] + shift * len(plan.members)).flatten()
    offsets = torch.cat([starts, torch.tensor([len(members)])]).int()
    leader = (plan.leader + shift * plan.num_tokens).flatten().int()
    return PoolPlan(members, offsets, leader, plan.level.repeat(images), images * plan.num_tokens)


def pool_cases(device: torch.device, full: bool) -> Iterator[Case]:
    """Pooling by ``torch_forms.region_plan`` and its gradient."""
    g = torch.Generator(device).manual_seed(0)
    for side, dim, count in ((24, 4096, 1), (24, 4096, 32), (64, 3584, 1), (128, 3584, 1), (128, 3584, 8)):
        width, images = _fit(dim, full, 16), _fit(count, full, 2)
        single, _, _, crops = forms.region_plan(side)
        plan = _repeat_plan(single, images).to(device)
        tokens = torch.randn(images * side * side, width, generator=g, device=device).to(BF16)
        members, offsets = plan.members.long(), plan.offsets.long()
        members_of = offsets.diff()
        cell = torch.repeat_interleave(torch.arange(plan.num_out, device=device), members_of)
        exact = torch.zeros(plan.num_out, width, dtype=torch.float64, device=device)
        exact.index_add_(0, cell, tokens[members].double()).div_(members_of[:, None])

        def bag(x: Tensor = tokens, members: Tensor = members, offsets: Tensor = offsets) -> Tensor:
            return F.embedding_bag(members, x, offsets, mode="mean", include_last_offset=True)

        def pooled(x: Tensor = tokens, side: int = side, images: int = images, crops: Any = crops) -> Tensor:
            grid = x.view(images, side, side, -1).permute(0, 3, 1, 2)
            return torch.cat([F.avg_pool2d(grid[:, :, y, x], s).flatten(2) for y, x, s in crops], 2).mT.contiguous()

        def segments(x: Tensor = tokens, members: Tensor = members, offsets: Tensor = offsets) -> Tensor:
            return torch.segment_reduce(x[members].float(), "mean", offsets=offsets).to(x.dtype)

        leaders = forms.crop_leaders(side, crops).to(device)

        def error(out: Tensor, exact: Tensor = exact, leaders: Tensor = leaders) -> float:
            if out.dim() == 3:  # crops come in another order
                out = out[:, leaders].flatten(0, 1)
            return _beyond(float((out.double() - exact).abs().max()))

        name = f"{count} x {side}x{side}x{dim} -> {count * single.num_out}"
        plain: dict[str, Call] = {
            "embedding_bag": bag,
            "crops + avg_pool2d + cat": pooled,
            "segment_reduce": segments,
            "index_add": partial(forms.index_add, tokens, members, cell, members_of),
        }
        moved = 2.0 * count * (single.num_tokens + single.num_out) * dim
        size = {"side": side, "images": count, "dim": dim}
        yield Case(
            "adaptive_pool", name, partial(ops.adaptive_pool, tokens, plan), plain, error, moved, size=size,
            inputs={"tokens": tokens, "members": members, "offsets": offsets},
        )  # fmt: skip

        # The gradient alone: the very operator that autograd calls, and autograd itself for torch.
        grad = torch.randn(plan.num_out, width, generator=g, device=device).to(BF16)
        want = torch.empty(plan.num_tokens, width, dtype=torch.float64, device=device)
        want[members] = grad[cell].double() / members_of[cell][:, None]
        arguments = (grad, None, None, torch.empty(0, device=device), plan.offsets, plan.inverse, None, "mean")

        def backward(arguments: Any = arguments) -> Tensor:
            return torch.ops.crop.adaptive_pool_backward.default(*arguments)[0]

        leaf = tokens.detach().clone().requires_grad_()
        with torch.enable_grad(), side_stream(device):
            out = bag(leaf)

        def bag_backward(out: Tensor = out, leaf: Tensor = leaf, grad: Tensor = grad) -> Tensor:
            return torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]

        def gradient_error(result: Tensor, want: Tensor = want) -> float:
            return _beyond(float((result.double() - want).abs().max()))

        yield Case(
            "adaptive_pool, gradient", name, backward, {"embedding_bag": bag_backward}, gradient_error, moved, size=size,
        )  # fmt: skip


def _beyond(error: float, slack: float = 0.02) -> float:
    """0 where the error is within the rounding of bfloat16."""
    return 0.0 if error < slack else error


# Name -> (device, full size?) -> cases. Small tensors where nothing is timed; a case keeps the name of the full size.
CASES: dict[str, Callable[[torch.device, bool], Iterator[Case]]] = {
    "pipeline": pipeline_cases,
    "mass": mass_cases,
    "select": select_cases,
    "compact": compact_cases,
    "pool": pool_cases,
}
