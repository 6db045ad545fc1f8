"""Backends, oracles and inputs of the operator tests. Oracles are independent of the package: loops, Python's sort, float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crop import ops
from crop.geometry.pooling import PoolPlan
from crop.ops import dispatch
from tests.csrc import emulator
from tests.csrc.emulator import Emulated

INF, NAN = float("inf"), float("nan")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators; ``call`` moves tensors to its device and results back."""

    name: str  # of crop.use_backend
    device: str = "cpu"
    isa: str | None = None
    emulated: Emulated | None = None  # CUDA kernels on CPU tensors

    def missing(self) -> str | None:
        """Why the backend cannot run here, or None."""
        if self.name == "twin":
            return None
        if self.emulated:
            return emulator.missing(self.emulated.flavour)
        if dispatch.native is None:
            return "no kernels were compiled"
        if self.device == "cuda":
            return None if torch.cuda.is_available() and dispatch.native.has_cuda else "no GPU, or built without CUDA"
        with self.active():
            return None if dispatch.native.build_info()["cpu_isa"] == self.isa else f"this CPU has no {self.isa}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        if self.emulated:
            with self.emulated.active(), ops.use_backend("native"):
                yield
            return
        before = dispatch.native.build_info()["cpu_isa"] if self.isa else None
        if self.isa:
            dispatch.native.set_isa(self.isa)  # refused for an instruction set that the CPU lacks
        try:
            with ops.use_backend(self.name):
                yield
        finally:
            if before:
                dispatch.native.set_isa(before)

    def move(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if self.device == "cpu":
                return value
            # Not .to() alone: strides, gaps and alignment are part of the test.
            size = value.untyped_storage().nbytes() // value.element_size()
            whole = value.as_strided((size,), (1,), 0).to(self.device)
            return whole.as_strided(value.shape, value.stride(), value.storage_offset())
        return (
            [self.move(v) for v in value]
            if isinstance(value, list) and value and isinstance(value[0], Tensor)
            else value
        )

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.active():
            result = function(*(self.move(a) for a in args), **{k: self.move(v) for k, v in kwargs.items()})
        if isinstance(result, Tensor):
            return result.cpu()
        return type(result)(r.cpu() for r in result)


BACKENDS = {
    "twin": Backend("twin"),
    "baseline": Backend("native", isa="baseline"),
    "avx2": Backend("native", isa="avx2"),
    "avx512": Backend("native", isa="avx512"),
    "emulated": Backend("native", emulated=Emulated()),
    "cuda": Backend("native", device="cuda"),
}


# --- attention_mass -------------------------------------------------------------------------------------------------


def mass_inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    rows: int,
    keys: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, rows, dim, generator=g).to(dtype)
    return query, torch.randn(batch, kv_heads, keys, dim, generator=g).to(dtype)


def mass_oracle(
    query: Tensor,
    key: Tensor,
    vision_index: Tensor,
    *,
    sample: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    visible_start: Tensor | None = None,
    visible_len: Tensor | None = None,
) -> tuple[Tensor, float]:
    """The formula in float64, one row at a time; also the largest finite logit."""
    batch, heads, rows, dim = query.shape
    group, keys = heads // key.shape[1], key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    mass, largest = torch.zeros(vision_index.shape, dtype=torch.float64), 0.0
    for image, index in enumerate(vision_index.tolist()):
        b = image if sample is None else int(sample[image])
        start = 0 if visible_start is None else int(visible_start[b])
        column, counted = torch.zeros(keys + 1, dtype=torch.float64), 0
        for row in range(rows):
            stop = keys if visible_len is None else int(visible_len[b, row])
            if stop <= start:
                continue
            counted += 1
            near = key[b, :, start:stop].double().repeat_interleave(group, 0)  # (heads, visible, d)
            logit = scale * (near @ query[b, :, row].double()[:, :, None])[..., 0]
            finite = logit[logit.isfinite()]
            largest = max(largest, float(finite.abs().max()) if len(finite) else 0.0)
            total = torch.logsumexp(logit, 1) if lse is None else lse[b, :, row].double()
            share = torch.exp(logit - torch.where(total.isinf(), INF, total)[:, None])
            column[start:stop] += torch.where(logit == INF, NAN, share).sum(0)
        if counted:
            mass[image] = column[index] / (counted * heads)
    return mass, largest


def assert_mass(mass: Tensor, oracle: tuple[Tensor, float]) -> None:
    """The relative error of a mass is about the absolute error of its logit, so the bound grows with the logits."""
    expected, largest = oracle
    assert mass.dtype == torch.float32 and mass.is_contiguous()
    torch.testing.assert_close(
        mass.double(), expected.float().double(), rtol=2e-6 * (4 + largest), atol=1e-35, equal_nan=True
    )


# --- select ---------------------------------------------------------------------------------------------------------


def select_oracle(
    score: Tensor,
    num_keep: Sequence[int],
    weight: Tensor | None = None,
    priority: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Python's sort under the written order, on the very float32 products the operator sees."""
    images, tokens = score.shape
    value = (score if weight is None else score * weight).tolist()
    kept = torch.full((images, max(num_keep, default=0)), -1)
    for i in range(images):
        rank = [0] * tokens if priority is None else priority[i].tolist()
        name = list(range(tokens)) if index is None else index[i].tolist()
        candidates = [n for n in range(tokens) if rank[n] >= 0 and (index is None or name[n] >= 0)]
        key = [-INF if math.isnan(v) else v for v in value[i]]  # 0.0 == -0.0 in Python too
        best = sorted(sorted(candidates, key=lambda n: (-rank[n], -key[n], n))[: num_keep[i]])
        kept[i, : len(best)] = torch.tensor([name[n] for n in best], dtype=torch.int64)
    return kept


# --- adaptive_pool --------------------------------------------------------------------------------------------------


def random_plan(num_tokens: int, num_out: int, dropped: int = 0, seed: int = 0) -> PoolPlan:
    """Cells of random size and shape; `dropped` tokens are in none."""
    g = torch.Generator().manual_seed(seed)
    used = torch.randperm(num_tokens, generator=g)[: num_tokens - dropped]
    cell = torch.cat([torch.arange(num_out), torch.randint(num_out, (len(used) - num_out,), generator=g)])
    groups = sorted(sorted(used[cell == c].tolist()) for c in range(num_out))
    offsets = torch.tensor([0] + [len(group) for group in groups]).cumsum(0)
    return PoolPlan(
        members=torch.tensor([m for group in groups for m in group], dtype=torch.int32),
        offsets=offsets.to(torch.int32),
        leader=torch.tensor([group[0] for group in groups], dtype=torch.int32),
        level=torch.zeros(num_out, dtype=torch.uint8),
        num_tokens=num_tokens,
    )


def pool_oracle(tokens: Tensor, plan: PoolPlan, mode: str, weight: Tensor | None = None) -> Tensor:
    """Loops in float64; exact copies of single members."""
    out = torch.zeros(plan.num_out, tokens.shape[1], dtype=torch.float64)
    offsets = plan.offsets.tolist()
    for i, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        member = plan.members[first:last].long()
        x = tokens[member].double()
        if len(member) == 1:
            out[i] = x[0]
        elif mode == "max":
            out[i] = x.amax(0)
        elif mode == "weighted" and float(weight[member].sum()) != 0:  # type: ignore[index]
            w = weight[member].double()[:, None]  # type: ignore[index]
            out[i] = (w * x).sum(0) / w.sum()
        else:
            out[i] = x.mean(0)
    return out


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def spread(tensor: Tensor, offset: int = 1, gap: int = 3) -> Tensor:
    """The same values as a view whose rows lie apart and start off the alignment."""
    shape = torch.Size((*tensor.shape[:-1], tensor.shape[-1] + gap))
    storage = torch.zeros(shape.numel() + offset)
    view = storage.to(tensor.dtype)[offset:].view(shape)[..., : tensor.shape[-1]]
    return view.copy_(tensor)


def fill(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bits, NaN patterns included."""
    size = torch.empty(0, dtype=dtype).element_size()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(-128, 128, (*shape[:-1], shape[-1] * size), dtype=torch.int8).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
