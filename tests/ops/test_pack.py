"""pack on every backend: places of the tokens that stay, by hand and against lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crop import ops
from tests.support.operators import Backend, same

X, _ = True, False


def pack_oracle(stays: Tensor, width: int, kept: list[list[int]], sample: list[int]) -> tuple[Tensor, Tensor]:
    """Lists of what stays, padded on the left."""
    rows = [{n for n, stay in enumerate(row) if stay} for row in stays.tolist()]
    for one, b in zip(kept, sample, strict=True):
        rows[b] |= {n for n in one if n >= 0}
    index = [[-1] * (width - len(row)) + sorted(row) for row in rows]
    length = stays.shape[1]
    slots = [
        [entries.index(n) if n in row else -1 for n in range(length)] for entries, row in zip(index, rows, strict=True)
    ]
    return torch.tensor(index).view(len(rows), width), torch.tensor(slots).view(stays.shape)


def test_pack_by_hand(backend: Backend) -> None:
    stays = torch.tensor([[X, _, _, _, X], [_, _, _, _, X]])
    kept, sample = torch.tensor([[1, 2], [3, -1]]), torch.tensor([0, 1])
    index, slots = backend(ops.pack, stays, 4, kept=kept, sample=sample)
    assert index.tolist() == [[0, 1, 2, 4], [-1, -1, 3, 4]]
    assert slots.tolist() == [[0, 1, 2, -1, 3], [-1, -1, -1, 2, 3]]
    index, slots = backend(ops.pack, stays, 3)
    assert index.tolist() == [[-1, 0, 4], [-1, -1, 4]] and slots[1].tolist() == [-1, -1, -1, -1, 2]


@pytest.mark.parametrize("length, width", [(1, 1), (31, 20), (129, 129), (4096, 1500), (9001, 7000)])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_pack_matches_lists(backend: Backend, length: int, width: int, index: torch.dtype) -> None:
    """Several images of a sample in any order, one without any, more than a slab."""
    g = torch.Generator().manual_seed(length)
    sample = [2, 0, 2]
    chosen = torch.stack([torch.randperm(length, generator=g)[:width] for b in range(3)]).sort(1).values
    owned = torch.zeros(3, length, dtype=torch.int64).scatter(1, chosen, torch.randint(1, 4, (3, width), generator=g))
    stays = owned == 1  # 2 and 3: of the first and second image
    kept = [torch.nonzero(owned[b] == number).flatten() for b, number in ((2, 2), (0, 2), (2, 3))]
    padded = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=-1)
    got = backend(ops.pack, stays, width, kept=padded.to(index), sample=torch.tensor(sample, dtype=index))
    want = pack_oracle(stays, width, [row.tolist() for row in kept], sample)
    for a, b in zip(got, want, strict=True):
        same(a, b)


def test_pack_of_nothing(backend: Backend) -> None:
    for stays, width in ((torch.zeros(0, 3).bool(), 2), (torch.zeros(2, 0).bool(), 2), (torch.zeros(2, 3).bool(), 0)):
        index, slots = backend(ops.pack, stays, width, kept=torch.zeros(len(stays), 0, dtype=torch.int64))
        assert index.shape == (len(stays), width) and (index == -1).all()
        assert slots.shape == stays.shape and (slots == -1).all()


def test_kept_is_a_view(backend: Backend) -> None:
    stays = torch.zeros(2, 12).bool()[:, ::2]
    kept = torch.tensor([[9, 1, 9, 4], [9, 0, 9, 5]])[:, 1::2]
    index, _ = backend(ops.pack, stays, 2, kept=kept)
    assert index.tolist() == [[1, 4], [0, 5]]
