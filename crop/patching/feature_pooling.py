"""Pooling that needs features: the count is known on the host, the members on the device.

A method whose ``plan`` returns a ``FeaturePooling`` says beforehand how many tokens it leaves; which ones it decides when the
projected features are there. The batch is planned with a stand-in of that many tokens, so shapes, masks and the cache
are settled without looking at the device, and ``settle`` writes the decision into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crop.geometry.pooling import PoolPlan

if TYPE_CHECKING:
    from crop.patching.batch_plan import ImagePlan, PoolStep
from crop.methods.base import Features


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
