"""PoolPlan: which vision tokens form which pooled token; known before any feature exists.

Host geometry is computed in numpy on the memory of the CPU tensors: for a few hundred tokens its
calls cost a fraction of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PoolPlan:
    """Groups ("cells") of vision tokens; cell ``i`` is ``members[offsets[i] : offsets[i + 1]]``.

    A kept token is a cell of one; a dropped token is in no cell. Cells stand in ascending order of
    their leader, which is the reading order of the language model; members ascend in each cell.

    Args:
        members: (num_members,) int32 token indices, grouped by cell; each token at most once.
        offsets: (num_out + 1,) int32 cell borders, strictly ascending from 0.
        leader: (num_out,) int32, strictly ascending: whose position ids the pooled token takes.
        level: (num_out,) uint8 level of the cell: 0 region, 1 ring, 2 outside.
        num_tokens: number of tokens the plan applies to.
        check: False skips reading the arrays, where they are valid by construction. Arrays on
            another device than the CPU are never read back.
    Raises:
        ValueError: the arrays contradict each other. TypeError: wrong dtype.
    Source: own choice (variable-ratio adaptive pooling; CSR layout).
    """

    members: Tensor
    offsets: Tensor
    leader: Tensor
    level: Tensor
    num_tokens: int
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        for name in ("members", "offsets", "leader", "level"):
            array, dtype = getattr(self, name), torch.uint8 if name == "level" else torch.int32
            if array.dtype != dtype or array.dim() != 1:
                raise TypeError(f"PoolPlan: {name} must be a 1-d {dtype} tensor, got {array.dim()}-d {array.dtype}")
        if not len(self.leader) == len(self.level) == len(self.offsets) - 1:
            raise ValueError(
                "PoolPlan: leader and level must have one entry per cell, len(offsets) - 1 = "
                f"{len(self.offsets) - 1}, got {len(self.leader)} and {len(self.level)}"
            )
        if check and self.members.is_cpu:
            self._check_values()

    def _check_values(self) -> None:
        arrays = (self.members, self.offsets, self.leader)
        members, offsets, leader = (array.numpy() for array in arrays)
        if offsets[0] != 0 or offsets[-1] != len(members) or (np.diff(offsets) < 1).any():
            raise ValueError(
                f"PoolPlan: offsets must ascend strictly from 0 to num_members={len(members)}, got {offsets.tolist()}"
            )
        if len(members) == 0:
            return
        if members.min() < 0 or members.max() >= self.num_tokens:
            raise ValueError(
                f"PoolPlan: members must be in [0, num_tokens={self.num_tokens}), "
                f"got values from {members.min()} to {members.max()}"
            )
        inverse = self.inverse.numpy()
        if np.count_nonzero(inverse >= 0) != len(members):
            raise ValueError("PoolPlan: members must hold each token at most once, got repetitions")
        falls = members[1:] <= members[:-1]
        falls[offsets[1:-1] - 1] = False  # a fall is allowed where a new cell begins
        if falls.any():
            raise ValueError("PoolPlan: members must ascend in each cell, got an unsorted cell")
        if leader[0] < 0 or leader[-1] >= self.num_tokens or (leader[1:] <= leader[:-1]).any():
            raise ValueError(
                f"PoolPlan: leader must ascend strictly in [0, num_tokens={self.num_tokens}), got {leader.tolist()}"
            )
        if (inverse[leader] != np.arange(len(leader))).any():
            raise ValueError("PoolPlan: leader must be a member of its own cell, got another token")

    @property
    def num_out(self) -> int:
        """Number of cells, i.e. of pooled tokens."""
        return self.leader.shape[0]  # len() of a tensor costs as much as small work on it

    @property
    def is_identity(self) -> bool:
        """Whether every token is a cell of its own, so that pooling would change nothing."""
        return self.num_out == self.num_tokens

    @cached_property
    def address(self) -> tuple[Any, ...]:
        """What compiled code takes: number of cells, where their arrays lie in memory, and these arrays, to keep them."""
        dense = [*map(Tensor.contiguous, (self.members, self.offsets, self.leader))]
        return (self.num_out, *map(Tensor.data_ptr, dense), dense)

    @cached_property
    def counts(self) -> Tensor:
        """(num_out,) int32 members of each cell."""
        return self.offsets.diff()

    @cached_property
    def inverse(self) -> Tensor:
        """(num_tokens,) int32 cell of each token, -1 where the token is in no cell."""
        entry = torch.arange(len(self.members), dtype=torch.int32, device=self.members.device)
        cell = torch.searchsorted(self.offsets[1:], entry, right=True, out_int32=True)
        inverse = cell.new_full((self.num_tokens,), -1)
        # What stands beyond the last offset is in no cell (``from_cells``).
        inverse[self.members.long()] = torch.where(cell < self.num_out, cell, -1)
        return inverse

    @cached_property
    def _copies(self) -> dict[torch.device, PoolPlan]:
        return {}

    def to(self, device: torch.device | str) -> PoolPlan:
        """The same plan on ``device``: this one if it is there already, else a copy that is made once and kept."""
        device = torch.device(device)
        if device == self.members.device:
            return self
        if device not in self._copies:
            arrays = (self.members, self.offsets, self.leader, self.level)
            moved = (array.to(device, non_blocking=True) for array in arrays)
            self._copies[device] = PoolPlan(*moved, self.num_tokens, check=False)
        return self._copies[device]

    @staticmethod
    def identity(num_tokens: int) -> PoolPlan:
        """The plan that leaves ``num_tokens`` tokens as they are (every cell has one member)."""
        index = torch.from_numpy(np.arange(num_tokens + 1, dtype=np.int32))
        level = torch.from_numpy(np.zeros(num_tokens, dtype=np.uint8))
        return PoolPlan(index[:-1], index, index[:-1], level, num_tokens, check=False)

    @staticmethod
    def from_labels(label: Tensor, row: Tensor, col: Tensor, level: Tensor) -> PoolPlan:
        """The plan over N tokens whose cells are the sets of tokens that carry one label.

        The leader of a cell is the member nearest to the cell's centroid on the token grid, ties
        to the smallest index; distances are compared in integers, so ties are exact.

        Args:
            label: (N,) int64, any values; tokens with a negative label are in no cell.
            row, col: (N,) integer coordinates on the token grid.
            level: (N,) uint8; a cell takes its leader's.
        Source: own choice.
        """
        labels = label.numpy()
        token = np.flatnonzero(labels >= 0)
        labels = labels[token]
        order = labels.argsort(kind="stable")
        token, labels = token[order], labels[order]
        begins = np.ones(len(token), dtype=bool)
        begins[1:] = labels[1:] != labels[:-1]
        first = np.flatnonzero(begins)
        cell = begins.cumsum() - 1
        count = np.bincount(cell, minlength=len(first))

        # count**2 times the squared distance to the centroid: an integer.
        spread = np.zeros_like(token)
        for axis in (row, col):
            value = axis.numpy().astype(np.int64)[token]
            total = np.add.reduceat(value, first) if len(first) else value
            spread += (value * count[cell] - total[cell]) ** 2
        nearest = np.minimum.reduceat(spread, first) if len(first) else spread
        candidate = np.where(spread == nearest[cell], token, len(label))
        leader = np.minimum.reduceat(candidate, first) if len(first) else candidate

        # Move whole cells into the order of their leaders.
        order = leader.argsort()
        offsets = np.zeros(len(order) + 1, dtype=np.int32)
        count[order].cumsum(out=offsets[1:])
        begin = np.empty_like(first)
        begin[order] = offsets[:-1]
        members = np.empty(len(token), dtype=np.int32)
        members[begin[cell] + np.arange(len(token)) - first[cell]] = token
        leader = leader[order]
        arrays = (members, offsets, leader.astype(np.int32), level.numpy()[leader])
        return PoolPlan(*map(torch.from_numpy, arrays), num_tokens=len(label), check=False)

    @staticmethod
    def from_cells(cell: Tensor, leader: Tensor) -> PoolPlan:
        """The plan from the cell of each token, level 0, on any device and without reading it back.

        On other devices than the CPU, tokens in no cell stand at the end of ``members``, beyond the last offset.

        Args:
            cell: (N,) int64 in [-1, num_out), -1 = in no cell.
            leader: (num_out,) int64, ascending, ``cell[leader[i]] == i``.
        """
        num_out = len(leader)
        place, members = cell.masked_fill(cell < 0, num_out).sort(stable=True)
        offsets = torch.searchsorted(place, torch.arange(num_out + 1, device=cell.device), out_int32=True)
        return PoolPlan(
            members=(members[: int(offsets[-1])] if cell.is_cpu else members).int(),
            offsets=offsets,
            leader=leader.int(),
            level=torch.zeros(num_out, dtype=torch.uint8, device=cell.device),
            num_tokens=len(cell),
            check=False,
        )

    def among(self, index: Tensor, num_tokens: int) -> PoolPlan:
        """The same cells for ``num_tokens`` tokens, of which these were planned: ``index`` (self.num_tokens,), ascending."""
        place = index.int()
        members, leader = place[self.members.long()], place[self.leader.long()]
        return PoolPlan(members, self.offsets, leader, self.level, num_tokens, check=False)

    @staticmethod
    def concatenate(plans: Sequence[PoolPlan]) -> PoolPlan:
        """One plan for the tokens of several images laid one after the other, on one device.

        An image that stays whole needs ``PoolPlan.identity``.
        """
        if not plans:
            return PoolPlan.identity(0)
        members, offsets, leader, tokens, entries = [], [plans[0].offsets[:1]], [], 0, 0
        for plan in plans:
            members.append(plan.members + tokens)
            leader.append(plan.leader + tokens)
            offsets.append(plan.offsets[1:] + entries)
            tokens += plan.num_tokens
            entries += len(plan.members)
        level = torch.cat([plan.level for plan in plans])
        return PoolPlan(torch.cat(members), torch.cat(offsets), torch.cat(leader), level, tokens, check=False)
