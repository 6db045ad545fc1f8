"""The operators against the best compositions of plain torch, on the CPU.

Every contender is checked before anything is timed; a wrong one stops the run. Contenders take turns, so that a busy
machine slows all of them alike, and the ratio is the median over rounds of (best torch form / crop) within one round.
Losing rows stay in the table. Where `floor us` stands, the same rounds also timed what no program can leave out: one read of
the keys (one scoring row) or the bare product of queries and keys in float32 (more rows); `most` is the ratio that a program
of exactly this length would reach. Run:

    python -m bench.kernels.cpu [--op select] [--dtype float32] [--threads 1] [--clock cpu] [--json bench/results/ops.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import header, save, table
from bench.kernels.torch_forms import bag, crop_order, crops_of
from crop import ops
from crop.selftest.cases import region_plan
from crop.selftest.timing import Call


@dataclass(frozen=True)
class Case:
    """One row: crop against plain torch. ``same`` compares a contender's result with crop's."""

    op: str
    shape: str
    dtype: str
    crop: Call
    peers: dict[str, Call]
    same: Callable[[Any, Any], bool]
    bar: float  # required ratio
    floor: Call | None = None  # the work that cannot be left out


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of the storage type of a peer that computes in it."""
    scale = b.abs().mean()
    return bool(((a.float() - b.float()).abs() <= 0.05 * b.float().abs() + 0.02 * scale).all())


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


# --- scores ---------------------------------------------------------------------------------------------------------


def mass_forms(query: Tensor, key: Tensor, keep: int) -> dict[str, Call]:
    """Torch forms of region_topk: the softmax of all rows, its mean, the best `keep` in ascending order."""
    batch, heads, rows, dim = query.shape
    groups, scale = key.shape[1], dim**-0.5

    def pick(mass: Tensor) -> Tensor:
        return torch.topk(mass, keep, sorted=False).indices.sort().values

    def repeat() -> Tensor:
        logits = query @ key.repeat_interleave(heads // groups, 1).mT * scale
        return pick(logits.float().softmax(-1).mean((1, 2)))

    def grouped() -> Tensor:
        logits = (query * scale).reshape(batch, groups, -1, dim) @ key.mT
        return pick(logits.float().softmax(-1).mean((1, 2)))

    def einsum() -> Tensor:
        split = (query * scale).unflatten(1, (groups, -1))
        return pick(torch.einsum("bkgmd,bknd->bkgmn", split, key).float().softmax(-1).mean((1, 2, 3)))

    def flash_lse() -> Tensor:
        wide = key.repeat_interleave(heads // groups, 1)
        lse = torch._scaled_dot_product_flash_attention_for_cpu(query, wide, wide)[1]
        logits = (query * scale).reshape(batch, groups, -1, dim) @ key.mT
        share = logits.float().sub_(lse.reshape(batch, groups, -1, 1)).exp_()
        return pick(share.mean((1, 2)))

    return {"repeat": repeat, "grouped": grouped, "einsum": einsum, "sdpa lse": flash_lse}


def mass_floor(query: Tensor, key: Tensor) -> Call:
    """One read of the keys for one row; the bare product in float32, into memory that is there, for more."""
    if query.shape[2] == 1:
        words = key.view(torch.float32)
        return lambda: words.sum()
    left = query.float().unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    right = key.float().mT
    out = left @ right
    return lambda: torch.matmul(left, right, out=out)


def mass_cases() -> Iterator[Case]:
    for heads, groups, dim in ((32, 8, 128), (28, 4, 128), (16, 16, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            for tokens, rows in ((576, 32), (4096, 1), (4096, 8), (4096, 32), (4096, 128), (16384, 32)):
                query = torch.randn(1, heads, rows, dim).to(dtype)
                key = torch.randn(1, groups, tokens, dim).to(dtype)
                index, keep = torch.arange(tokens)[None], tokens // 4
                peers = mass_forms(query, key, keep)
                exact = ops.attention_mass(query, key, index)[0]
                threshold = exact.sort(descending=True).values[keep - 1]

                def same(peer: Tensor, crop: Tensor, exact: Tensor = exact, threshold: Tensor = threshold) -> bool:
                    # Sets may differ only near the threshold, and more so where a peer scores in bfloat16.
                    odd = torch.cat([peer[0], crop[0]]).unique(return_counts=True)
                    odd = odd[0][odd[1] == 1]
                    return bool(((exact[odd] / threshold - 1).abs() < 0.02).all())

                yield Case(
                    "region_topk",
                    f"N{tokens} rows{rows} heads{heads}/{groups} d{dim}",
                    str(dtype).removeprefix("torch."),
                    lambda query=query, key=key, index=index, keep=keep: ops.region_topk(query, key, index, keep),
                    peers,
                    same,
                    (2.0 if rows <= 32 else 1.0) if tokens >= 4096 else 0.0,
                    mass_floor(query, key),
                )


def select_cases() -> Iterator[Case]:
    for batch, tokens in ((1, 576), (1, 4096), (1, 16384), (8, 4096), (32, 576)):
        for share in (0.1, 0.25, 0.5):
            score, keep = (torch.randn(batch, tokens) / 4).exp() / tokens, int(tokens * share)

            def unsorted(score: Tensor = score, keep: int = keep) -> Tensor:
                return torch.topk(score, keep, sorted=False).indices.sort().values

            def ordered(score: Tensor = score, keep: int = keep) -> Tensor:
                return torch.topk(score, keep).indices.sort().values

            def stable(score: Tensor = score, keep: int = keep) -> Tensor:
                return score.sort(descending=True, stable=True).indices[:, :keep].sort().values

            peers: dict[str, Call] = {"topk+sort": unsorted, "sorted topk+sort": ordered, "stable sort": stable}
            crop = lambda score=score, keep=keep: ops.select(score, keep)  # noqa: E731
            bar = 5.0 if (tokens, share, batch) == (16384, 0.25, 1) else 0.0
            yield Case("select", f"B{batch} N{tokens} k{keep}", "float32", crop, peers, equal, bar)


# --- movement -------------------------------------------------------------------------------------------------------


def compact_cases() -> Iterator[Case]:
    for batch, tokens, width, dtype in (
        (1, 576, 4096, torch.float32),
        (1, 4096, 4096, torch.float32),
        (1, 4096, 4096, torch.bfloat16),
        (1, 16384, 3584, torch.bfloat16),
        (4, 2304, 4096, torch.bfloat16),
    ):
        hidden, keep = torch.randn(batch, tokens, width).to(dtype), tokens // 4
        ids = torch.rand(tokens).argsort()[:keep].sort().values
        index = ids.expand(batch, keep).contiguous()
        peers: dict[str, Call] = {
            "index_select": lambda hidden=hidden, ids=ids: hidden.index_select(1, ids),
            "x[:, ids]": lambda hidden=hidden, ids=ids: hidden[:, ids],
        }
        name, crop = (
            f"B{batch} N{tokens} D{width} k{keep}",
            lambda hidden=hidden, index=index: ops.compact([hidden], index)[0],
        )
        yield Case("compact", name, str(dtype).removeprefix("torch."), crop, peers, equal, 1.0)


def compact_many_cases() -> Iterator[Case]:
    """What leaves together at a cut: hidden states, three position ids, cosine and sine, keys and values of a layer."""
    for tokens, dtype in ((576, torch.bfloat16), (4096, torch.bfloat16)):
        keep = tokens // 4
        ids = torch.rand(tokens).argsort()[:keep].sort().values
        tensors = [torch.randn(1, tokens, 3584).to(dtype), torch.arange(3 * tokens).view(1, 3, tokens)]
        tensors += [torch.randn(1, tokens, 128).to(dtype) for _ in range(2)]
        tensors += [torch.randn(1, 4, tokens, 128).to(dtype) for _ in range(2)]
        dims, index = [1, 2, 1, 1, 2, 2], ids[None].contiguous()
        pairs = list(zip(tensors, dims, strict=True))
        yield Case(
            "compact",
            f"6 tensors N{tokens} k{keep}",
            str(dtype).removeprefix("torch."),
            lambda tensors=tensors, index=index, dims=dims: ops.compact(tensors, index, token_dim=dims),
            {"index_select": lambda pairs=pairs, ids=ids: [t.index_select(dim, ids) for t, dim in pairs]},
            lambda a, b: all(map(torch.equal, a, b)),
            1.0,
        )


def pool_cases() -> Iterator[Case]:
    for size, width, dtype in (
        (24, 4096, torch.float32),
        (64, 4096, torch.float32),
        (64, 3584, torch.bfloat16),
        (128, 3584, torch.bfloat16),
    ):
        plan, crops = region_plan(size), crops_of(size)
        members, offsets = plan.members.long(), plan.offsets.long()
        tokens = torch.randn(size * size, width).to(dtype)

        def pooled(tokens: Tensor = tokens, size: int = size, crops: Any = crops) -> Tensor:
            grid = tokens.view(size, size, -1).permute(2, 0, 1)
            return torch.cat([F.avg_pool2d(grid[:, y, x], s).flatten(1) for y, x, s in crops], 1).T.contiguous()

        def segments(tokens: Tensor = tokens, members: Tensor = members, offsets: Tensor = offsets) -> Tensor:
            return torch.segment_reduce(tokens[members], "mean", offsets=offsets)

        order = crop_order(size, plan)

        def same(peer: Tensor, crop: Tensor, order: Tensor = order) -> bool:
            return close(peer[order], crop)

        name, short = f"{size}x{size} D{width} -> {plan.num_out}", str(dtype).removeprefix("torch.")
        crop = lambda tokens=tokens, plan=plan: ops.adaptive_pool(tokens, plan)  # noqa: E731
        yield Case(
            "adaptive_pool",
            name,
            short,
            crop,
            {"embedding_bag": partial(bag, tokens, members, offsets), "segment_reduce": segments},
            close,
            1.0,
        )
        yield Case("adaptive_pool", name, short, crop, {"crops+avg_pool2d+cat": pooled}, same, 5.0)


CASES = {
    "region_topk": mass_cases,
    "select": select_cases,
    "compact": compact_cases,
    "compact many": compact_many_cases,
    "adaptive_pool": pool_cases,
}


def measure(case: Case, rounds: int, limit: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Check, then time in turns; ratios are formed within a round. After `limit` seconds five rounds are enough."""
    mine = case.crop()
    for name, peer in case.peers.items():
        if not case.same(peer(), mine):
            raise SystemExit(f"{case.op} {case.shape} {case.dtype}: {name} disagrees with crop")
    calls = {"crop": case.crop, **case.peers} | ({"floor": case.floor} if case.floor else {})
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    repeat, begin = 1, time.perf_counter()
    for turn in range(rounds + 1):  # the first round warms up and finds how many calls last a millisecond
        if turn > 5 and time.perf_counter() - begin > limit:
            break
        for name, call in calls.items():
            if turn:
                call()  # untimed: nobody inherits the caches of the contender before
            start = clock()
            for _ in range(repeat):
                call()
            if turn:
                seconds[name].append((clock() - start) / repeat)
            elif name == "crop":
                repeat = min(20, max(1, int(1e-3 / max(clock() - start, 1e-6))))
    best = min(case.peers, key=lambda name: statistics.median(seconds[name]))
    ratios = sorted(b / c for b, c in zip(seconds[best], seconds["crop"], strict=True))
    ratio = statistics.median(ratios)

    def ratio_of(name: str) -> float:
        return round(statistics.median(b / c for b, c in zip(seconds[best], seconds[name], strict=True)), 2)

    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "crop us": round(statistics.median(seconds["crop"]) * 1e6, 1),
        "torch us": round(statistics.median(seconds[best]) * 1e6, 1),
        "best torch form": best,
        "ratio": round(ratio, 2),
        "p10": round(ratios[len(ratios) // 10], 2),
        "p90": round(ratios[len(ratios) * 9 // 10], 2),
        "rounds": len(ratios),
        "floor us": round(statistics.median(seconds["floor"]) * 1e6, 1) if case.floor else None,
        "most": ratio_of("floor") if case.floor else None,
        "bar": case.bar or None,
        "met": None if not case.bar else "yes" if ratio >= case.bar else "NO",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=CASES, action="append", help="only this operator; may be repeated")
    parser.add_argument("--dtype", action="append", help="only rows of this dtype, such as float32; may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--seconds", type=float, default=20, help="a row that takes longer ends after five rounds or more"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: thread time, for a busy machine")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu measures the calling thread alone: it needs --threads 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.perf_counter if args.clock == "wall" else time.thread_time
    print(header(), f"\nclock:        {args.clock}\n", sep="")
    rows = []
    with torch.inference_mode():
        for op in args.op or CASES:
            for case in CASES[op]():
                if args.dtype and case.dtype not in args.dtype:
                    continue
                rows.append(measure(case, args.rounds, args.seconds, clock))
                print(".", end="", flush=True)
    print(f"\n{table(rows)}")
    if args.json:
        save(args.json, [{**row, "clock": args.clock} for row in rows])


if __name__ == "__main__":
    main()
