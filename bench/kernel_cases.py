"""What `bench_kernels.py` times: every CUDA kernel on named shapes, its peers, its bytes and products, its bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peers
import torch
import torch.nn.functional as F
from bench_ops import region_plan
from peers import Call
from torch import Tensor

from crop import ops
from crop.geometry.pooling import PoolPlan

MMA, EXP = 798e12, 3.9e12  # per second
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BF16 = torch.bfloat16


@dataclass
class Case:
    """One row. ``peers``: name -> call, or the name of a module that is not installed."""

    op: str
    shape: str
    crop: Call
    peers: dict[str, Call | str]
    wrong: Callable[[Any], float]  # 0 where a result is right, else its error
    bytes: float
    flop: float = 0.0
    exps: float = 0.0
    rough: float = 0.0  # error up to which a peer is ranked; crop itself has none to spare
    most_us: float | None = None  # bars: graph replay at most
    most_floors: float | None = None  # at most so many floors
    least: dict[str, float] = field(default_factory=dict)  # at least so many times as fast as a peer

    def floor(self, bandwidth: float) -> float:
        return max(self.bytes / bandwidth, self.flop / MMA, self.exps / EXP) * 1e6


def small(size: int, most: int = 96) -> int:
    """The size itself, or a small one where nothing is timed. Names and bytes are those of the size itself."""
    return size if GPU else min(size, most)


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """A stream of its own: autograd goes back on the stream of the forward, and the default one cannot be captured."""
    if not GPU:
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
class Scene:
    """A cut inside a decoder layer: scoring rows, keys, their log-sum-exp, candidates and what is to be moved."""

    batch: int
    tokens: int
    rows: int
    kv_heads: int = KV_HEADS

    def __post_init__(self) -> None:
        g = torch.Generator(DEVICE).manual_seed(0)
        shape = {"generator": g, "device": DEVICE, "dtype": BF16}
        batch, tokens, rows = small(self.batch, 2), small(self.tokens), small(self.rows, 3)
        self.query = torch.randn(batch, HEADS, rows, DIM, **shape)
        self.key = torch.randn(batch, self.kv_heads, tokens, DIM, **shape)
        self.hidden = torch.randn(batch, tokens, small(WIDTH, 64), **shape)
        self.index = torch.arange(tokens, device=DEVICE).expand(batch, tokens).contiguous()
        self.keep = tokens // 4
        exact = [self.logits(b).logsumexp(-1) for b in range(batch)]
        self.lse = torch.stack(exact).flatten(1, 2).float()
        self.mass = torch.stack([self.exact(b, lse) for b, lse in enumerate(exact)])
        self.largest = float(self.lse.abs().max())

    def logits(self, b: int) -> Tensor:
        grouped = self.query[b].unflatten(0, (self.kv_heads, -1)).double()
        return torch.einsum("kgmd,ktd->kgmt", grouped, self.key[b].double()) * DIM**-0.5

    def exact(self, b: int, lse: Tensor) -> Tensor:
        return torch.exp(self.logits(b) - lse[..., None]).mean((0, 1, 2))

    def wrong_mass(self, mass: Tensor) -> float:
        error = float((mass.double() / self.mass - 1).abs().max())
        return 0.0 if error < 2e-6 * (4 + self.largest) else error

    def wrong_kept(self, kept: Tensor) -> float:
        """Tokens that differ from the exact choice without being at the threshold, as a share."""
        chosen = torch.zeros_like(self.mass, dtype=torch.bool).scatter_(1, kept, True)
        threshold = self.mass.topk(self.keep, 1).values[:, -1:]
        sure = (self.mass / threshold - 1).abs() > 1e-4
        ascending = bool((kept.diff(dim=1) > 0).all())
        return float(((chosen != (self.mass >= threshold)) & sure).double().mean()) if ascending else 1.0

    @property
    def score_bytes(self) -> float:
        return 2.0 * self.batch * DIM * (self.kv_heads * self.tokens + HEADS * self.rows)

    @property
    def work(self) -> dict[str, float]:
        exps = float(self.batch * HEADS * self.rows * self.tokens)
        return {"flop": 2 * DIM * exps, "exps": exps}


SHAPES = [(1, 576, 1), (1, 576, 64), (1, 2304, 64), (1, 4096, 1), (1, 4096, 32), (1, 4096, 64), (1, 4096, 128)]
SHAPES += [(1, 16384, 32), (8, 576, 64), (8, 4096, 32), (32, 576, 64), (32, 2304, 64)]


def scenes() -> Iterator[tuple[str, Scene]]:
    for batch, tokens, rows in SHAPES:
        yield f"B{batch} N{tokens} M{rows}", Scene(batch, tokens, rows)


def pipeline_cases() -> Iterator[Case]:
    for name, s in scenes():

        def crop(s: Scene = s) -> Any:
            kept = ops.region_topk(s.query, s.key, s.index, s.keep, lse=s.lse)
            return kept, ops.compact([s.hidden], kept)[0]

        def plain(s: Scene = s) -> Any:
            kept = peers.topk_sort(peers.torch_rows(s.query, s.key), s.keep)
            return kept, s.hidden.gather(1, kept[..., None].expand(-1, -1, s.hidden.shape[2]))

        def wrong(result: Any, s: Scene = s) -> float:
            kept, moved = result
            same = torch.equal(moved, s.hidden.gather(1, kept[..., None].expand_as(moved)))
            return s.wrong_kept(kept) if same else 1.0

        moved = 2.0 * s.batch * (s.tokens // 4) * WIDTH * 2
        case = Case("score + select + compact", name, crop, {"torch rows + topk + sort + gather": plain}, wrong,
                    s.score_bytes + moved, **s.work)  # fmt: skip
        if s.batch == 1 and s.tokens <= 4096 and s.rows <= 64:
            case.most_us = 12.0
        case.rough = 0.05  # logits in bfloat16 move tokens across the threshold
        case.most_floors = 1.4  # where the floor is 60 us or more
        yield case


def mass_cases() -> Iterator[Case]:
    for name, s in scenes():
        pair, keys_values = (s.query, s.key), "keys_values.attention.flashinfer_wrapper"
        own: dict[str, Call | str] = {
            "torch rows": partial(peers.torch_rows, *pair),
            "torch grouped": partial(peers.torch_grouped, *pair),
            "torch flash lse, grouped": partial(peers.torch_flash_lse, *pair),
            "flash_attn lse, grouped": peers.call("flash_attn", peers.flash_attn_then, *pair, peers.torch_grouped),
            "flash_colreduce": peers.call("flash_colreduce", peers.flash_colreduce, *pair),
            "flag_attn": peers.call("flag_attn", peers.flag_attn, *pair),
        }
        given = {
            "torch rows": own["torch rows"],
            "torch grouped, lse given": partial(peers.torch_grouped, *pair, s.lse),
            "flash_colreduce": own["flash_colreduce"],
            "keys_values": peers.call(keys_values, peers.keys_values, *pair, s.lse),
        }
        yield Case(
            "attention_mass, lse given",
            name,
            lambda s=s: ops.attention_mass(s.query, s.key, s.index, lse=s.lse),
            given,
            s.wrong_mass,
            s.score_bytes,
            **s.work,
            least={"torch rows": 5.0, "flash_colreduce": 1.5, "keys_values": 1.5},
            rough=0.05,
        )
        yield Case(
            "attention_mass, lse computed",
            name,
            lambda s=s: ops.attention_mass(s.query, s.key, s.index),
            own,
            s.wrong_mass,
            2 * s.score_bytes,
            **{key: 2 * value for key, value in s.work.items()},
            rough=0.05,
        )


def select_cases() -> Iterator[Case]:
    for batch, full in ((1, 576), (1, 2304), (1, 4096), (1, 8192), (1, 16384), (32, 4096), (32, 16384)):
        tokens = small(full)
        g = torch.Generator(DEVICE).manual_seed(tokens)
        score = (
            torch.randn(batch, tokens, generator=g, device=DEVICE).div(4).exp() / tokens
        )  # like masses: few exponents
        keep = tokens // 4
        expected = score.sort(stable=True, descending=True).indices[:, :keep].sort().values

        def wrong(kept: Tensor, expected: Tensor = expected) -> float:
            return float((kept.long() != expected).double().mean())

        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=DEVICE)
        rows = (score, keep, torch.zeros_like(lengths), lengths)
        others: dict[str, Call | str] = {
            "torch.topk + sort": partial(peers.topk_sort, score, keep),
            "torch.sort stable": partial(peers.stable_sort, score, keep),
            "flashinfer.top_k + sort": peers.call("flashinfer", peers.flashinfer, score, keep),
            "flashinfer ragged + sort": peers.call("flashinfer", peers.flashinfer_ragged, *rows),
            "vllm top_k_per_row + sort": peers.call("vllm._C", peers.vllm, *rows),
        }
        if full // 4 == 2048:
            others["sgl fast_topk_v2 + sort"] = peers.call("sgl_kernel", peers.sgl, score, keep, lengths)
        crop = lambda score=score, keep=keep: ops.select(score, keep)  # noqa: E731
        yield Case("select", f"B{batch} N{full} k{full // 4}", crop, others, wrong, batch * (4.0 * full + 8 * (full // 4)),
                   most_us=5.0 if (batch, full) == (1, 8192) else None, least={"torch.topk + sort": 2.0})  # fmt: skip


def compact_cases() -> Iterator[Case]:
    g = torch.Generator(DEVICE).manual_seed(0)  # their own: a capture that fails can leave the common one unusable
    for batch, full, names in ((1, 4096, "hidden"), (1, 4096, "hidden + K + V"), (1, 576, "hidden + K + V + 3 ids"),
                                 (8, 4096, "hidden"), (8, 4096, "hidden + K + V")):  # fmt: skip
        tokens, width = small(full), small(WIDTH, 64)
        tensors, dims = [torch.randn(batch, tokens, width, generator=g, device=DEVICE).to(BF16)], [1]
        if "K + V" in names:
            caches = [torch.randn(batch, KV_HEADS, tokens, DIM, generator=g, device=DEVICE) for _ in range(2)]
            tensors += [cache.to(BF16) for cache in caches]
            dims += [2, 2]
        if "ids" in names:
            tensors += [torch.arange(tokens, device=DEVICE).expand(batch, tokens).contiguous() for _ in range(3)]
            dims += [1, 1, 1]
        one = torch.randperm(tokens, generator=g, device=DEVICE)[: tokens // 4].sort().values
        index = one.expand(batch, -1).contiguous()  # the same for every sample, so that index_select can take part

        def each(tensors: Any = tensors, dims: Any = dims, one: Tensor = one) -> list[Tensor]:
            return [tensor.index_select(dim, one) for tensor, dim in zip(tensors, dims, strict=True)]

        expected = each()

        def wrong(outs: list[Tensor], expected: Any = expected) -> float:
            return float(not all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True)))

        crop = lambda tensors=tensors, dims=dims, index=index: ops.compact(tensors, index, token_dim=dims)  # noqa: E731
        others: dict[str, Call | str] = {"index_select each": each}
        if names == "hidden":
            others["gather"] = lambda x=tensors[0], index=index: [
                x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
            ]
            first = peers.call("flash_attn.bert_padding", peers.first_axis, tensors[0], index)
            others["flash_attn index_first_axis"] = first if isinstance(first, str) else lambda first=first: [first()]
        kept = batch * (full // 4)
        moved = kept * sum(WIDTH * 2 if t.dim() == 3 else 2 * KV_HEADS * DIM if t.dim() == 4 else 8 for t in tensors)
        bar = 1.0 if len(tensors) < 3 else 1.01
        yield Case("compact", f"B{batch} N{full} {names}", crop, others, wrong, 2 * moved,
                   least={"index_select each": bar})  # fmt: skip


# --- pooling --------------------------------------------------------------------------------------------------------


def repeat_plan(plan: PoolPlan, images: int) -> PoolPlan:
    """The plan of so many equal images, their tokens one after another."""
    shift = torch.arange(images)[:, None]
    members = (plan.members + shift * plan.num_tokens).flatten().int()
    starts = (plan.offsets[:-1] + shift * len(plan.members)).flatten()
    offsets = torch.cat([starts, torch.tensor([len(members)])]).int()
    leader = (plan.leader + shift * plan.num_tokens).flatten().int()
    return PoolPlan(members, offsets, leader, plan.level.repeat(images), images * plan.num_tokens)


def pool_cases() -> Iterator[Case]:
    g = torch.Generator(DEVICE).manual_seed(0)
    for side, dim, count in ((24, 4096, 1), (24, 4096, 32), (64, 3584, 1), (128, 3584, 1), (128, 3584, 8)):
        width, images = small(dim, 16), small(count, 2)
        single, _, _, crops = region_plan(side)
        plan = repeat_plan(single, images).to(DEVICE)
        tokens = torch.randn(images * side * side, width, generator=g, device=DEVICE).to(BF16)
        members, offsets = plan.members.long(), plan.offsets.long()
        members_of = offsets.diff()
        cell = torch.repeat_interleave(torch.arange(plan.num_out, device=DEVICE), members_of)
        exact = torch.zeros(plan.num_out, width, dtype=torch.float64, device=DEVICE)
        exact.index_add_(0, cell, tokens[members].double()).div_(members_of[:, None])

        def bag(x: Tensor = tokens, members: Tensor = members, offsets: Tensor = offsets) -> Tensor:
            return F.embedding_bag(members, x, offsets, mode="mean", include_last_offset=True)

        def pooled(x: Tensor = tokens, side: int = side, images: int = images, crops: Any = crops) -> Tensor:
            grid = x.view(images, side, side, -1).permute(0, 3, 1, 2)
            return torch.cat([F.avg_pool2d(grid[:, :, y, x], s).flatten(2) for y, x, s in crops], 2).mT.contiguous()

        def segments(x: Tensor = tokens, members: Tensor = members, offsets: Tensor = offsets) -> Tensor:
            return torch.segment_reduce(x[members].float(), "mean", offsets=offsets).to(x.dtype)

        number = torch.arange(side * side).view(side, side)
        leaders = torch.cat([number[y, x][::s, ::s].flatten() for y, x, s in crops]).argsort().to(DEVICE)

        def wrong(out: Tensor, exact: Tensor = exact, leaders: Tensor = leaders, images: int = images) -> float:
            if out.dim() == 3:  # crops come in another order
                out = out[:, leaders].flatten(0, 1)
            error = float((out.double() - exact).abs().max())
            return 0.0 if error < 0.02 else error

        name = f"{count} x {side}x{side}x{dim} -> {count * single.num_out}"
        crop = lambda x=tokens, plan=plan: ops.adaptive_pool(x, plan)  # noqa: E731
        others: dict[str, Call | str] = {
            "embedding_bag": bag,
            "crops + avg_pool2d + cat": pooled,
            "segment_reduce": segments,
            "index_add": partial(peers.index_add, tokens, members, cell, members_of),
            "torch_scatter.segment_csr": peers.call("torch_scatter", peers.segment_csr, tokens, members, offsets),
        }
        moved = 2.0 * count * (single.num_tokens + single.num_out) * dim
        bars: dict[str, Any] = {"most_us": 5.0 if (side, count) == (24, 1) else None}
        bars["most_floors"] = 1 / 0.85 if moved >= 100e6 else None
        yield Case("adaptive_pool", name, crop, others, wrong, moved,
                   least={"embedding_bag": 1.5, "crops + avg_pool2d + cat": 5.0}, **bars)  # fmt: skip

        # The gradient alone: the very operator that autograd calls, and autograd itself for the peer.
        grad = torch.randn(plan.num_out, width, generator=g, device=DEVICE).to(BF16)
        want = torch.empty(plan.num_tokens, width, dtype=torch.float64, device=DEVICE)
        want[members] = grad[cell].double() / members_of[cell][:, None]
        saved, inverse = torch.empty(0, device=DEVICE), plan.inverse

        def backward(
            grad: Tensor = grad, saved: Tensor = saved, plan: PoolPlan = plan, inverse: Tensor = inverse
        ) -> Tensor:
            args = (grad, None, None, saved, plan.offsets, inverse, None, "mean")
            return torch.ops.crop.adaptive_pool_backward.default(*args)[0]

        leaf = tokens.detach().clone().requires_grad_()
        with torch.enable_grad(), side_stream():
            out = bag(leaf)

        def bag_backward(out: Tensor = out, leaf: Tensor = leaf, grad: Tensor = grad) -> Tensor:
            return torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]

        def wrong_gradient(result: Tensor, want: Tensor = want) -> float:
            error = float((result.double() - want).abs().max())
            return 0.0 if error < 0.02 else error

        yield Case(
            "adaptive_pool, gradient", name, backward, {"embedding_bag": bag_backward}, wrong_gradient, moved, **bars
        )


CASES = {
    "pipeline": pipeline_cases,
    "mass": mass_cases,
    "select": select_cases,
    "compact": compact_cases,
    "pool": pool_cases,
}
