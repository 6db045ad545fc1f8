"""Decisions before the language model that need features: the count is known on the host, the members on the device.

A method whose ``plan`` returns a ``LatePlan`` says beforehand how many tokens it leaves; which ones it decides when the
projected features are there. The batch is planned with a stand-in of that many tokens, so shapes, masks and the cache
are settled without looking at the device, and ``settle`` writes the decision into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .plan import PoolPlan

if TYPE_CHECKING:
    from .chunk import ImagePlan, PoolStep


@dataclass(frozen=True)
class Features:
    """What a late decision may look at, on the model's device.

    Args:
        tokens: (N, dim) of one image, as the language model would get them.
        text: (M, dim) embeddings of the text after the sample's last image.
        salience: (N,) float32 attention that the tokens receive inside the vision tower, or None where the method did
            not ask for it.
    """

    tokens: Tensor
    text: Tensor
    salience: Tensor | None = None


@dataclass(frozen=True)
class Cells:
    """A late decision: ``num_out`` cells in ascending order of their leaders.

    Args:
        cell: (N,) int64 cell of each token, -1 = dropped.
        leader: (num_out,) int64 token that lends its position; ascending, each in its own cell.
    """

    cell: Tensor
    leader: Tensor

    @staticmethod
    def of_kept(kept: Tensor, num_tokens: int) -> Cells:
        """Tokens ``kept`` (n,), in any order, stay as they are; the others go."""
        leader = kept.sort().values
        cell = torch.full((num_tokens,), -1, dtype=torch.int64, device=kept.device)
        return Cells(cell.scatter_(0, leader, torch.arange(len(leader), device=kept.device)), leader)

    @staticmethod
    def of_leaders(leader_of: Tensor, leader: Tensor) -> Cells:
        """Every token joins the leader it names: ``leader_of`` (N,), -1 = dropped; ``leader`` (n,), in any order."""
        leader = leader.sort().values
        cell = torch.searchsorted(leader, leader_of.clamp(min=0))
        return Cells(torch.where(leader_of < 0, -1, cell), leader)


@dataclass(frozen=True, eq=False)
class LatePlan:
    """Promise of a plan.

    Args:
        num_out: tokens it will leave, in [1, num_tokens].
        num_tokens: tokens of the image.
        decide: Features -> Cells; must not wait for the device.
    """

    num_out: int
    num_tokens: int
    decide: Callable[[Features], Cells]
    decided: list[Cells] = field(default_factory=list, init=False)  # of the last prefill, for the statistics

    def stand_in(self) -> PoolPlan:
        """A plan of the promised size: the first tokens."""
        first = torch.arange(self.num_out, dtype=torch.int32)
        edges = torch.arange(self.num_out + 1, dtype=torch.int32)
        return PoolPlan(first, edges, first, torch.zeros(self.num_out, dtype=torch.uint8), self.num_tokens, check=False)

    def outcome(self) -> PoolPlan:
        """What was decided, on the CPU (waits for the device)."""
        cells = self.decided[-1]
        plan = PoolPlan.from_cells(cells.cell.cpu(), cells.leader.cpu())
        size = int(plan.offsets[-1])
        return replace(plan, members=plan.members[:size])


def settle(
    pool: PoolStep, images: Sequence[ImagePlan], after: Sequence[Tensor], embeds: Tensor, salience: Tensor | None
) -> PoolStep:
    """Write the decisions of late plans into a batch that was planned with their stand-ins.

    Args:
        pool: planned on the host.
        images: all images of the chunk, in prompt order.
        after: per sample, (M,) int64 positions of the text after its last image.
        embeds: (batch, seq_len, dim) input of the language model.
        salience: (num_images, N) float32, or None.
    Returns:
        PoolStep on the device of ``embeds``; nothing was read back.
    """
    device, seq_len = embeds.device, embeds.shape[1]
    cell = pool.plan.inverse.to(device, torch.int64)
    leader, slot = pool.leader.to(device, copy=True), pool.slot.to(device, copy=True)
    flat_leader = pool.plan.leader.to(device, torch.int64)
    for number, image in enumerate(images):
        if image.late is None:
            continue
        place = image.layout.position
        first = image.sample * seq_len + int(place[0])
        first_cell, first_slot = int(pool.plan.inverse[first]), int(pool.slot[image.sample, place[0]])
        place = place.to(device)
        found = image.late.decide(
            Features(
                embeds[image.sample, place],
                embeds[image.sample, after[image.sample].to(device)],
                None if salience is None else salience[number],
            )
        )
        image.late.decided[:] = [found]
        dropped = found.cell < 0
        cell[image.sample * seq_len + place] = torch.where(dropped, -1, found.cell + first_cell)
        slot[image.sample, place] = torch.where(dropped, -1, found.cell + first_slot)
        leader[image.sample, first_slot : first_slot + image.late.num_out] = place[found.leader]
        flat_leader[first_cell : first_cell + image.late.num_out] = image.sample * seq_len + place[found.leader]
    return replace(pool, plan=PoolPlan.from_cells(cell, flat_leader), leader=leader, slot=slot)
