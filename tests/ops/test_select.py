"""select, and the two halves as region_topk on every backend: twin, native CPU kernels per instruction set, CUDA where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crop import ops
from crop.ops import reference
from tests.support.operators import (
    BACKENDS,
    INF,
    NAN,
    Backend,
    mass_inputs,
    mass_oracle,
    same,
    select_oracle,
)


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


@settings(max_examples=100)
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
