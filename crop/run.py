"""State of one forward call of the language model, and how masks, positions and scores fit its slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cache import Slots, left_fill
from .chunk import ChunkPlan, PoolStep


@dataclass
class Run:
    """State of one forward call of the language model."""

    chunk: ChunkPlan | None = None
    cache: Any = None
    past: int = 0  # logical positions before this chunk
    past_slots: int = 0  # slots of the layers before the cut
    added: int = 0  # logical positions of this chunk
    slots: int = 0  # slots of this chunk before the cut
    mask: Tensor | None = None  # (batch, past_slots + slots) bool, None = all real
    pooled: Slots | None = None  # thinning after this call
    pruned: Slots | None = None
    layer: int | None = None  # first layer that holds pruned tokens
    keep: Tensor | None = None  # (batch, width) slots that stay, -1 = filler
    keep_slot: Tensor | None = None  # (batch, slots) inverse of keep
    full_hidden: Tensor | None = None
    at: int = -1  # decoder layer that was entered last
    timed: bool = False  # holds an image
    started: Any = None  # mark at the language model's entry
    memo: dict[tuple[str, int], tuple[Any, Any]] = field(default_factory=dict)

    def adapt(self, kwargs: dict, name: str, change: Callable[[Any], Any]) -> None:
        """Change an argument; the model hands the same object to every layer, so once per object."""
        value = kwargs.get(name)
        key = (name, id(value))
        if key not in self.memo:
            self.memo[key] = (value, change(value))  # keeps the value alive, so its id stays taken
        kwargs[name] = self.memo[key][1]


def gather_positions(position_ids: Tensor | None, index: Tensor, past: int) -> Tensor:
    """Position ids (..., 1 or batch, seq_len) of the slots that ``index`` (batch, slots) names; fillers get some."""
    index = index.clamp(min=0)
    if position_ids is None:
        return index + past
    batch = index.shape[0]
    leading = position_ids.shape[:-2]
    full = position_ids.expand(*leading, batch, -1)
    return full.gather(-1, index.expand(*leading, -1, -1))


def spread(features: Tensor, is_vision: Tensor) -> Tensor:
    """Features (num_vision, dim) at the places of a (batch, seq_len) mask, zeros elsewhere: (batch, seq_len, dim)."""
    full = features.new_zeros(*is_vision.shape, features.shape[-1])
    full[is_vision] = features
    return full


def slot_mask(logical: Tensor | None, before: Slots | None, run: Run, pool: PoolStep | None) -> Tensor | None:
    """Mask over the slots below the cut, (batch, past_slots + slots) bool, from the caller's; None: all are real."""
    past = None
    if before is not None:
        columns = before.columns(run.past)
        if logical is not None:
            past = logical[:, : run.past].bool().gather(1, columns.clamp(min=0)) & (columns >= 0)
        elif not before.dense:
            past = columns >= 0
    elif logical is not None:
        past = logical[:, : run.past].bool()
    if pool is None:
        chunk = None if logical is None else logical[:, run.past :].bool()
    elif pool.filled is None:
        chunk = None
    else:
        chunk = run.pooled.index[:, -run.slots :] >= 0
    if past is None and chunk is None:
        return None
    some = past if chunk is None else chunk
    if past is None:
        past = some.new_ones(some.shape[0], run.past_slots)
    if chunk is None:
        chunk = some.new_ones(some.shape[0], run.slots)
    return torch.cat([past, chunk], dim=1)


def score(run: Run, query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """Attention mass of every candidate, (num_images, num_candidates) float32.

    Args:
        query: (batch, num_heads, slots, head_dim), key: (batch, num_kv_heads, past_slots + slots, head_dim), rotated.
    """
    step, device = run.chunk.select, query.device
    rows, sample, index = (item.to(device) for item in (step.rows, step.sample, step.vision_index))
    row_key = torch.where(rows >= 0, rows + run.past_slots, -1)
    candidate_key = torch.where(index >= 0, index + run.past_slots, -1)
    start = None
    if run.mask is not None and run.past_slots == 0 and step.first is not None:
        start = step.first.to(device)
    elif run.mask is not None:
        # Real keys with holes between them: close the holes, so that each row sees one span.
        keys, slot = left_fill(run.mask, run.mask.shape[1])
        key = ops.compact([key], keys, token_dim=2)[0]
        start = run.mask.shape[1] - run.mask.sum(1)
        row_key = torch.where(rows >= 0, slot.gather(1, row_key.clamp(min=0)), -1)
        candidate_key = torch.where(index >= 0, slot[sample].gather(1, candidate_key.clamp(min=0)), -1)
    return ops.attention_mass(
        ops.compact([query], rows, token_dim=2)[0],
        key,
        candidate_key,
        sample=sample,
        scale=scale,
        visible_start=start,
        visible_len=row_key + 1,
    )


def pruned_mask(mask: Any, run: Run, hidden: Tensor, flash: bool) -> Tensor | None:
    """Fit the mask of the layers before the cut to the slots after it."""
    columns = run.pruned.columns(run.past_slots + run.slots) if run.keep is None else run.pruned.index
    queries, total = hidden.shape[1], columns.shape[1]
    if mask is None:
        if run.pruned.dense:
            return None
        valid = columns >= 0
        if flash:
            return valid
        place = torch.arange(total, device=hidden.device)
        return valid[:, None, None, :] & (place <= place[total - queries :, None])
    real = columns >= 0
    columns = columns.clamp(min=0)
    if mask.ndim == 2:
        return mask.gather(1, columns).bool() & real
    batch = columns.shape[0]
    mask = mask.expand(batch, -1, -1, -1)
    if run.keep is not None:
        rows = run.keep.clamp(min=0)[:, None, :, None]
        mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], queries, -1))
    real = real[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & real
    return mask.masked_fill(~real, torch.finfo(mask.dtype).min)
