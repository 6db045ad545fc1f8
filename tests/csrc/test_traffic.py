"""Global bytes of each kernel, counted on the emulator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from crop import ops
from tests.csrc import emulator
from tests.csrc.emulator import Emulated
from tests.support.operators import Backend, mass_inputs, random_plan

BF16 = torch.bfloat16


def test_traffic_against_the_floor() -> None:
    """Global bytes of each kernel: what must be read and written at least is, once; what a kernel reads again is bounded."""
    if emulator.missing():
        pytest.skip(emulator.missing())
    emulated = Emulated()
    run = Backend("native", emulated=emulated)

    def measure(function: Callable[..., object], *args: object, **kwargs: object) -> tuple[int, int, int, int]:
        emulated.statistics()
        run(function, *args, **kwargs)
        counts = emulated.statistics().values()
        return tuple(sum(c[k] for c in counts) for k in ("read", "read_distinct", "written", "written_distinct"))

    kept = torch.arange(0, 300, 3).expand(2, 100).contiguous()
    hidden, ids = torch.randn(2, 300, 72), torch.arange(600).view(2, 300)
    read, distinct, written, once = measure(ops.compact, [hidden, ids], kept, token_dim=[1, 1])
    rows = 2 * 100 * (72 * 4 + 8)
    assert (
        (written, once) == (rows, rows) and distinct == rows + 1600 and read == rows + 2 * 1600
    )  # per tensor an index

    score = torch.randn(2, 900)
    assert measure(ops.select, score, 200) == (2 * 900 * 4, 2 * 900 * 4, 2 * 200 * 8, 2 * 200 * 8)

    alike = torch.randn(300, 300)
    read, distinct, written, once = measure(ops.spread, alike, alike[0], 40, 3)
    rows = 39 * 300 * 4  # the one of the last round is not looked at
    assert distinct == rows + 300 * 4 and (written, once) == (40 * 8, 40 * 8)
    assert read == (13 * 4 + 1) * 384 * 4  # by rounds of four rows and warps of 128 tokens

    plan, tokens = random_plan(400, 100), torch.randn(400, 64).bfloat16()
    read, distinct, written, once = measure(ops.adaptive_pool, tokens, plan)
    assert distinct == tokens.nbytes + plan.members.nbytes + plan.offsets.nbytes and written == once == 100 * 64 * 2
    assert read <= tokens.nbytes + 8 * (plan.members.nbytes + 2 * plan.offsets.nbytes)  # by the 8 threads of a row

    query, key = mass_inputs(1, 8, 2, 4, 256, 128, dtype=BF16)
    index = torch.arange(256)[None]
    read, distinct, written, once = measure(ops.attention_mass, query, key, index, lse=torch.full((1, 8, 4), 3.0))
    assert distinct == key.nbytes + query.nbytes + index.nbytes + 8 * 4 * 4 and written == once == 256 * 4
    blocks = -(-256 // 16)
    assert read - key.nbytes <= blocks * 2 * (query.nbytes + 8 * index.nbytes)  # K once; the queries per block

    query, key = mass_inputs(1, 4, 4, 121, 720, 256, dtype=BF16)
    read = measure(ops.attention_mass, query, key, torch.arange(720)[None], lse=torch.full((1, 4, 121), 6.0))[0]
    tiles = -(-720 // 64)  # of four warps, which share queries; the units of a head are shared out in two
    assert tiles * query.nbytes <= read - 2 * key.nbytes <= 1.2 * tiles * query.nbytes
