"""The CUDA kernels on the emulator beyond test_ops*.py (which run there forward): another schedule, the sanitizer build, lengths
and indices on the device that lie, and every barrier removed once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crop import ops
from crop.ops import reference, reference_pooling
from tests.csrc import emulator
from tests.csrc.emulator import Emulated, EmulatorReport
from tests.support.operators import (
    BACKENDS,
    Backend,
    assert_mass,
    mass_inputs,
    mass_oracle,
    pool_oracle,
    random_plan,
    select_oracle,
)

FAR = torch.tensor([-(2**63), -(2**40), -7, -1, 0, 3, 2**31, 2**40, 2**63 - 1])
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- cases: every kernel and every path of it, on little data ---------------------------------------------------------


def mass_sizes(run: Backend) -> None:
    """Instructions of the tensor cores and float32, few and many columns, whole and odd rows of memory, own and given lse."""
    for i, (sizes, dtype, own) in enumerate(
        [
            ((1, 2, 1, 3, 70, 64), BF16, True),
            ((1, 3, 1, 1, 33, 80), F16, False),
            ((1, 3, 1, 2, 33, 72), BF16, True),
            ((1, 3, 1, 2, 33, 72), F16, False),
            ((2, 4, 2, 9, 20, 96), BF16, False),
            ((1, 3, 3, 2, 35, 64), BF16, False),  # three heads for two warps
            ((1, 7, 1, 17, 300, 128), BF16, True),
            ((1, 2, 2, 5, 40, 256), F16, True),
            ((1, 2, 1, 4, 35, 33), BF16, True),
            ((1, 2, 1, 4, 35, 200), F16, False),
            ((1, 32, 32, 2, 20, 64), F16, False),  # more heads than warps: clusters of four
            ((1, 16, 4, 80, 40, 80), BF16, True),  # more columns than a unit: clusters of two
            ((2, 4, 2, 3, 65, 72), F32, True),
            ((1, 2, 1, 70, 90, 33), F32, False),
        ]
    ):
        query, key = mass_inputs(*sizes, dtype=dtype, seed=i)
        index = torch.randperm(sizes[4])[: sizes[4] // 2 + 1].expand(sizes[0], -1).contiguous()
        lse = None if own else torch.full(query.shape[:3], 3.0)
        assert_mass(run(ops.attention_mass, query, key, index, lse=lse), mass_oracle(query, key, index, lse=lse))


def mass_staged(run: Backend) -> None:
    """So many keys and columns that warps share queries: two and four of them, channels that end within a step, dead rows."""
    for sizes, dtype in (
        ((1, 8, 8, 61, 360, 256), BF16),
        ((1, 4, 4, 121, 720, 256), F16),
        ((1, 16, 16, 61, 1300, 72), BF16),
    ):
        query, key = mass_inputs(*sizes, dtype=dtype)
        index, lse = torch.randperm(sizes[4])[None], torch.rand(query.shape[:3]) + 3
        length = torch.randint(sizes[4] // 2, sizes[4] + 1, (1, sizes[3]))
        length[0, [0, 7, -1]] = 0
        kwargs = {"lse": lse, "visible_len": length}
        assert_mass(run(ops.attention_mass, query, key, index, **kwargs), mass_oracle(query, key, index, **kwargs))
    assert not run(ops.attention_mass, query, key, index, lse=lse, visible_len=length * 0).any()


def mass_ragged(run: Backend) -> None:
    for dtype in (BF16, F32):
        query, key = mass_inputs(3, 6, 2, 4, 200, 64, dtype=dtype)
        start = torch.tensor([0, 30, 10])
        length = torch.tensor([[40, 90, 200, 140], [0, 30, 31, 199], [10, 5, 0, 0]])
        index = torch.tensor([[0, 29, 30, 31, 150], [199, -1, 0, 40, -1], [1, 2, 3, 4, 5], [100, 139, 140, 141, 198]])
        kwargs = {"sample": torch.tensor([1, 0, 2, 0]), "visible_start": start, "visible_len": length}
        assert_mass(run(ops.attention_mass, query, key, index, **kwargs), mass_oracle(query, key, index, **kwargs))


def mass_lies(run: Backend) -> None:
    """Device-side lengths, positions and samples out of range are clamped or give 0."""
    for dtype in (BF16, F32):
        query, key = mass_inputs(2, 4, 2, 9, 50, 64, dtype=dtype)
        index = torch.cat([FAR, torch.tensor([49, 50, 51])]).expand(4, -1).contiguous()
        sample = torch.tensor([0, -1, 2**40, 1])
        start = torch.tensor([-(2**62), 5])
        length = torch.stack([FAR, FAR.flip(0)])
        for lse in (None, torch.ones(2, 4, 9)):
            mass = run(torch.ops.crop.attention_mass.default, query, key, index, sample, lse, 0.125, start, length)
            inside = torch.where((index >= 0) & (index < 50), index, -1)[:2]
            honest = {"visible_start": start.clamp(0, 50), "visible_len": length.clamp(0, 50)}
            assert_mass(mass[[0, 3]], mass_oracle(query, key, inside, scale=0.125, lse=lse, **honest))
            assert not mass[1:3].any()


def select_sizes(run: Backend) -> None:
    for tokens, budget in ((1, [1, 0]), (17, [5, 17]), (700, [100, 0]), (1025, [1, 1024])):
        score = torch.randn(2, tokens).round(decimals=1)
        kwargs = {"weight": torch.rand(2, tokens), "priority": torch.randint(-2, 4, (2, tokens)).to(torch.int8)}
        kwargs["index"] = torch.arange(tokens).expand(2, tokens) * 2 - 3
        same(run(ops.select, score, budget), select_oracle(score, budget))
        same(run(ops.select, score, budget, **kwargs), select_oracle(score, budget, **kwargs))


def select_large(run: Backend) -> None:
    """More tokens than registers: the row is read again."""
    score = torch.rand(1, 17001) * 1e-3 + 1
    priority = torch.randint(-1, 3, (1, 17001)).to(torch.int8)
    same(run(ops.select, score, 4000, priority=priority), reference.select(score, 4000, priority=priority))


def select_middling(run: Backend) -> None:
    """Eight tokens a thread, the last of them short of a whole group of four."""
    score = torch.randn(1, 4101).round(decimals=2)
    same(run(ops.select, score, 1500), select_oracle(score, [1500]))


def pack_slabs(run: Backend) -> None:
    """One slab and more, a sample without an image, one with two, fillers."""
    for length, width in ((40, 30), (4100, 4000)):
        stays = torch.arange(3 * length).view(3, length) % 3 == 1
        kept = torch.tensor([[0, 3, -1], [6, 9, 12], [length - 1, -1, -1]])
        sample = torch.tensor([2, 0, 2])
        got = run(ops.pack, stays, width, kept=kept, sample=sample)
        for a, b in zip(got, reference.pack(stays, width, kept=kept, sample=sample), strict=True):
            same(a, b)


def pack_lies(run: Backend) -> None:
    """Tokens and samples that do not exist are left out; what a width too small has no room for does not stay."""
    stays = torch.tensor([[True, False, False, True, True, True, False], [False] * 7])
    far = torch.cat([FAR[:4], FAR[6:]])
    kept, sample = torch.stack([far, torch.cat([far[:6], torch.tensor([2])]), far * 0 + 6]), torch.tensor([0, 1, 2**40])
    index, slots = run(torch.ops.crop.pack.default, stays, 3, kept, sample)
    assert index.tolist() == [[3, 4, 5], [-1, -1, 2]]
    assert slots.tolist() == [[-1, -1, -1, 0, 1, 2, -1], [-1, -1, 2, -1, -1, -1, -1]]


def compact_types(run: Backend) -> None:
    index = torch.tensor([[0, 2, 3, -1, 8], [-1, 1, 5, 6, 7]])
    types = (torch.bool, torch.float16, torch.float32, torch.int64, torch.complex128)
    tensors = [torch.randint(0, 2, (2, 9, width)).to(dtype) for dtype in types for width in (1, 3, 8)]
    tensors += [torch.randn(2, 9, 70)[..., 3:66], torch.randn(2, 9, 2, 4).transpose(1, 2)]
    dims = [1] * (len(tensors) - 1) + [2]
    for out, want in zip(
        run(ops.compact, tensors, index, token_dim=dims), reference.compact(tensors, index, token_dim=dims), strict=True
    ):
        same(out, want)


def compact_lies(run: Backend) -> None:
    """A place that does not exist gives a zero row."""
    index = FAR.expand(2, -1).contiguous()
    tensor = torch.randn(2, 4, 9, 3)[:, :, :7]
    (out,) = run(torch.ops.crop.compact.default, [tensor], index, [2])
    inside = torch.where((index >= 0) & (index < 7), index, -1)
    same(out, reference.compact([tensor], inside, token_dim=[2])[0])
    same(run(torch.ops.crop.invert_index.default, index, 7), reference.invert_index(index, 7))


def spread_sizes(run: Backend) -> None:
    """A warp and several, full and not; one round and many; ties, NaN and rows that lie apart."""
    for tokens, count, at_once, fresh in (
        (1, 1, 3, False),
        (33, 33, 4, True),
        (140, 60, 1, False),
        (300, 90, 40, True),
    ):
        alike = torch.randint(-3, 4, (tokens + 1, tokens + 5)).float()
        alike[alike == 3] = torch.nan
        args = alike[:-1, 5:], alike[-1, 5:], count, at_once
        same(run(ops.spread, *args, fresh=fresh), reference.spread(*args, fresh=fresh))


def spread_many(run: Backend) -> None:
    """Eight tokens a thread, and one too many; rows overlap, a number further each."""
    rows = torch.randint(0, 50, (8193 * 2,)).float().unfold(0, 8193, 1)
    args = rows[:8192, :8192], rows[7, :8192], 9, 4
    same(run(ops.spread, *args), reference.spread(*args))
    with pytest.raises(ValueError, match="spread: num_tokens must be at most 8192 on CUDA, got 8193"):
        run(ops.spread, rows[:8193], rows[0], 9, 4)


def saliency_sizes(run: Backend) -> None:
    """Whole and odd rows of memory, fewer and more tokens than a block has threads."""
    for dtype, tokens, dim, stride in ((BF16, 40, 72, 72), (F32, 33, 5, 7), (F16, 1100, 8, 8), (BF16, 9, 530, 530)):
        x = (torch.randn(stride) + 0.7 * torch.randn(tokens, stride)).to(dtype)[:, :dim]
        index = torch.stack([torch.arange(tokens), torch.full((tokens,), -1)])
        index[1, :3], index[0, :3] = torch.arange(3), -1
        alone = torch.arange(tokens) == 5
        got, want = run(ops.saliency, x, index, alone=alone), reference.saliency(x, index, alone=alone)
        torch.testing.assert_close(got.log(), want.log(), rtol=1e-3, atol=1e-3)


def saliency_lies(run: Backend) -> None:
    """Tokens that do not exist are fillers."""
    x = torch.randn(6, 9)
    index = torch.cat([FAR[:4], torch.tensor([0, 2, 5]), FAR[6:]])[None]
    args = (None, 4.0, 8.0, 1e-3)
    got = run(torch.ops.crop.saliency.default, x, index, *args)
    same(got, run(torch.ops.crop.saliency.default, x, torch.where((index >= 0) & (index < 6), index, -1), *args))
    assert (got != 1).tolist() == [True, False, True, False, False, True]


def pool_modes(run: Backend) -> None:
    for dtype, dim, mode in (
        (BF16, 33, "mean"),
        (F32, 40, "weighted"),
        (F16, 24, "max"),
        (F32, 5, "max"),
        (BF16, 8, "weighted"),
    ):
        plan = random_plan(60, 11, dropped=5)
        tokens = torch.randn(60, dim).to(dtype).requires_grad_()
        weight = torch.rand(60).requires_grad_() if mode == "weighted" else None
        inputs = [tokens] if weight is None else [tokens, weight]
        expected = torch.autograd.grad(reference.adaptive_pool(tokens, plan, mode, weight).float().sum(), inputs)
        moved = [run.move(t.detach()).requires_grad_() for t in inputs]
        with run.active():
            out = ops.adaptive_pool(moved[0], plan, mode, *moved[1:])
            actual = [grad.cpu() for grad in torch.autograd.grad(out.float().sum(), moved)]
        out = out.cpu()
        tolerance = {F32: 2e-5, BF16: 4e-3, F16: 5e-4}[dtype]
        oracle = pool_oracle(tokens.detach(), plan, mode, None if weight is None else weight.detach())
        torch.testing.assert_close(out.double(), oracle, rtol=tolerance, atol=2e-6)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=tolerance, atol=1e-2 if dtype != F32 else 1e-5)


def pool_lies(run: Backend) -> None:
    """Members, offsets and cells out of range are clamped; honest cells do not suffer."""
    tokens, grad = torch.randn(10, 12), torch.randn(4, 12)
    members = torch.tensor([0, 1, 2, 3, -(2**31), 99, 2**31 - 1, 7], dtype=torch.int32)
    for mode in ("mean", "weighted", "max"):
        weight = torch.rand(10) if mode == "weighted" else None
        inverse = torch.tensor([0, 0, 1, 1, 3, 4, -5, 2**31 - 1, -(2**31), 2], dtype=torch.int32)
        for offsets in ([0, 2, 4, 8, 8], [0, 2, 4, 2**31 - 1, 2**31 - 1], [0, 2, 4, -(2**31), 3]):
            offset = torch.tensor(offsets, dtype=torch.int32)
            out, saved = run(torch.ops.crop.adaptive_pool.default, tokens, members, offset, inverse, weight, mode)
            honest = reference_pooling.pool(tokens, members[:4], offset[:3], weight, mode)[0]
            same(out[:2], honest)
            extra = (tokens, out) if mode == "weighted" else (None, None)
            got, _ = run(
                torch.ops.crop.adaptive_pool_backward.default, grad, *extra, saved, offset, inverse, weight, mode
            )
            assert not got[5:9].any() and got[:2].isfinite().all()


CASES: dict[str, Callable[[Backend], None]] = {
    case.__name__: case
    for case in (mass_sizes, mass_staged, mass_ragged, mass_lies, select_sizes, select_middling, select_large, pack_slabs, pack_lies, compact_types, compact_lies,
                 spread_sizes, spread_many, saliency_sizes, saliency_lies, pool_modes, pool_lies)
}  # fmt: skip
RUNS = {  # test_ops*.py have the race build, forward
    "race-random": Backend("native", emulated=Emulated("race", "random", 7)),
    "race-reverse": Backend("native", emulated=Emulated("race", "reverse", residents=4)),
    "asan": Backend("native", emulated=Emulated("asan")),
    "cuda": BACKENDS["cuda"],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", RUNS)
def test_operators(run: str, case: str) -> None:
    if run == "race-reverse" and not case.endswith("lies"):
        pytest.skip("reverse: only what test_ops*.py do not have")
    if RUNS[run].missing():
        pytest.skip(RUNS[run].missing())
    torch.manual_seed(0)
    CASES[case](RUNS[run])


def test_sanitizer_build() -> None:
    if emulator.missing() or os.environ.get("EMU_BUILD"):
        pytest.skip(emulator.missing() or "this is that process")
    emulator.in_sanitizer_process(__file__, "asan")


@pytest.mark.parametrize(
    "sizes, images, blocks",  # without and with clusters
    [
        ((1, 16, 16, 2, 40, 64), 1, (3, 6)),
        ((1, 16, 4, 80, 70, 64), 1, (5, 10)),
        ((1, 32, 8, 64, 576, 64), 1, (36, 144)),  # clusters of eight with twice the keys
        ((1, 9, 3, 70, 33, 64), 1, (3, 3)),
        ((1, 2, 2, 1100, 40, 64), 1, (3, 12)),  # 36 units in 32 slots
        ((1, 32, 32, 6, 500, 64), 1, (32, 128)),
        ((1, 32, 32, 6, 500, 64), 4, (128, 512)),
        ((1, 8, 8, 61, 360, 256), 1, (23, 48)),  # clusters of four with shared queries
    ],
    ids=str,
)
def test_clusters_change_no_bit(sizes: tuple[int, ...], images: int, blocks: tuple[int, int]) -> None:
    """However the units of a tile are shared out, the sum has one order."""
    if emulator.missing():
        pytest.skip(emulator.missing())
    query, key = mass_inputs(*sizes, dtype=BF16)
    index, lse = torch.arange(sizes[4]).expand(images, -1).contiguous(), torch.rand(query.shape[:3]) + 3
    masses, seen = [], []
    for cluster in (1, 8, 2):
        run = Backend("native", emulated=Emulated(cluster=cluster))
        run.emulated.statistics()
        masses.append(
            run(ops.attention_mass, query, key, index, sample=torch.zeros(images, dtype=torch.int64), lse=lse)
        )
        seen += [row["blocks"] for row in run.emulated.statistics().values()]
    for mass in masses[1:]:
        same(mass, masses[0])
    assert tuple(seen[:2]) == blocks and seen[0] <= seen[2] <= 2 * seen[0]


# --- barriers ---------------------------------------------------------------------------------------------------------

SYNC = re.compile(r"__syncthreads\w*\(|__syncwarp\(|cluster_sync\w*\(")


def barriers() -> list[tuple[str, int]]:
    """Every line of the kernels that holds a barrier."""
    return [
        (path.name, number)
        for path in sorted(emulator.CSRC.rglob("*.cu*"))
        if path.name != "portable.cuh"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SYNC.search(line.split("//")[0])
    ]


@pytest.mark.skipif(not os.environ.get("EMU_MUTANTS"), reason="minutes: set EMU_MUTANTS=1")
@pytest.mark.parametrize("file, line", barriers(), ids=str)
def test_no_barrier_can_go(file: str, line: int) -> None:
    """Without any one barrier the race build complains, or a value is wrong."""
    op = next(
        name
        for name in ("attention_mass", "select", "pack", "compact", "spread", "saliency", "adaptive_pool")
        if file.startswith(name)
    )
    prefix = {"attention_mass": "mass", "adaptive_pool": "pool"}.get(op, op)
    for policy, seed in (("forward", 0), ("random", 7)):
        mutant = Emulated("race", policy, seed, without=(file, line))
        for name, case in CASES.items():
            if not name.startswith(prefix):
                continue
            torch.manual_seed(0)
            try:
                case(Backend("native", emulated=mutant))
            except (EmulatorReport, AssertionError):
                return
    pytest.fail(f"{file}:{line} is not missed")
