"""The operators on every backend: twin, native CPU kernels per instruction set, CUDA where there is a GPU."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any

import ops_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    BACKENDS,
    INF,
    NAN,
    Backend,
    assert_mass,
    mass_inputs,
    mass_oracle,
    pool_oracle,
    random_plan,
    select_oracle,
)
from torch import Tensor

from crop import ops, reference
from crop.ops import library
from crop.plan import PoolPlan

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]


@pytest.fixture(params=BACKENDS)
def backend(request: Any) -> Backend:
    reason = BACKENDS[request.param].missing()
    if reason:
        pytest.skip(reason)
    return BACKENDS[request.param]


@pytest.fixture(params=[name for name in BACKENDS if name != "twin"])
def native(request: Any) -> Backend:
    reason = BACKENDS[request.param].missing()
    if reason:
        pytest.skip(reason)
    return BACKENDS[request.param]


@contextlib.contextmanager
def threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def spread(tensor: Tensor, offset: int = 1, gap: int = 3) -> Tensor:
    """The same values as a view whose rows lie apart and start off the alignment."""
    shape = torch.Size((*tensor.shape[:-1], tensor.shape[-1] + gap))
    storage = torch.zeros(shape.numel() + offset)
    view = storage.to(tensor.dtype)[offset:].view(shape)[..., : tensor.shape[-1]]
    return view.copy_(tensor)


# --- attention_mass -------------------------------------------------------------------------------------------------


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
    for dtype in FLOATS:
        query, key = mass_inputs(2, 4, 2, 9, 120, 40, dtype=dtype)
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


# --- select ---------------------------------------------------------------------------------------------------------


def test_select_by_hand(backend: Backend) -> None:
    score = torch.tensor([[0.5, 2.0, -0.0, 0.0, 2.0, NAN, INF, -INF]])
    for keep, expected in [
        (0, []),
        (1, [6]),
        (2, [1, 6]),  # of equals the first
        (4, [0, 1, 4, 6]),
        (5, [0, 1, 2, 4, 6]),  # -0 equals +0
        (7, [0, 1, 2, 3, 4, 5, 6]),  # NaN ranks as -inf, and before the later -inf
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ]:
        assert backend(ops.select, score, keep).tolist() == [expected]
    priority = torch.tensor([[0, 0, 3, 0, -1, 1, -1, 1]], dtype=torch.int8)
    assert backend(ops.select, score, 1, priority=priority).tolist() == [[2]]
    assert backend(ops.select, score, 3, priority=priority).tolist() == [[2, 5, 7]]
    assert backend(ops.select, score, 8, priority=priority).tolist() == [[0, 1, 2, 3, 5, 7, -1, -1]]
    index = torch.tensor([[10, -1, 12, 13, 14, 15, -1, 17]])
    assert backend(ops.select, score, 2, index=index).tolist() == [[10, 14]]
    assert backend(ops.select, score, 8, index=index).tolist() == [[10, 12, 13, 14, 15, 17, -1, -1]]
    weight = torch.tensor([[9.0, 1, 1, 1, 0, 1, 0, 1]])  # inf * 0 = NaN
    assert backend(ops.select, score, 2, weight=weight).tolist() == [[0, 1]]
    assert backend(ops.select, score.expand(3, 8), [0, 3, 1]).tolist() == [[-1, -1, -1], [1, 4, 6], [6, -1, -1]]


def score_families(tokens: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(tokens)
    normal = torch.randn(tokens, generator=g)
    mass = (normal / 4).exp() / tokens
    return {
        "normal": normal,
        "mass": mass,
        "duplicates": mass[torch.randint(0, max(1, tokens // 3), (tokens,), generator=g)],
        "bf16": mass.bfloat16().float(),
        "one bin": 1 + torch.rand(tokens, generator=g) * 1e-4,
        "narrow": 1 + 0.245 * torch.rand(tokens, generator=g),
        "up": torch.arange(tokens).float(),
        "down": -torch.arange(tokens).float(),
        "equal": torch.full((tokens,), 0.25),
        "two": (normal > 0).float(),
        "zeros": torch.where(normal > 0.5, mass, 0.0) * normal.sign(),
        "denormal": normal * 1e-40,
        "wild": torch.where(normal.abs() > 1, torch.tensor([INF, -INF, NAN, -0.0])[torch.arange(tokens) % 4], normal),
        "nan": torch.full((tokens,), NAN),
    }


@pytest.mark.parametrize("tokens", [1, 2, 17, 576])
def test_select_families(backend: Backend, tokens: int) -> None:
    families = score_families(tokens)
    score = torch.stack(list(families.values()))
    g = torch.Generator().manual_seed(1)
    priority = torch.randint(-2, 4, score.shape, generator=g).to(torch.int8)
    weight = torch.rand(score.shape, generator=g) * torch.randint(0, 2, score.shape, generator=g)
    index = torch.arange(tokens).expand(score.shape) * 3 - tokens
    for keep in sorted({0, 1, tokens // 4, tokens // 2, tokens - 1, tokens}):
        for kwargs in (
            {},
            {"weight": weight},
            {"priority": priority},
            {"weight": weight, "priority": priority, "index": index},
        ):
            budget = [keep] * len(score)
            same(backend(ops.select, score, budget, **kwargs), select_oracle(score, budget, **kwargs))


@pytest.mark.parametrize("tokens", [4095, 4096, 4097, 16383, 16384, 16385, 70001])
def test_select_large(native: Backend, tokens: int) -> None:
    score = torch.stack([score_families(tokens)[name] for name in ("mass", "one bin", "zeros", "equal", "wild")])
    budget = [tokens // 4, 1, tokens - 1, tokens // 2, 576]
    kept = native(ops.select, score, budget)
    same(kept, reference.select(score, budget))
    for row, keep in zip(kept, budget, strict=True):
        assert (row[keep:] == -1).all() and (row[:keep].diff() > 0).all() and row[0] >= 0 and row.max() < tokens
    priority = torch.randint(-1, 3, score.shape).to(torch.int8)
    same(native(ops.select, score, budget, priority=priority), reference.select(score, budget, priority=priority))


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, 2.0, 1.0000001])


@st.composite
def select_arguments(draw: Any) -> tuple[Tensor, list[int], dict[str, Tensor]]:
    images, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    number = st.one_of(SPECIAL, st.floats(width=32))

    def grid(values: Any, dtype: torch.dtype) -> Tensor:
        flat = draw(st.lists(values, min_size=images * tokens, max_size=images * tokens))
        return torch.tensor(flat, dtype=dtype).view(images, tokens)

    kwargs = {}
    if draw(st.booleans()):
        kwargs["weight"] = grid(number, torch.float32)
    if draw(st.booleans()):
        kwargs["priority"] = grid(st.integers(-128, 127), torch.int8)
    if draw(st.booleans()):
        kwargs["index"] = grid(st.integers(-2, 1000), torch.int64)
    budget = draw(st.lists(st.integers(0, tokens), min_size=images, max_size=images))
    return grid(number, torch.float32), budget, kwargs


@settings(max_examples=100, deadline=None)
@given(select_arguments())
def test_select_properties(arguments: tuple[Tensor, list[int], dict[str, Tensor]]) -> None:
    score, budget, kwargs = arguments
    expected = select_oracle(score, budget, **kwargs)
    for candidate in BACKENDS.values():
        if not candidate.missing():
            same(candidate(ops.select, score, budget, **kwargs), expected)


def test_region_topk(backend: Backend) -> None:
    query, key = mass_inputs(2, 4, 2, 6, 200, 64)
    index = torch.arange(20, 150).expand(2, 130).clone()
    index[1, 100:] = -1
    weight, priority = torch.rand(2, 130), torch.randint(-1, 3, (2, 130)).to(torch.int8)
    kwargs = {"weight": weight, "priority": priority}
    kept, mass = backend(ops.region_topk, query, key, index, [50, 80], return_scores=True, **kwargs)
    same(mass, backend(ops.attention_mass, query, key, index))
    same(kept, select_oracle(mass, [50, 80], index=index, **kwargs))
    same(backend(ops.region_topk, query, key, index, [50, 80], **kwargs), kept)
    # A token may differ from the float64 choice only where its score is at the threshold.
    exact, _ = mass_oracle(query, key, index)
    chosen = select_oracle(exact, [50, 50])
    mine = backend(ops.select, mass, [50, 50])
    for i in range(2):
        threshold = exact[i, chosen[i]].min()
        differing = set(chosen[i].tolist()) ^ set(mine[i].tolist())
        assert all(abs(float(exact[i, n] / threshold) - 1) < 1e-5 for n in differing)


# --- compact --------------------------------------------------------------------------------------------------------


def fill(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bits, NaN patterns included."""
    size = torch.empty(0, dtype=dtype).element_size()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(-128, 128, (*shape[:-1], shape[-1] * size), dtype=torch.int8).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


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


# --- adaptive_pool --------------------------------------------------------------------------------------------------

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


# --- every operator -------------------------------------------------------------------------------------------------


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """One substantial call of every operator: function, arguments, keyword arguments."""
    query, key = mass_inputs(2, 8, 2, 40, 700, 64, dtype=torch.bfloat16)
    index = torch.arange(600).expand(2, 600).contiguous()
    plan, tokens = random_plan(2000, 700), torch.randn(2000, 200)
    hidden = torch.randn(2, 600, 300)
    kept = torch.arange(0, 600, 3).expand(2, 200).contiguous()
    scores = torch.randn(40, 3000).round(decimals=1)
    return {
        "attention_mass": (ops.attention_mass, (query, key, index), {}),
        "attention_mass lse": (ops.attention_mass, (query, key, index), {"lse": torch.ones(2, 8, 40)}),
        "attention_mass few": (ops.attention_mass, (query[:, :, :1], key, index), {}),
        "region_topk": (ops.region_topk, (query, key, index, 100), {}),
        "select": (ops.select, (scores, list(range(0, 2000, 50))), {}),
        "compact": (ops.compact, ([hidden, hidden[..., 0].contiguous()], kept), {}),
        "pool mean": (ops.adaptive_pool, (tokens, plan), {}),
        "pool weighted": (ops.adaptive_pool, (tokens, plan, "weighted", torch.rand(2000)), {}),
        "pool max": (ops.adaptive_pool, (tokens, plan, "max"), {}),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_repeatable_and_thread_independent(native: Backend, name: str) -> None:
    function, args, kwargs = operator_calls()[name]
    before = [t.clone() for t in args if isinstance(t, Tensor)]

    def run() -> list[Tensor]:
        result = native(function, *args, **kwargs)
        return [result] if isinstance(result, Tensor) else list(result)

    with threads(1):
        expected = run()
    for count in (1,) if native.emulated else (1, 2, 8):  # of CPU threads
        with threads(count):
            for a, b in zip(run(), expected, strict=True):
                same(a, b)
    for a, b in zip([t for t in args if isinstance(t, Tensor)], before, strict=True):
        assert torch.equal(a, b)  # inputs are never written


def test_pool_of_threads_survives_fork() -> None:
    """A child inherits the pool but not its threads; it must start its own instead of waiting for ever."""
    import os

    function, args, kwargs = operator_calls()["pool mean"]
    with threads(2):
        expected = function(*args, **kwargs)
        child = os.fork()
        if child == 0:
            ok = False
            with contextlib.suppress(BaseException):
                tokens, plan = args
                out, code = torch.empty_like(expected), 0
                code = library.native and library.native.adaptive_pool(
                    False, 2, tokens.data_ptr(), plan.members.data_ptr(), plan.offsets.data_ptr(), 0, out.data_ptr(), 0,
                    *tokens.shape, len(plan.members), plan.num_out, tokens.stride(0), 0, 0,
                )  # fmt: skip
                ok = library.native is None or (code == 0 and out.numpy().tobytes() == expected.numpy().tobytes())
            os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_opcheck() -> None:
    query, key = mass_inputs(2, 4, 2, 5, 40, 16)
    index, score = torch.arange(30).expand(2, 30).contiguous(), torch.randn(2, 30)
    plan = random_plan(30, 8, dropped=2)
    tokens, weight = torch.randn(30, 6, requires_grad=True), torch.rand(30, requires_grad=True)
    hidden = torch.randn(2, 30, 6, requires_grad=True)
    crop, priority = torch.ops.crop, torch.zeros(2, 30, dtype=torch.int8)
    check = torch.library.opcheck
    check(crop.attention_mass.default, (query, key, index, None, None, 0.25, None, None))
    permuted = query.transpose(1, 2).contiguous().transpose(1, 2)
    check(crop.attention_mass.default, (permuted, key, index, torch.tensor([1, 0]), torch.ones(2, 4, 5), 0.25,
                                        torch.tensor([0, 2]), torch.full((2, 5), 30)))  # fmt: skip
    check(crop.select.default, (score, [3, 7], None, None, None))
    check(crop.select.default, (score, [3, 7], score, priority, index))
    check(crop.compact.default, ([hidden, hidden.detach().transpose(1, 2)], index[:, ::3].contiguous(), [1, 2]))
    check(crop.invert_index.default, (index, 40))
    for mode in MODES:
        w = weight if mode == "weighted" else None
        check(crop.adaptive_pool.default, (tokens, plan.members, plan.offsets, plan.inverse, w, mode))
    check(crop.adaptive_pool.default, (tokens.detach(), plan.members, plan.offsets, None, None, "max"))


def test_compile_without_graph_breaks() -> None:
    query, key = mass_inputs(1, 4, 2, 5, 40, 16)
    index = torch.arange(30)[None]

    def step(query: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
        kept = ops.region_topk(query, key, index, 9)
        return ops.compact([hidden * 2], kept)[0].sum(1)

    hidden = torch.randn(1, 40, 8, requires_grad=True)
    expected = step(query, key, hidden)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, hidden), expected)


# --- errors ---------------------------------------------------------------------------------------------------------

Q, K = mass_inputs(2, 4, 2, 3, 20, 8)
V = torch.arange(10).expand(2, 10)
PLAN = random_plan(10, 4)
X = torch.randn(10, 4)
BAD = [  # call, exception, what the message must say
    (lambda: ops.attention_mass(Q.double(), K.double(), V), TypeError, "query must be float32 or bfloat16 or float16, got"),
    (lambda: ops.attention_mass(Q, K.half(), V), TypeError, "key must be float32, got torch.float16"),
    (lambda: ops.attention_mass(Q[0], K, V), ValueError, r"query must have 4 dimensions, got shape \(4, 3, 8\)"),
    (lambda: ops.attention_mass(Q, K[:1], V), ValueError, r"key must have shape \(2, any, any, 8\), got \(1, 2, 20, 8\)"),
    (lambda: ops.attention_mass(Q, K[..., :4], V), ValueError, "key must have shape"),
    (lambda: ops.attention_mass(Q[:, :3], K, V), ValueError, "num_heads must be a multiple of num_kv_heads=2, got 3"),
    (lambda: ops.attention_mass(Q.transpose(2, 3), K[..., :3], V), ValueError, "query must have a last stride of 1"),
    (lambda: ops.attention_mass(torch.zeros(1, 1, 1, 257), torch.zeros(1, 1, 1, 257), V[:1]), ValueError, "head_dim"),
    (lambda: ops.attention_mass(Q, K, V.float()), TypeError, "vision_index must be int64 or int32, got torch.float32"),
    (lambda: ops.attention_mass(Q, K, V + 11), ValueError, "vision_index must be at least -1 and less than 20, got 20"),
    (lambda: ops.attention_mass(Q, K, V - 2), ValueError, "vision_index must be at least -1 and less than 20, got -2"),
    (lambda: ops.attention_mass(Q, K, V[:1]), ValueError, "sample must be given unless images=1 equals batch=2, got None"),
    (lambda: ops.attention_mass(Q, K, V, sample=torch.tensor([0, 2])), ValueError, "sample must be at least 0 and less than 2"),
    (lambda: ops.attention_mass(Q, K, V, lse=torch.zeros(2, 3, 4)), ValueError, r"lse must have shape \(2, 4, 3\)"),
    (lambda: ops.attention_mass(Q, K, V, lse=torch.zeros(2, 4, 3).half()), TypeError, "lse must be float32"),
    (lambda: ops.attention_mass(Q, K, V, visible_len=torch.zeros(2, 4)), TypeError, "visible_len must be int64 or int32"),
    (lambda: ops.attention_mass(Q, K, V, scale=NAN), ValueError, "scale must be finite, got nan"),
    (lambda: ops.attention_mass(Q, K, V.to("meta")), ValueError, "vision_index must be on cpu, got meta"),
    (lambda: ops.attention_mass(Q.numpy(), K, V), TypeError, "query must be a Tensor, got ndarray"),
    (lambda: ops.select(V.float(), 11), ValueError, r"select: num_keep\[0\] must be in \[0, num_vision=10\], got 11"),
    (lambda: ops.select(V.float(), [1, -1]), ValueError, r"num_keep\[1\] must be in \[0, num_vision=10\], got -1"),
    (lambda: ops.select(V.float(), [1]), ValueError, r"num_keep must have one entry per image \(2\), got 1"),
    (lambda: ops.select(V.float(), 0.5), TypeError, r"num_keep\[0\] must be an int, got 0.5"),
    (lambda: ops.select(V.float(), torch.tensor([1, 1])), TypeError, "num_keep must be an int or a list of ints"),
    (lambda: ops.select(V, 1), TypeError, "score must be float32, got torch.int64"),
    (lambda: ops.select(V.float(), 1, priority=V), TypeError, "priority must be int8, got torch.int64"),
    (lambda: ops.select(V.float(), 1, weight=X), ValueError, r"weight must have shape \(2, 10\), got \(10, 4\)"),
    (lambda: ops.region_topk(Q, K, V, 11), ValueError, r"region_topk: num_keep\[0\] must be in \[0, num_vision=10\], got 11"),
    (lambda: ops.compact([], V), ValueError, "tensors must be a non-empty sequence"),
    (lambda: ops.compact(X, V), ValueError, "tensors must be a non-empty sequence of tensors, got Tensor"),
    (lambda: ops.compact([K], V, token_dim=4), ValueError, r"token_dim\[0\] must be in \[1, 4\), got 4"),
    (lambda: ops.compact([K], V, token_dim=[2, 2]), ValueError, r"token_dim must have one entry per tensor \(1\), got 2"),
    (lambda: ops.compact([K[:1]], V, token_dim=2), ValueError, r"tensors\[0\] must have batch size 2"),
    (lambda: ops.compact([K], V.float(), token_dim=2), TypeError, "index must be int64 or int32"),
    (lambda: ops.compact([K], V + 15, token_dim=2), ValueError, "index must be less than 20, got"),
    (lambda: ops.compact([K], V.flip(1), token_dim=2), ValueError, "index must be strictly ascending where not negative"),
    (lambda: ops.compact([K], V * 0, token_dim=2), ValueError, "index must be strictly ascending where not negative"),
    (lambda: ops.compact([K.unsqueeze(-1)[..., ::2, :]], V, token_dim=2), ValueError, "must be contiguous after axis 2"),
    (lambda: ops.compact([torch.zeros(2, 3, 4, 20)[:, :, :3]], V, token_dim=3), ValueError, "axes 1..2 that merge into one"),
    (lambda: ops.compact([K.to("meta")], V, token_dim=2), ValueError, r"tensors\[0\] must be on cpu, got meta"),
    (lambda: ops.adaptive_pool(X[:9], PLAN), ValueError, r"tokens must have shape \(10, any\), got \(9, 4\)"),
    (lambda: ops.adaptive_pool(X.double(), PLAN), TypeError, "tokens must be float32 or bfloat16 or float16"),
    (lambda: ops.adaptive_pool(X, PLAN, "median"), ValueError, "mode must be one of mean, weighted, max, got 'median'"),
    (lambda: ops.adaptive_pool(X, PLAN, "weighted"), ValueError, "weight must be given if and only if"),
    (lambda: ops.adaptive_pool(X, PLAN, "mean", torch.ones(10)), ValueError, "weight must be given if and only if"),
    (lambda: ops.adaptive_pool(X, PLAN, "weighted", torch.ones(9)), ValueError, r"weight must have shape \(10,\), got \(9,\)"),
    (lambda: ops.adaptive_pool(X.T.contiguous().T, PLAN), ValueError, "tokens must have a last stride of 1"),
    (lambda: ops.use_backend("fast").__enter__(), ValueError, 'name must be "auto", "native" or "twin", got \'fast\''),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    call, error, message = BAD[case]
    for name in ("twin", "auto"):
        with (
            pytest.raises(error, match=message),
            ops.use_backend(name) if case != len(BAD) - 1 else contextlib.nullcontext(),
        ):
            call()


def test_memory_is_protected_below_the_checks() -> None:
    """The launchers refuse plans and sizes that the public functions would have caught, without reading memory."""
    if library.native is None:
        pytest.skip("no kernels were compiled")
    plan = PLAN
    far = plan.members + 100
    with pytest.raises(ValueError, match="plan members must be in"):
        torch.ops.crop.adaptive_pool(X, far, plan.offsets, None, None, "mean")
    with pytest.raises(ValueError, match="plan offsets must ascend"):
        torch.ops.crop.adaptive_pool(X, plan.members, plan.offsets + 100, None, None, "mean")
    with pytest.raises(ValueError, match="num_keep must be in"):
        torch.ops.crop.select(V.float(), [11, 0], None, None, None)
    assert library.native.set_isa("mmx") < 0 and "set_isa" in library.native.last_error()


def test_backends() -> None:
    seen = []
    original = reference.select
    reference.select = lambda *a, **k: seen.append("twin") or original(*a, **k)  # type: ignore[assignment]
    try:
        with ops.use_backend("twin"):
            ops.select(V.float(), 1)
        assert seen == ["twin"]
        ops.select(V.float(), 1)
        assert len(seen) == (1 if library.native else 2)
        if library.native is None:
            with pytest.raises(RuntimeError, match="reinstall"), ops.use_backend("native"):
                ops.select(V.float(), 1)
    finally:
        reference.select = original
    assert ops_cases.library._backend.get() == "auto"
