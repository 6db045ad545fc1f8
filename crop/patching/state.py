"""State of one forward call of the language model, and how masks, positions and scores fit its slots."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crop import ops
from crop.patching.batch_plan import BatchPlan, PoolStep, PruneStep
from crop.patching.cache import CacheState, TokenMap, left_pack
from crop.patching.positions import close_gaps
from crop.patching.recycle import Recycling, raters

if TYPE_CHECKING:
    from crop.patching.readmit import Memory


@dataclass
class Stage:
    """What a run of decoder layers holds of the slots below the first cut, in one forward call.

    Args:
        slots: their thinning after this call, None: they hold everything.
        keep: (batch, width) int64 slots of this chunk that they get, -1 = filler; None: all of them.
        place: (batch, slots) int64 inverse of keep, -1 = dropped.
        before: hidden states that came to the cut, of which these layers take a part.
        back: (batch, before.shape[1]) int64 inverse of that, -1 = dropped.
    """

    slots: TokenMap | None = None
    keep: Tensor | None = None
    place: Tensor | None = None
    before: Tensor | None = None
    back: Tensor | None = None
    recycling: Recycling | None = None  # what is merged before it leaves
    ids: Tensor | None = None  # (axes, batch, width) position ids, where they are not the model's
    memo: dict[tuple, tuple[Any, Any]] = field(default_factory=dict)

    def adapt(self, kwargs: dict, name: str, change: Callable[[Any], Any], kind: Any = None) -> None:
        """Change an argument; the model hands the same object to every layer (of a kind), so once per object."""
        value = kwargs.get(name)
        key = (name, kind, id(value))
        if key not in self.memo:
            self.memo[key] = (value, change(value))  # keeps the value alive, so its id stays taken
        kwargs[name] = self.memo[key][1]


@dataclass
class Run:
    """State of one forward call of the language model."""

    thread: threading.Thread = field(default_factory=threading.current_thread)
    chunk: BatchPlan | None = None
    recalled: Memory | None = None  # the conversation is cut anew: from the first cut on the chunk is all of it
    noted: dict[str, Any] | None = None  # for the memory: what this call adds
    cache: Any = None
    state: CacheState = field(default_factory=CacheState)  # of the cache, before this call
    device: torch.device | None = None  # where every index lives, whatever devices the layers are on
    capacity: int | None = None  # slots of a static cache
    past: int = 0  # logical positions before this chunk
    past_slots: int = 0  # slots of the layers before the first cut
    added: int = 0  # logical positions of this chunk
    slots: int = 0  # slots of this chunk before the first cut
    mask: Tensor | None = None  # (batch, past_slots + slots) bool, None = all real
    given_mask: Tensor | None = None  # (batch, past + added), where the multimodal model makes the masks
    two_way: bool = False  # the prompt sees all of itself
    pooled: TokenMap | None = None  # thinning after this call
    stages: dict[int, Stage] = field(default_factory=lambda: {0: Stage()})  # by first layer
    ids: Tensor | None = None  # (axes, batch, slots) position ids before the first cut, where they are or were changed
    images: list[tuple[int, Tensor]] | None = None  # (sample, slots) per image whose gaps are to be closed
    moved: dict[int, Tensor] = field(default_factory=dict)  # as in CacheState
    tables: Any = None  # cos and sin that a layer received which scores without them
    at: int = 0  # decoder layer that was entered last
    timed: bool = False  # holds an image
    started: Any = None  # mark at the language model's entry

    def stage(self, layer: int) -> Stage:
        """What decoder layer ``layer`` holds."""
        return self.stages[max(first for first in self.stages if first <= layer)]

    @property
    def begin(self) -> int:
        """TokenMap before the chunk, as the layers from the first cut on count."""
        return self.past_slots if self.recalled is None else 0

    @property
    def width(self) -> int:
        """TokenMap of the chunk, likewise."""
        return self.past_slots + self.slots - self.begin

    def carry_on(self, layer: int) -> None:
        """Let a stage that begins where only earlier chunks were cut take what the stage before it has of this one."""
        stage, before = self.stages[layer], self.stage(layer - 1)
        if before.keep is not None:
            slots = TokenMap.extended(stage.slots, self.begin, before.keep, self.width, before.slots.dense)
            self.stages[layer] = Stage(slots, before.keep, before.place)

    def renumber(self, layer: int) -> None:
        """Position ids of the stage that begins at a layer, its gaps closed where that is wanted."""
        stage, ids = self.stages[layer], self.ids
        moved = self.state.at(self.state.moved, layer)
        if stage.keep is not None and self.images is not None:
            ids, by = close_gaps(ids, stage.place >= 0, self.images)
            self.moved[layer] = by if moved is None else by + moved
        ids = ids if stage.keep is None else gather_positions(ids, stage.keep, 0)
        stage.ids = ids if moved is None else ids - moved.unsqueeze(1)

    def late_slots(self, num_layers: int) -> list[Tensor | None]:
        """Per layer, which of its slots of this chunk the last layer holds too; None: all of them."""
        last, found = self.stage(num_layers - 1), []
        for layer in range(num_layers):
            stage = self.stage(layer)
            if stage is last or last.keep is None or stage.keep is last.keep:
                found.append(None)
            else:
                found.append(last.keep if stage.keep is None else look_up(stage.place, last.keep))
        return found

    @property
    def thinned(self) -> bool:
        """Whether any layer holds less than all tokens."""
        return self.pooled is not None or any(stage.slots is not None for stage in self.stages.values())

    def length(self, stage: Stage) -> int:
        """TokenMap that a stage holds after this call."""
        return self.past_slots + self.slots - (0 if stage.slots is None else stage.slots.dropped)

    def real(self, stage: Stage) -> Tensor | None:
        """Which slots of a stage, past and present, hold a token: (batch, slots) bool; None: all do."""
        if stage.slots is None or (stage.slots.dense and self.mask is None):
            return self.mask
        columns = stage.slots.columns(self.past_slots + self.slots)
        real = columns >= 0
        return real if self.mask is None else real & self.mask.gather(1, columns.clamp(min=0))


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


def slot_mask(logical: Tensor | None, before: TokenMap | None, run: Run, pool: PoolStep | None) -> Tensor | None:
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


def score(
    run: Run,
    stage: Stage,
    step: PruneStep,
    query: Tensor,
    key: Tensor,
    scale: float | None,
    lse: Tensor | None,
) -> Tensor:
    """Attention mass of every candidate, (num_images, num_candidates) float32.

    Args:
        stage: what the scoring layer holds.
        query: (batch, num_heads, slots, head_dim), key: (batch, num_kv_heads, past + slots, head_dim), rotated.
        lse: (batch, num_heads, slots) float32 log-sum-exp of what each query sees, None: not known.
    """
    device = query.device
    rows, sample, index = (item.to(device) for item in (step.rows, step.sample, step.vision_index))
    if stage.place is not None:
        place = stage.place.to(device)
        rows, index = look_up(place, rows), look_up(place[sample], index)
    key = key[:, :, : run.length(stage)]  # a static cache is longer
    past = key.shape[2] - query.shape[2]
    if run.recalled is not None and stage.keep is None:  # the queries of old text and new
        query, past = torch.cat([*(piece.to(device) for piece in run.recalled.query), query], 2), 0
    row_key, candidate_key = torch.where(rows >= 0, rows + past, -1), torch.where(index >= 0, index + past, -1)
    real = run.real(stage)
    real = None if real is None else real.to(device)
    start = None
    if real is not None and past == 0 and (stage.keep is not None or step.first is not None):
        # One span of real keys per sample; after a cut it stands at the right end.
        start = step.first.to(device) if stage.keep is None else (~real).sum(1)
    elif real is not None:
        # Real keys with holes between them: close the holes, so that each row sees one span.
        keys, slot = left_pack(real, real.shape[1])
        key = ops.compact([key], keys, token_dim=2)[0]
        start = real.shape[1] - real.sum(1)
        row_key, candidate_key = look_up(slot, row_key), look_up(slot[sample], candidate_key)
    if run.recalled is not None and stage.keep is None:
        rows = torch.where(rows >= 0, rows - run.recalled.first, -1)
    visible = row_key + 1
    if run.two_way:
        end = key.shape[2] if start is None else (start + real.sum(1)).unsqueeze(1)
        visible = torch.where(rows >= 0, end, 0)
    query = ops.compact([query], rows, token_dim=2)[0]
    if lse is not None:
        lse = lse.gather(2, rows.clamp(min=0).unsqueeze(1).expand(-1, lse.shape[1], -1))
    if step.raters:
        judges = raters(query, key, candidate_key, sample, scale, start, visible)
        visible = torch.where(judges, visible, 0)
    return ops.attention_mass(
        query,
        key,
        candidate_key,
        sample=sample,
        lse=lse,
        scale=scale,
        visible_start=start,
        visible_len=visible,
    )


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of (batch, n) at (batch, m) places; -1 stays -1."""
    return torch.where(index >= 0, table.gather(1, index.clamp(min=0)), -1)


def choose(run: Run, layer: int, step: PruneStep, score: Tensor) -> tuple[Tensor, Stage]:
    """Cut at the input of a layer: the tokens that stay of those that the layer before it holds.

    Args:
        score: (num_images, num_candidates) float32.
    Returns:
        (num_images, num_keep) int64 kept positions in the chunk, -1 = filler; the stage that begins here.
    """
    stage, device = run.stage(layer - 1), score.device
    stays, sample, index, priority = (
        item.to(device) for item in (step.stays, step.sample, step.vision_index, step.priority)
    )
    if stage.place is not None:
        # Of what came this far a later cut takes its number, if need be of those it likes least.
        stays = stays & (stage.place >= 0)
        alive = look_up(stage.place[sample], index) >= 0
        priority = torch.where(alive, priority.clamp(min=-1) + 1, -1)
    weight = None if step.weight is None else step.weight.to(device)
    kept = ops.select(score, step.num_keep, weight=weight, priority=priority, index=index)
    # One spare slot at the end swallows the fillers of ``kept``.
    flags = torch.cat([stays.flatten(), stays.new_zeros(1)])
    flat = torch.where(kept >= 0, kept + sample.unsqueeze(1) * stays.shape[1], -1)
    flags[flat.flatten()] = True
    keep, place = left_pack(flags[:-1].view_as(stays), step.width)
    slots = TokenMap.extended(run.state.at(run.state.cuts, layer), run.begin, keep, run.width, step.dense)
    back = place if stage.keep is None else look_up(place, stage.keep)
    recycling = None
    if step.recycle is not None:
        counts = list(zip(*step.recycle, strict=True))
        core, reach = (
            ops.select(score, list(number), weight=weight, priority=priority, index=index) for number in counts[1:]
        )
        recycling = Recycling(kept, core, reach, step.recycle)
    return kept, Stage(slots, keep, place, back=back, recycling=recycling)


def pruned_mask(mask: Any, run: Run, stage: Stage, hidden: Tensor, flash: bool) -> Tensor | None:
    """Fit the mask of the layers before the first cut to the slots of a later stage."""
    if run.recalled is not None:
        return _causal_mask(run, stage, hidden.shape[1], flash, None if mask is None else mask.dtype)
    columns = stage.slots.columns(run.past_slots + run.slots)
    queries, total = hidden.shape[1], columns.shape[1]
    if mask is None:
        if stage.slots.dense:
            return None
        valid = columns >= 0
        if flash:
            return valid
        place = torch.arange(total, device=run.device)
        return _fill(valid[:, None, None, :] & (place <= place[total - queries :, None]), run, False)
    real = columns >= 0
    columns = columns.clamp(min=0)
    if mask.ndim == 2:
        return mask.gather(1, columns).bool() & real
    batch = columns.shape[0]
    mask = mask.expand(batch, -1, -1, -1)
    if stage.keep is not None:
        rows = stage.keep.clamp(min=0)[:, None, :, None]
        mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], queries, -1))
    real = real[:, None, None, :]
    unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return _fill(mask.masked_fill(~real, unseen), run, unseen)


def _causal_mask(run: Run, stage: Stage, length: int, flash: bool, dtype: torch.dtype | None) -> Tensor | None:
    """Mask of all of a conversation, of the kind that the other layers have."""
    real = run.real(stage)
    if flash:
        return real
    mask = torch.ones(length, length, dtype=torch.bool, device=run.device).tril()[None, None]
    mask = mask if real is None else mask & real[:, None, None, :]
    if dtype is None or not dtype.is_floating_point:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _fill(mask: Tensor, run: Run, unseen: float) -> Tensor:
    """As many columns as the cache has room for, if that is fixed."""
    if run.capacity is None:
        return mask
    return torch.nn.functional.pad(mask, (0, run.capacity - mask.shape[3]), value=unseen)
