"""Offsets beyond 2^31 elements and bytes: rows that lie far apart in memory of which no other page is ever touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crop import ops
from crop.geometry.pooling import PoolPlan
from tests.support.operators import assert_mass, mass_inputs, mass_oracle

FAR = 2**31 + 64  # elements between rows: the second row is out of reach of 32-bit offsets


def apart(rows: Tensor, *strides: int) -> Tensor:
    """The same values at other strides; what lies between is reserved, never written, hence costs no memory."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(rows.shape, strides, strict=True))
    try:
        wide = torch.empty(reach, dtype=rows.dtype).as_strided(rows.shape, strides)
    except RuntimeError as error:  # a machine that reserves no more than it has
        pytest.skip(f"{reach * rows.element_size()} bytes cannot be reserved: {error}")
    return wide.copy_(rows)


@pytest.fixture(autouse=True)
def on_this_memory(native):
    if native.device == "cuda":
        pytest.skip("strides do not survive the copy to the GPU")


@pytest.mark.parametrize("strides", [(FAR, 48, 1), (128, FAR, 1)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_compact(native, dtype, strides):
    rows = torch.randint(-100, 100, (2, 2, 32)).to(dtype)
    index = torch.tensor([[0, 1], [1, -1]])
    near = native(ops.compact, [rows], index)[0]
    assert torch.equal(native(ops.compact, [apart(rows, *strides)], index)[0], near)


@pytest.mark.parametrize("far", ["query", "key"])
@pytest.mark.parametrize("strides", [(FAR, 256, 64, 1), (512, FAR, 64, 1), (512, 256, FAR, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_mass(native, dtype, strides, far):
    query, key = mass_inputs(2, 2, 2, 2, 2, 64, dtype=dtype)
    index = torch.arange(2).expand(2, 2).contiguous()
    want = mass_oracle(query, key, index)
    given = {"query": query, "key": key}
    given[far] = apart(given[far], *strides)
    assert_mass(native(ops.attention_mass, given["query"], given["key"], index), want)


@pytest.mark.parametrize("mode", ["mean", "weighted", "max"])
def test_adaptive_pool(native, mode):
    tokens = torch.randn(2, 40)
    plan = PoolPlan.from_labels(torch.tensor([0, 0]), torch.arange(2), torch.zeros(2), torch.zeros(2).byte())
    weight = torch.rand(2) + 0.5 if mode == "weighted" else None
    near = native(ops.adaptive_pool, tokens, plan, mode, weight)
    assert torch.equal(native(ops.adaptive_pool, apart(tokens, FAR, 1), plan, mode, weight), near)
