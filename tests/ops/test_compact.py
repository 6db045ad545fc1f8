"""compact and its inverse on every backend: twin, native CPU kernels per instruction set, CUDA where there is a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from crop import ops
from tests.support.operators import (
    FLOATS,
    Backend,
    bits,
    fill,
    spread,
)

DTYPES = [*FLOATS, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compact_types(backend: Backend, dtype: torch.dtype) -> None:
    index = torch.tensor([[0, 2, 3, -1, 8], [-1, 1, 5, 6, 7]])
    for shape, dim in (((2, 9, 1), 1), ((2, 9, 7), 1), ((2, 3, 9, 8), 2), ((2, 9, 4, 4), 1), ((2, 3, 2, 9, 5), 3)):
        source = fill(shape, dtype)
        (out,) = backend(ops.compact, [source], index, token_dim=dim)
        assert out.dtype == dtype and out.is_contiguous() and out.shape[dim] == 5
        for b, k in itertools.product(range(2), range(5)):
            row = out[b].select(dim - 1, k)
            j = int(index[b, k])
            expected = torch.zeros(row.shape, dtype=torch.uint8).to(dtype) if j < 0 else source[b].select(dim - 1, j)
            assert torch.equal(bits(row), bits(expected))


def test_compact_many(backend: Backend) -> None:
    """Everything that belongs to a token in one call: hidden states, position ids, keys and values, masks."""
    tensors = [
        torch.randn(2, 50, 33),
        torch.randint(0, 99, (2, 50)),
        torch.randn(2, 4, 50, 16),
        torch.rand(2, 50) > 0.5,
    ]
    tensors.append(torch.arange(300).view(3, 2, 50).transpose(0, 1))  # M-RoPE triples: (2, 3, 50)
    dims = [1, 1, 2, -1, 2]
    index = torch.stack([torch.randperm(50)[:20].sort().values for _ in range(2)])
    for outs in (
        backend(ops.compact, tensors, index, token_dim=dims),
        backend(ops.compact, tensors, index.int(), token_dim=dims),
    ):
        for out, tensor, dim in zip(outs, tensors, dims, strict=True):
            expected = torch.stack([tensor[b].index_select(dim % tensor.dim() - 1, index[b]) for b in range(2)])
            assert torch.equal(out, expected)


def test_compact_strides_and_sizes(backend: Backend) -> None:
    index = torch.stack([torch.randperm(300)[:123].sort().values for _ in range(2)])
    for width in (1, 7, 8, 1000):
        tensor = torch.randn(2, 300, width)
        (expected,) = backend(ops.compact, [tensor], index)
        assert torch.equal(expected[1], tensor[1, index[1]])
        for view in (spread(tensor), spread(tensor.bfloat16(), gap=1)):
            assert torch.equal(backend(ops.compact, [view], index)[0], expected.to(view.dtype))
        assert torch.equal(backend(ops.compact, [tensor[:1].expand(2, -1, -1)], index)[0][0], expected[0])
    large, kept = torch.randn(1, 1300, 1032), torch.arange(0, 1300, 1)[None, 100:]  # 5 MB: streaming stores
    kept[0, 7] = -1
    (out,) = backend(ops.compact, [large], kept)
    assert (
        torch.equal(out[0, 8:], large[0, 108:]) and not out[0, 7].any() and torch.equal(out[0, :7], large[0, 100:107])
    )
    assert backend(ops.compact, [torch.randn(2, 9, 0)], index[:, :0])[0].shape == (2, 0, 0)
    assert backend(ops.compact, [torch.randn(2, 0, 3)], torch.full((2, 2), -1))[0].tolist() == [[[0.0] * 3] * 2] * 2
    assert backend(ops.compact, [torch.randn(0, 9, 3)], index[:0, :4])[0].shape == (0, 4, 3)


def test_invert_index(backend: Backend) -> None:
    """What is negative or too large is left out; any order."""
    index = torch.tensor([[4, -1, 0, 2**40], [1, 2, -(2**63), 5]])
    invert = torch.ops.crop.invert_index.default
    assert backend(invert, index, 5).tolist() == [[2, -1, -1, -1, 0], [-1, 0, 1, -1, -1]]
    assert backend(invert, index.clamp(-9, 9).int(), 2).tolist() == [[2, -1], [-1, 0]]
    assert backend(invert, index[:, :0], 2).tolist() == [[-1, -1]] * 2
    assert backend(invert, index, 0).shape == (2, 0) and backend(invert, index[:0], 3).shape == (0, 3)
    order = torch.rand(2, 3000).argsort(1)
    assert torch.equal(backend(invert, order, 3000), order.argsort(1))


def test_compact_gradient(backend: Backend) -> None:
    hidden = torch.randn(2, 9, 5, requires_grad=True)
    cache = torch.randn(2, 3, 12, 4, requires_grad=True)  # more tokens than the others
    index = torch.tensor([[0, -1, 3], [2, 7, 8]])
    with backend.active():
        outs = ops.compact(
            [backend.move(hidden), torch.arange(18).view(2, 9).to(backend.device), backend.move(cache)],
            backend.move(index),
            token_dim=[1, 1, 2],
        )
    grads = [torch.randn(outs[0].shape), torch.randn(outs[2].shape)]
    torch.autograd.backward([outs[0], outs[2]], [g.to(backend.device) for g in grads])
    for tensor, grad, dim in ((hidden, grads[0], 1), (cache, grads[1], 2)):
        expected = torch.zeros_like(tensor)
        for b, k in itertools.product(range(2), range(3)):
            if index[b, k] >= 0:
                expected[b].select(dim - 1, int(index[b, k])).copy_(grad[b].select(dim - 1, k))
        assert torch.equal(tensor.grad, expected)
    assert not outs[1].requires_grad
