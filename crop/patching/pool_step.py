"""Pre-LLM compression of a batch as one pooling: its cells, and where their tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from crop import backend, ops
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan


@dataclass(frozen=True)
class PoolStep:
    """Pre-LLM compression of a whole batch as one pooling.

    Args:
        plan: cells over the flattened (batch * seq_len) tokens, one for each of the (batch * pooled length) pooled tokens; text
            tokens are cells of one, padding is in none, a filler is a cell without members.
        kept_index: (batch, pooled length) int64 input position of each pooled token, -1 = filler.
        slot_of: (batch, seq_len) int64 pooled token that stands for each input position, -1 = padding or dropped.
        source: (batch * seq_len,) int64, ``slot_of`` as flat pooled positions; padding has one, too.
        alone: (batch * seq_len,) bool, tokens that are a cell of their own.
        real: (batch, pooled length) bool, what is no filler.
        full: there is no filler, known on the host.
    """

    plan: PoolPlan
    kept_index: Tensor
    slot_of: Tensor
    source: Tensor
    alone: Tensor
    real: Tensor
    full: bool


def pool_images(
    valid: Tensor, images: Sequence[tuple[int, VisionLayout]], plans: Sequence[PoolPlan | None]
) -> tuple[PoolStep, list[int], Tensor]:
    """The pooling of a batch, the pooled tokens of each sample, and ``leader_of`` of ``pool_step``; on the CPU.

    Args:
        valid: (batch, seq_len) bool, what is no padding. images: (sample, layout) each. plans: of each, None: not pooled.
    """
    batch, seq_len = valid.shape
    pooled = [(sample, layout, plan) for (sample, layout), plan in zip(images, plans, strict=True) if plan is not None]
    if (planner := backend.planner()) is None:
        leader_of = torch.arange(batch * seq_len).view(batch, seq_len).masked_fill(~valid, -1)
        for sample, layout, plan in pooled:
            cell = plan.inverse.long()
            leader = layout.position[plan.leader.long()][cell.clamp(min=0)]
            leader_of[sample, layout.position] = torch.where(cell >= 0, sample * seq_len + leader, -1)
        leads = leader_of.flatten() == torch.arange(batch * seq_len)
        counts = leads.view(batch, seq_len).sum(1).tolist()
    else:
        rows = [(sample, layout.address, plan.address) for sample, layout, plan in pooled]
        leader_of, counts = planner.plan_leaders(valid.numpy(), rows)
        leader_of = torch.from_numpy(leader_of)
    return pool_step(leader_of, max(counts), min(counts) == max(counts)), counts, leader_of


def pool_step(leader_of: Tensor, width: int, full: bool) -> PoolStep:
    """One pooling of a batch; no host sync.

    Args:
        leader_of: (batch, seq_len) int64 flat position of the token that leads each token's cell, -1 = in none.
        width: pooled tokens of the longest sample. full: of every sample.
    """
    if leader_of.is_cpu and (planner := backend.planner()) is not None:
        return _compiled(planner, leader_of, width, full)
    batch, seq_len = leader_of.shape
    flat = leader_of.flatten()
    leads = flat == torch.arange(len(flat), device=flat.device)
    kept_index, slot = ops.pack(leads.view(batch, seq_len), width)
    slot_of = pad(slot.flatten(), (0, 1), value=-1)[flat].view(batch, seq_len)  # of -1 the last entry
    first = torch.arange(0, batch * width, width, device=flat.device).unsqueeze(1)
    source, nowhere = (slot_of.clamp(min=0) + first).flatten(), slot_of.flatten() < 0
    plan = PoolPlan.from_cells(source.masked_fill(nowhere, -1), kept_index.flatten())
    alone = (plan.counts[source] == 1).masked_fill(nowhere, False)
    return PoolStep(plan, kept_index, slot_of, source, alone, kept_index >= 0, full)


def _compiled(planner: Any, leader_of: Tensor, width: int, full: bool) -> PoolStep:
    arrays = map(torch.from_numpy, planner.plan_pool(leader_of.numpy(), width))
    kept_index, slot_of, source, alone, real, *cells = arrays
    level = torch.from_numpy(np.zeros(kept_index.numel(), dtype=np.uint8))
    plan = PoolPlan(*cells, level, leader_of.numel(), check=False)
    return PoolStep(plan, kept_index, slot_of, source, alone, real, full)
