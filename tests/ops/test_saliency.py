"""saliency on every backend: the formula in float64, what an image's weights depend on, and odd shapes of memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crop import ops
from tests.support.operators import FLOATS, Backend, same, spread


def saliency_oracle(
    tokens: Tensor, index: Tensor, alone: Tensor | None = None, sharpness: float = 4.0, farthest: float = 8.0, flat: float = 1e-3
) -> Tensor:  # fmt: skip
    """One token at a time, float64."""
    weight = torch.ones(len(tokens), dtype=torch.float64)
    for row in index.tolist():
        places = [n for n in row if n >= 0]
        own = tokens[places].double()
        mean = own.mean(0)
        distance = torch.stack([1 - x @ mean / max(float(x.norm() * mean.norm()), 1e-12) for x in own])
        z = (distance - distance.mean()) / (distance.std(correction=0) + flat)
        weight[places] = torch.exp(sharpness * z.clamp(-farthest, farthest))
    return weight if alone is None else weight.masked_fill(alone, 1)


def images(count: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens that look somewhat alike, and images of different sizes among them."""
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(dim, generator=g) + 0.7 * torch.randn(count * tokens + 5, dim, generator=g)
    sizes = [tokens - 3 * n for n in range(count)]
    places = torch.randperm(len(x), generator=g)[: sum(sizes)].split(sizes)
    index = torch.nn.utils.rnn.pad_sequence([p.sort().values for p in places], batch_first=True, padding_value=-1)
    return x.to(dtype), index


def assert_weights(found: Tensor, expected: Tensor) -> None:
    """An error of a distance grows by sharpness over the spread of the distances."""
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double().log(), expected.log(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count, tokens, dim", [(1, 9, 8), (3, 70, 33), (2, 300, 520)])
def test_saliency_matches_the_formula(backend: Backend, dtype: torch.dtype, count: int, tokens: int, dim: int) -> None:
    x, index = images(count, tokens, dim, dtype)
    alone = torch.arange(len(x)) % 5 == 0
    expected = saliency_oracle(x, index, alone)
    found = backend(ops.saliency, x, index, alone=alone)
    assert_weights(found, expected)
    assert (found[alone] == 1).all() and (found[index[index >= 0]] != 1).sum() > 4
    constants = {"sharpness": 2.0, "farthest": 0.5, "flat": 0.25}
    assert_weights(backend(ops.saliency, x, index.int(), **constants), saliency_oracle(x, index, **constants))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_does_not_know_its_batch(native: Backend, dtype: torch.dtype) -> None:
    """Nor the fillers, the places in the sequence, the strides or the alignment."""
    x, index = images(3, 130, 72, dtype)
    together = native(ops.saliency, x, index)
    for row in index:
        places = row[row >= 0]
        alone = native(ops.saliency, x[places], torch.arange(len(places))[None])
        same(alone, together[places])
    same(native(ops.saliency, spread(x), index), together)


def test_saliency_of_nothing(backend: Backend) -> None:
    x = torch.randn(4, 8)
    for tokens, index in (
        (x, torch.zeros(0, 3, dtype=torch.int64)),
        (x, torch.zeros(2, 0, dtype=torch.int64)),
        (x, torch.full((2, 3), -1)),
        (x[:, :0], torch.tensor([[0, 1]])),
        (x, torch.tensor([[3, -1]])),  # alone in its image
    ):
        assert backend(ops.saliency, tokens, index).tolist() == [1.0] * 4
    assert backend(ops.saliency, x[:0], torch.zeros(1, 0, dtype=torch.int64)).shape == (0,)


def test_a_nan_stays_in_its_image(backend: Backend) -> None:
    x, index = images(2, 20, 8)
    spoilt = x.clone()
    spoilt[index[0, 3]] = float("nan")
    found = backend(ops.saliency, spoilt, index)
    assert found[index[0]].isnan().all()
    same(found[index[1][index[1] >= 0]], backend(ops.saliency, x, index)[index[1][index[1] >= 0]])
