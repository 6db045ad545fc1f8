"""adaptive_pool on every backend: twin, native CPU kernels per instruction set, CUDA where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crop import ops
from crop.geometry.pooling import PoolPlan
from crop.ops import reference
from tests.support.operators import (
    FLOATS,
    INF,
    NAN,
    Backend,
    bits,
    fill,
    pool_oracle,
    random_plan,
    same,
    spread,
)

MODES = ["mean", "weighted", "max"]


def pool_weight(mode: str, num_tokens: int, seed: int = 0) -> Tensor | None:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, generator=g) if mode == "weighted" else None


def test_pool_by_hand(backend: Backend) -> None:
    tokens = torch.tensor([[1.0, 4.0], [3.0, 4.0], [NAN, -0.0], [5.0, 0.0], [7.0, -1.0]])
    plan = PoolPlan(
        members=torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32),
        offsets=torch.tensor([0, 2, 3, 5], dtype=torch.int32),
        leader=torch.tensor([0, 2, 3], dtype=torch.int32),
        level=torch.zeros(3, dtype=torch.uint8),
        num_tokens=5,
    )
    nan_row = [NAN, -0.0]
    same(backend(ops.adaptive_pool, tokens, plan), torch.tensor([[2.0, 4.0], nan_row, [6.0, -0.5]]))
    same(backend(ops.adaptive_pool, tokens, plan, "max"), torch.tensor([[3.0, 4.0], nan_row, [7.0, 0.0]]))
    weight = torch.tensor([3.0, 1.0, 0.0, 1.0, -1.0])  # the last cell sums to 0: plain mean
    same(backend(ops.adaptive_pool, tokens, plan, "weighted", weight), torch.tensor([[1.5, 4.0], nan_row, [6.0, -0.5]]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pool_values(backend: Backend, dtype: torch.dtype, mode: str) -> None:
    for num_tokens, num_out, dim in ((1, 1, 1), (7, 3, 5), (60, 11, 8), (200, 150, 33), (300, 2, 130)):
        plan = random_plan(num_tokens, num_out, dropped=num_tokens // 10)
        tokens = torch.randn(num_tokens, dim).to(dtype)
        weight = pool_weight(mode, num_tokens)
        out = backend(ops.adaptive_pool, tokens, plan, mode, weight)
        expected = pool_oracle(tokens, plan, mode, weight)
        assert out.dtype == dtype and out.is_contiguous()
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=2e-6)
        same(backend(ops.adaptive_pool, spread(tokens), plan, mode, weight), out)
        if mode != "weighted":  # no contractible expression: the same bits everywhere
            same(out, reference.adaptive_pool(tokens, plan, mode))


def test_pool_identities(backend: Backend) -> None:
    tokens = fill((40, 16), torch.bfloat16)
    for mode in MODES:  # cells of one member are copies, whatever they and their weights hold
        out = backend(ops.adaptive_pool, tokens, PoolPlan.identity(40), mode, pool_weight(mode, 40))
        assert torch.equal(bits(out), bits(tokens))
    for dtype in (torch.bfloat16, torch.float16):  # the float32 sum of up to 256 equal values is exact
        for count in (2, 3, 7, 13, 15, 100, 256):
            plan = random_plan(count, 1)
            constant = torch.full((count, 9), 0.3, dtype=dtype)
            assert torch.equal(backend(ops.adaptive_pool, constant, plan), constant[:1])
    grid = torch.randn(8, 12, 5)
    cell = (torch.arange(8)[:, None] // 4 * 3 + torch.arange(12) // 4).flatten()
    members = cell.argsort(stable=True)
    offsets = torch.arange(0, 97, 16)
    plan = PoolPlan(members.int(), offsets.int(), members[::16].int(), torch.zeros(6, dtype=torch.uint8), 96)
    expected = torch.nn.functional.avg_pool2d(grid.permute(2, 0, 1)[None], 4)[0].flatten(1).T
    torch.testing.assert_close(backend(ops.adaptive_pool, grid.view(96, 5), plan), expected)
    big = torch.full((4, 3), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert torch.equal(backend(ops.adaptive_pool, big[:2], random_plan(2, 1)), torch.full((1, 3), INF).bfloat16())
    empty = torch.zeros(0, dtype=torch.int32)
    nothing = PoolPlan(empty, torch.zeros(1, dtype=torch.int32), empty, empty.to(torch.uint8), 3)
    assert backend(ops.adaptive_pool, torch.randn(3, 4), nothing).shape == (0, 4)


@pytest.mark.parametrize("mode", MODES)
def test_pool_gradient(backend: Backend, mode: str) -> None:
    """Backward kernel against autograd through the twin, which gradcheck pins in float64."""
    for num_tokens, num_out, dim in ((30, 7, 5), (100, 90, 40)):
        plan = random_plan(num_tokens, num_out, dropped=3)
        tokens = torch.randn(num_tokens, dim).round(decimals=1).requires_grad_()  # ties for max
        weight = pool_weight(mode, num_tokens)
        if weight is not None:
            weight[plan.members[: int(plan.offsets[1])].long()] = 0  # a cell whose weights sum to 0
            weight.requires_grad_()
        inputs = [tokens] if weight is None else [tokens, weight]
        grad = torch.randn(num_out, dim)
        expected = torch.autograd.grad(reference.adaptive_pool(tokens, plan, mode, weight), inputs, grad)
        with backend.active():
            moved = [backend.move(t.detach()).requires_grad_() for t in inputs]
            out = ops.adaptive_pool(moved[0], plan, mode, *moved[1:])
            actual = torch.autograd.grad(out, moved, grad.to(backend.device))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu(), e, rtol=2e-5, atol=1e-5)


def test_gradcheck() -> None:
    plan = random_plan(12, 4, dropped=1)
    tokens = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(12, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.adaptive_pool(x, plan), tokens)
    assert torch.autograd.gradcheck(lambda x: reference.adaptive_pool(x, plan, "max"), tokens)
    assert torch.autograd.gradcheck(lambda x, w: reference.adaptive_pool(x, plan, "weighted", w), (tokens, weight))
    index = torch.tensor([[0, 2, -1]])
    compact = lambda x: torch.ops.crop.compact([x], index, [1])  # noqa: E731
    hidden = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compact, hidden)
    assert torch.autograd.gradgradcheck(compact, hidden)
