"""spread on every backend: bit for bit a loop over Python's comparisons, and the choice that geometry gives by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crop import ops
from crop.ops import reference
from tests.support.operators import INF, NAN, Backend, same
from tests.support.operators import spread as apart

ODD = torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, -1.0])


def larger(a: float, b: float) -> float:
    return NAN if math.isnan(a) or math.isnan(b) else max(a, b)


def spread_oracle(alike: Tensor, near: Tensor, count: int, at_once: int, fresh: bool) -> list[int]:
    """Sorted by (NaN?, value, token), a round at a time; Python's 0.0 == -0.0, too."""
    rows, now, chosen = alike.tolist(), near.tolist(), []
    while len(chosen) < count:
        left = [n for n in range(len(now)) if n not in chosen]
        left.sort(key=lambda n: (math.isnan(now[n]), 0.0 if math.isnan(now[n]) else now[n], n))
        best = left[: min(at_once, count - len(chosen))]
        if fresh and not chosen:
            now = [-INF] * len(now)
        for k in best:
            now = [larger(a, b) for a, b in zip(now, rows[k], strict=True)]
        chosen += best
    return chosen


def assert_spread(backend: Backend, alike: Tensor, near: Tensor, count: int, at_once: int) -> None:
    for fresh in (False, True):
        found = backend(ops.spread, alike, near, count, at_once, fresh=fresh)
        assert found.dtype == torch.int64 and found.is_contiguous()
        assert found.tolist() == spread_oracle(alike, near, count, at_once, fresh)


def test_spread_by_hand(backend: Backend) -> None:
    """On a line: the farthest from 0, the farthest from both, and so on."""
    place = torch.tensor([1.0, 9.0, 10.0, 4.0, 5.0, 0.5])
    alike = -(place[:, None] - place).abs()
    assert backend(ops.spread, alike, -place, 6).tolist() == [2, 4, 0, 1, 3, 5]
    assert backend(ops.spread, alike, -place, 5, 2).tolist() == [2, 1, 3, 4, 0]  # 9 and 10 do not know of each other
    assert backend(ops.spread, alike, place, 3, fresh=True).tolist() == [
        5,
        2,
        4,
    ]  # 0.5, which it starts from, is forgotten


@pytest.mark.parametrize(
    "tokens, count, at_once", [(1, 1, 1), (5, 5, 9), (33, 20, 1), (97, 97, 7), (150, 64, 5), (300, 9, 4)]
)
def test_spread_matches_a_loop(backend: Backend, tokens: int, count: int, at_once: int) -> None:
    """Cosines; few different values; values that no similarity has; rows that lie apart."""
    g = torch.Generator().manual_seed(tokens)
    rows = torch.nn.functional.normalize(torch.randn(tokens, 8, generator=g), dim=1)
    assert_spread(backend, rows @ rows.T, rows @ rows[0], count, at_once)
    ties = torch.randint(-1, 2, (tokens + 1, tokens), generator=g) * 0.5
    assert_spread(backend, ties[:-1], ties[-1], count, at_once)
    odd = ODD[torch.randint(len(ODD), (tokens + 1, tokens), generator=g)]
    assert_spread(backend, apart(odd[:-1]), apart(odd[-1:].T)[:, 0], count, at_once)


def test_equal_ones_go_to_the_smaller_token(backend: Backend) -> None:
    for value in (0.0, NAN, INF, -INF):
        near = torch.full((70,), value)
        alike = near.expand(70, 70).contiguous()
        for at_once in (1, 8):
            assert backend(ops.spread, alike, near, 70, at_once).tolist() == list(range(70))
    near = torch.tensor([0.0, -0.0]).repeat(20)
    assert backend(ops.spread, torch.zeros(40, 40), near, 40, 3).tolist() == list(range(40))


def test_nan_comes_last_and_stays(backend: Backend) -> None:
    near = torch.tensor([NAN, INF, 0.5, -INF, 0.25])
    assert backend(ops.spread, torch.full((5, 5), -1.0), near, 5).tolist() == [3, 4, 2, 1, 0]
    alike = torch.full((5, 5), -1.0)
    alike[3, 4] = NAN  # behind all others, once 3 is chosen
    assert backend(ops.spread, alike, near, 5).tolist() == [3, 2, 1, 0, 4]


@pytest.mark.parametrize("tokens, count, at_once", [(1025, 70, 2), (4097, 40, 7)])
def test_spread_of_many(native: Backend, tokens: int, count: int, at_once: int) -> None:
    """Items of a thread, and ties among them; the twin is held to the loop above."""
    g = torch.Generator().manual_seed(tokens)
    rows = torch.randint(0, 4, (2 * tokens,), generator=g).float().unfold(0, tokens, 1)  # a number further each
    alike, near = rows[:tokens], rows[tokens]
    for fresh in (False, True):
        found = native(ops.spread, alike, near, count, at_once, fresh=fresh)
        same(found, reference.spread(alike, near, count, at_once, fresh=fresh))


def test_spread_of_nothing(backend: Backend) -> None:
    for tokens in (0, 3):
        assert backend(ops.spread, torch.zeros(tokens, tokens), torch.zeros(tokens), 0).shape == (0,)


def test_a_part_of_a_larger_matrix(backend: Backend) -> None:
    """As the caller has it: the rows of a side among those of all."""
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(60, 60, generator=g)
    part = whole[21:, 21:]
    found = backend(ops.spread, part, whole[21:, :21].amax(1), 17, 2)
    same(found, backend(ops.spread, part.contiguous(), whole[21:, :21].amax(1), 17, 2))
