"""Position ids of tokens that stay: their own, or renumbered without gaps; one axis or three, no family needs code of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Policy = Literal["original", "compact"]
POLICIES = get_args(Policy)


def own_ids(position_ids: Tensor | None, axes: int, batch: int, added: int, past: int, device: torch.device) -> Tensor:
    """(axes, batch, added) ids of a call, from what the language model received; None: counted from ``past``.

    Text alone may come with one axis for all. Where four axes are given the first counts text for packed sequences and takes
    no part in the rotation.
    """
    if position_ids is None:
        return (torch.arange(added, device=device) + past).expand(axes, batch, added)
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[1:]
    ids = position_ids.expand(*position_ids.shape[:-2], batch, added).reshape(-1, batch, added)
    return ids.expand(axes, batch, added)


def given_ids(ids: Tensor) -> Tensor:
    """``own_ids`` back in the shape that language models take: (batch, seq_len) or (3, batch, seq_len)."""
    return ids[0] if len(ids) == 1 else ids


def close_gaps(ids: Tensor, alive: Tensor, images: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Renumber what is left as the model would number a smaller image: no free row, no free column, text follows.

    On each axis the places of an image that nobody holds any more are closed; later text moves up by what its longest
    axis lost.

    Args:
        ids: (axes, batch, seq_len) int64.
        alive: (batch, seq_len) bool, tokens that are left.
        images: (sample, (N,) int64 positions on the CPU) of every image, in prompt order.
    Returns:
        ids of the tokens that are left (others get some); (batch,) int64 how far later tokens move up.
    Source: own choice.
    """
    closed, moved = ids.clone(), torch.zeros_like(ids[0])
    for sample, position in images:
        count = len(position)
        if count == 0:
            continue
        position = position.to(ids.device)
        mine = ids[:, sample, position]
        start = mine.amin(1, keepdim=True)
        place = mine - start
        taken = torch.zeros(len(ids), count + 1, dtype=torch.int64, device=ids.device)
        taken.scatter_(1, torch.where(alive[sample, position], place, count), 1)
        taken = taken[:, :count]
        rank = taken.cumsum(1) - taken
        closed[:, sample, position] = start + rank.gather(1, place)
        lost = place.amax() + 1 - taken.sum(1).amax()
        moved[sample, position[-1] + 1 :] += lost
    return closed - moved, moved[:, -1]
