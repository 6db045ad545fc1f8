"""Pre-LLM compression of a batch as one pooling: its cells, and where their tokens stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crop import ops
from crop.geometry.pooling import PoolPlan


@dataclass(frozen=True)
class PoolStep:
    """Pre-LLM compression of a whole batch as one pooling.

    Args:
        plan: cells over the flattened (batch * seq_len) tokens; text tokens are cells of one, padding is in none.
        kept_index: (batch, pooled length) int64 input position of each pooled token, -1 = filler.
        slot_of: (batch, seq_len) int64 pooled token that stands for each input position, -1 = padding or dropped.
        filled: (num_out,) int64 flat pooled position of each cell, or None where the cells fill the batch exactly.
        alone: (batch * seq_len,) bool, tokens that are a cell of their own.
        source: (batch * seq_len,) int64, ``slot_of`` as flat pooled positions; padding has one, too.
    """

    plan: PoolPlan
    kept_index: Tensor
    slot_of: Tensor
    filled: Tensor | None
    alone: Tensor
    source: Tensor


def pool_step(leader_of: Tensor, width: int, num_out: int) -> PoolStep:
    """One pooling of a batch; no host sync.

    Args:
        leader_of: (batch, seq_len) int64 flat position of the token that leads each token's cell, -1 = in none.
        width: pooled tokens of the longest sample. num_out: of all samples.
    """
    batch, seq_len = leader_of.shape
    flat = leader_of.flatten()
    position = torch.arange(len(flat), device=flat.device)
    leads = flat == position
    rank = leads.cumsum(0) - 1
    # One spare entry at the end swallows what does not lead.
    leader = position.new_zeros(num_out + 1).scatter(0, torch.where(leads, rank, num_out), position)[:-1]
    kept_index, slot = ops.pack(leads.view(batch, seq_len), width)
    slot_of, cell = (torch.where(flat >= 0, table[flat.clamp(min=0)], -1) for table in (slot.flatten(), rank))
    filled = None if num_out == batch * width else leader // seq_len * width + slot_of[leader]
    plan = PoolPlan.from_cells(cell, leader)
    alone = (plan.counts[cell.clamp(min=0)] == 1) & (cell >= 0)
    slot_of = slot_of.view(batch, seq_len)
    source = slot_of.clamp(min=0) + torch.arange(batch, device=flat.device).unsqueeze(1) * width
    return PoolStep(plan, kept_index, slot_of, filled, alone, source.flatten())
