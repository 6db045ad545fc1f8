"""attention_mass on every backend: twin, native CPU kernels per instruction set, CUDA where there is a GPU."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from crop import ops
from tests.support.operators import (
    FLOATS,
    INF,
    NAN,
    Backend,
    assert_mass,
    mass_inputs,
    mass_oracle,
    same,
    spread,
)


def test_mass_by_hand(backend: Backend) -> None:
    """exp(log 1), exp(log 2), exp(log 5) over their sum 8; the second KV head sees equal keys."""
    key = torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]).log()[None, :, :, None]
    index = torch.tensor([[2, -1, 0]])
    query = torch.ones(1, 2, 1, 1)
    mass = backend(ops.attention_mass, query[:, :1], key[:, :1], index, scale=1.0)
    torch.testing.assert_close(mass, torch.tensor([[5 / 8, 0, 1 / 8]]))
    mass = backend(ops.attention_mass, query, key, index, scale=1.0)
    torch.testing.assert_close(mass, torch.tensor([[(5 / 8 + 1 / 3) / 2, 0, (1 / 8 + 1 / 3) / 2]]))
    # Head 1 of a group of two asks twice as sharply: 1, 4, 25 over 30.
    mass = backend(ops.attention_mass, torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), key[:, :1], index, scale=1.0)
    torch.testing.assert_close(mass, torch.tensor([[(5 / 8 + 25 / 30) / 2, 0, (1 / 8 + 1 / 30) / 2]]))
    # Two rows, of which the first sees two keys only; a given lse of log 4 halves what remains of the second.
    mass = backend(
        ops.attention_mass, torch.ones(1, 1, 2, 1), key[:, :1], index, scale=1.0, visible_len=torch.tensor([[2, 3]])
    )
    torch.testing.assert_close(mass, torch.tensor([[5 / 16, 0, (1 / 3 + 1 / 8) / 2]]))
    lse = torch.full((1, 1, 1), 16.0).log()
    mass = backend(ops.attention_mass, query[:, :1], key[:, :1], index, scale=1.0, lse=lse)
    torch.testing.assert_close(mass, torch.tensor([[5 / 16, 0, 1 / 16]]))


MASS_SIZES = [  # batch, heads, kv_heads, rows, keys, dim
    (1, 1, 1, 1, 1, 1),
    (1, 1, 1, 1, 97, 64),
    (2, 2, 2, 2, 15, 80),
    (1, 2, 1, 2, 300, 33),
    (1, 3, 1, 1, 192, 128),
    (2, 8, 2, 7, 63, 96),
    (1, 7, 1, 16, 193, 128),
    (1, 8, 1, 17, 576, 64),
    (1, 4, 4, 31, 130, 256),
    (1, 4, 2, 65, 257, 72),
    (1, 2, 2, 127, 100, 40),
]


@functools.cache
def mass_case(sizes: tuple[int, ...], dtype: torch.dtype, own: bool) -> tuple[Any, Any]:
    """Arguments and float64 result, computed once for all backends."""
    g = torch.Generator().manual_seed(sum(sizes))
    query, key = mass_inputs(*sizes, dtype=dtype)
    index = torch.rand(sizes[0], sizes[4], generator=g).argsort(1)[:, : (sizes[4] + 1) // 2].contiguous()
    lse = None if own else torch.randn(query.shape[:3], generator=g) * 0.1 + 3
    return (query, key, index, lse), mass_oracle(query, key, index, lse=lse)


@pytest.mark.parametrize("sizes", MASS_SIZES, ids=str)
def test_mass_sizes(backend: Backend, sizes: tuple[int, ...]) -> None:
    for dtype, own in itertools.product(FLOATS, (True, False)):
        (query, key, index, lse), expected = mass_case(sizes, dtype, own)
        assert_mass(backend(ops.attention_mass, query, key, index, lse=lse), expected)


def ragged() -> dict[str, Tensor]:
    """Three samples: no padding; left padding with rows at different ends; no counted row at all."""
    length = torch.tensor([[40, 90, 200, 140], [0, 30, 31, 199], [10, 5, 0, 0]])
    return {"visible_start": torch.tensor([0, 30, 10]), "visible_len": length}


def test_mass_visibility_and_samples(backend: Backend) -> None:
    query, key = mass_inputs(3, 6, 2, 4, 200, 48)
    index = torch.tensor([[0, 29, 30, 31, 150], [199, -1, 0, 40, -1], [1, 2, 3, 4, 5], [100, 139, 140, 141, 198]])
    sample = torch.tensor([1, 0, 2, 0])
    expected = mass_oracle(query, key, index, sample=sample, **ragged())
    mass = backend(ops.attention_mass, query, key, index, sample=sample, **ragged())
    assert_mass(mass, expected)
    assert not mass[2].any()
    int32 = {name: t.to(torch.int32) for name, t in ragged().items()}
    same(backend(ops.attention_mass, query, key, index.int(), sample=sample.int(), **int32), mass)
    # What a padding row or an invisible key holds does not matter.
    query[1, :, 0] = NAN
    key[1, :, :30] = INF
    key[0, :, 140:] = NAN
    kwargs = ragged()
    kwargs["visible_len"][0, 2] = 0
    expected = mass_oracle(query, key, index, sample=sample, **kwargs)
    assert_mass(backend(ops.attention_mass, query, key, index, sample=sample, **kwargs), expected)


def test_mass_invariants(backend: Backend) -> None:
    query, key = mass_inputs(2, 8, 2, 5, 130, 128)
    index = torch.arange(130).expand(2, 130)
    mass = backend(ops.attention_mass, query, key, index)
    torch.testing.assert_close(mass.sum(1), torch.ones(2), rtol=1e-5, atol=0)
    close = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(backend(ops.attention_mass, query[:, :, [3, 0, 4, 1, 2]], key, index), mass, **close)
    order = torch.tensor([1, 0, 3, 2, 6, 7, 5, 4])  # within groups
    torch.testing.assert_close(backend(ops.attention_mass, query[:, order], key, index), mass, **close)
    repeated = key.repeat_interleave(4, 1)
    torch.testing.assert_close(backend(ops.attention_mass, query, repeated, index), mass, **close)
    shuffle = torch.randperm(130)
    torch.testing.assert_close(backend(ops.attention_mass, query, key[:, :, shuffle], index), mass[:, shuffle], **close)
    beyond = key.clone()
    beyond[..., 64:] = 0
    assert (backend(ops.attention_mass, query, beyond, index) / mass - 1).abs().max() > 0.1


def test_mass_special_values(backend: Backend) -> None:
    """Rows of one channel with scale 1: the logits are the keys."""
    keys = torch.tensor([1.0, 2.0, 3.0, 0.5])
    index = torch.arange(4)[None]
    query = torch.ones(1, 1, 1, 1)

    def run(values: list[float], rows: int = 1, **kwargs: Any) -> Tensor:
        key = torch.tensor(values).view(1, 1, -1, 1)
        args = (query.expand(1, 1, rows, 1), key, index[:, : len(values)])
        mass = backend(ops.attention_mass, *args, scale=1.0, **kwargs)
        assert_mass(mass, mass_oracle(*args, scale=1.0, **kwargs))
        return mass[0]

    for rows in (1, 9):  # below and above the limit of the kernel for few rows
        plain = run(keys.tolist(), rows)
        assert run([1.0, -INF, 3.0, 0.5], rows)[1] == 0
        with_inf = run([1.0, INF, 3.0, 0.5], rows)
        assert with_inf[1].isnan() and (with_inf[[0, 2, 3]] == 0).all()
        assert run([1.0, NAN, 3.0, 0.5], rows).isnan().all()
        assert run([1.0, NAN, INF, 0.5], rows).isnan().all()
        assert (run([-INF] * 4, rows) == 0).all()
        sink = run([1.0, 80.0, 3.0, -1e4], rows)
        assert sink[1] == 1 and sink[3] == 0 and 0 < sink[0] < plain[0]
        shape = (1, 1, rows)
        for lse in (INF, -INF):
            assert (run(keys.tolist(), rows, lse=torch.full(shape, lse)) == 0).all()
        nan_only_there = run([1.0, NAN, INF, -INF], rows, lse=torch.ones(shape))
        assert nan_only_there[[1, 2]].isnan().all() and nan_only_there[0].isfinite() and nan_only_there[3] == 0
        assert run(keys.tolist(), rows, lse=torch.full(shape, -200.0)).isinf().all()


def test_mass_empty(backend: Backend) -> None:
    query, key = mass_inputs(2, 4, 2, 3, 10, 16)
    index = torch.arange(4).expand(2, 4)
    assert backend(ops.attention_mass, query, key, index[:, :0]).shape == (2, 0)
    assert backend(ops.attention_mass, query[:0], key[:0], index[:0]).shape == (0, 4)
    assert not backend(ops.attention_mass, query[:, :, :0], key, index).any()
    for dtype, lse in itertools.product(FLOATS, (None, torch.zeros(2, 4, 3))):
        keyless = (query.to(dtype), key[:, :, :0].to(dtype), torch.full((2, 4), -1))
        assert not backend(ops.attention_mass, *keyless, lse=lse).any()
    assert backend(ops.attention_mass, query, key, index[:0], sample=torch.zeros(0, dtype=torch.int64)).shape == (0, 4)


def test_mass_strides(backend: Backend) -> None:
    for dtype, dim in itertools.product(FLOATS, (40, 64, 128)):  # of 64 and 128 the CPU reads whole tiles in place
        query, key = mass_inputs(2, 4, 2, 9, 120, dim, dtype=dtype)
        index = torch.randint(0, 120, (2, 50))
        mass = backend(ops.attention_mass, query, key, index)
        same(backend(ops.attention_mass, spread(query), spread(key, gap=5), index), mass)
        transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key)]
        same(backend(ops.attention_mass, *transposed, index.t().contiguous().t()), mass)


def test_mass_alone_equals_batch(native: Backend) -> None:
    """Bitwise, whatever the neighbours and the padding: more keys, more rows, a shifted start."""
    for rows, heads in ((1, 2), (2, 4), (9, 4), (40, 2)):
        query, key = mass_inputs(1, heads, 2, rows, 150, 64)
        index = torch.randint(0, 150, (1, 60))
        length = torch.randint(60, 151, (1, rows))
        for lse in (None, torch.randn(1, heads, rows)):
            alone = backend_mass = native(ops.attention_mass, query, key, index, visible_len=length, lse=lse)
            other_query, other_key = mass_inputs(2, heads, 2, rows + 30, 700, 64, seed=1)
            pad = 37
            other_query[1, :, :rows], other_key[1, :, pad : pad + 150] = query[0], key[0]
            lens = torch.full((2, rows + 30), 700)
            lens[1] = 0
            lens[1, :rows] = length[0] + pad
            many = torch.randint(0, 700, (2, 60))
            many[1] = index[0] + pad
            more = None if lse is None else torch.randn(2, heads, rows + 30)
            if lse is not None:
                more[1, :, :rows] = lse[0]
            start = torch.tensor([3, pad])
            batch = native(
                ops.attention_mass, other_query, other_key, many, visible_start=start, visible_len=lens, lse=more
            )
            same(batch[1:], backend_mass)
            same(native(ops.attention_mass, query, key, index, visible_len=length, lse=lse), alone)


def test_mass_of_many_candidates_equals_that_of_few(native: Backend) -> None:
    """Bitwise: with many a GPU lets warps share queries."""
    query, key = mass_inputs(1, 8, 8, 61, 360, 256, dtype=torch.bfloat16)
    index, lse = torch.randperm(360)[None], torch.rand(1, 8, 61) + 3
    many = native(ops.attention_mass, query, key, index, lse=lse)
    same(native(ops.attention_mass, query, key, index[:, :90].contiguous(), lse=lse), many[:, :90])


def test_mass_of_many_images_equals_that_of_one(native: Backend) -> None:
    """Bitwise: with many images a GPU shares the work of each among fewer blocks."""
    query, key = mass_inputs(1, 32, 32, 2, 260, 64, dtype=torch.bfloat16)
    index, lse = torch.randperm(260)[None], torch.rand(1, 32, 2) + 3
    one = native(ops.attention_mass, query, key, index, lse=lse)
    many = index.expand(18, -1).contiguous()
    for mass in native(ops.attention_mass, query, key, many, sample=torch.zeros(18, dtype=torch.int64), lse=lse):
        same(mass[None], one)
