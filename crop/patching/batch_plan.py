"""What one prefill will do, decided on the host before the vision tower runs.

A chunk is the part of the sequences that one forward call processes. Planning it needs token ids, the padding
mask and the regions only, so every size is known up front: the device is never asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods.base import FeaturePooling, Method, Selection
from crop.patching.cache import left_pack


@dataclass(frozen=True)
class ImagePlan:
    """One image: where its tokens are, how they are pooled, which of the pooled ones stay at which layer.

    ``late``: the promise that ``plan`` stands in for, or None.
    """

    sample: int
    layout: VisionLayout
    plan: PoolPlan | None
    pooled: VisionLayout
    selections: dict[int, Selection]
    late: FeaturePooling | None = None

    def tokens_at(self, layer: int) -> int:
        """How many of its tokens decoder layer ``layer`` sees."""
        counts = [selection.num_keep for cut, selection in self.selections.items() if cut <= layer]
        return counts[-1] if counts else len(self.pooled)


@dataclass(frozen=True)
class PoolStep:
    """Pre-LLM compression of a whole batch as one pooling.

    Args:
        plan: cells over the flattened (batch * seq_len) tokens; text tokens are cells of one, padding is in none.
        leader: (batch, num_slots) int64 source position of each slot, -1 = filler.
        slot: (batch, seq_len) int64 slot that stands for each source position, -1 = padding or dropped.
        filled: (num_out,) int64 flat slot of each cell, or None where the cells fill the batch exactly.
    """

    plan: PoolPlan
    leader: Tensor
    slot: Tensor
    filled: Tensor | None


@dataclass(frozen=True)
class PruneStep:
    """One cut of inner-LLM pruning, for a whole batch.

    Args:
        stays: (batch, seq_len) bool, tokens that this cut leaves alone (text, images kept whole).
        width: slots of the longest sample afterwards.
        dense: every sample fills all slots.
        images: the pruned images, by their number in the chunk.
        sample: (num_images,) int64 batch row of each pruned image.
        vision_index: (num_images, num_candidates) int64 token positions in the chunk, -1 = filler.
        priority: int8, weight: float32 or None, both like ``vision_index``.
        num_keep: tokens to keep per image.
        rows: (batch, num_rows) int64 scoring rows, -1 = filler; None where no scores are needed.
        rope: whether the scores know positions. raters: whether only rows that look at the image count.
        recycle: per image, tokens kept, kept as they are, and both kept and recycled; None: nothing is recycled.
        first: (batch,) int64 first real token of each sample; None where padding stands between real tokens.
    """

    stays: Tensor
    width: int
    dense: bool
    images: list[int]
    sample: Tensor
    vision_index: Tensor
    priority: Tensor
    weight: Tensor | None
    num_keep: list[int]
    rows: Tensor | None
    rope: bool
    raters: bool
    recycle: list[tuple[int, int, int]] | None
    first: Tensor | None


@dataclass(frozen=True)
class BatchPlan:
    """Everything one prefill does. ``steps``: by decoder layer, the cuts at which a token leaves, ascending.

    ``real`` (batch, seq_len) bool marks what is no padding, before pooling. ``text``: positions of the text after each
    sample's last image, where a late plan asks for it.
    """

    images: list[ImagePlan]
    real: Tensor
    pool: PoolStep | None
    steps: dict[int, PruneStep]
    text: list[Tensor] | None = None


def plan_batch(
    method: Method,
    images: Sequence[tuple[int, VisionLayout]],
    regions: Sequence[Region],
    real: Tensor,
) -> BatchPlan:
    """Turn regions into pooling cells and candidate lists.

    Args:
        method: the pruning policy.
        images: (sample, layout) per image in prompt order.
        regions: one per image.
        real: (batch, seq_len) bool, False for padding.
    """
    made = [
        _checked_plan(method.plan(layout, region), layout) for (_, layout), region in zip(images, regions, strict=True)
    ]
    late = [plan if isinstance(plan, FeaturePooling) else None for plan in made]
    pool_plans = [plan if promise is None else promise.stand_in() for plan, promise in zip(made, late, strict=True)]
    pool = None
    slots = real
    pooled = [layout for _, layout in images]
    if any(plan is not None for plan in pool_plans):
        pool = _pool_step(images, pool_plans, real)
        slots = pool.leader >= 0
        pooled = [
            layout.pool(plan or PoolPlan.identity(len(layout)), _leader_slots(pool, sample, layout, plan))
            for (sample, layout), plan in zip(images, pool_plans, strict=True)
        ]
        # The kind of a stand-in's tokens says nothing about those that will take their slots.
        pooled = [
            after if promise is None else replace(after, kind=torch.zeros_like(after.kind))
            for after, promise in zip(pooled, late, strict=True)
        ]
    plans = [
        ImagePlan(sample, layout, plan, after, _selections(method, after, region), promise)
        for (sample, layout), plan, after, region, promise in zip(
            images, pool_plans, pooled, regions, late, strict=True
        )
    ]
    text = None
    if any(promise is not None for promise in late):
        if method.cuts and not all(region.is_whole for region in regions):
            raise ValueError(
                "patch: region must be the whole image where a cut follows a FeaturePooling, whose tokens have no known place "
                "beforehand, got boxes"
            )
        text = _text_after([image.layout for image in plans], [image.sample for image in plans], real)
    steps = {cut.layer: _select_step(cut, plans, slots) for cut in method.cuts}
    return BatchPlan(plans, real, pool, {layer: step for layer, step in steps.items() if step is not None}, text)


def _selections(method: Method, layout: VisionLayout, region: Region) -> dict[int, Selection]:
    """What each cut keeps of one image; only those cuts at which a token leaves."""
    found: dict[int, Selection] = {}
    for cut in method.cuts:
        selection = _checked_selection(cut.select(layout, region), layout)
        left = [earlier.num_keep for earlier in found.values()][-1:]
        if selection is not None and (not left or selection.num_keep < left[0]):
            # What an earlier cut left is known on the device only, so that priorities alone may not decide.
            found[cut.layer] = replace(selection, needs_scores=selection.needs_scores or bool(left))
    return found


def _text_after(layouts: Sequence[VisionLayout], samples: Sequence[int], real: Tensor) -> list[Tensor]:
    """(M,) int64 positions of the text after the last image, per sample."""
    begin = [0] * len(real)
    for sample, layout in zip(samples, layouts, strict=True):
        begin[sample] = int(layout.position[-1]) + 1
    return [torch.nonzero(row[first:]).flatten() + first for row, first in zip(real, begin, strict=True)]


def _checked_plan(plan: PoolPlan | FeaturePooling | None, layout: VisionLayout) -> PoolPlan | FeaturePooling | None:
    if plan is not None and not isinstance(plan, (PoolPlan, FeaturePooling)):
        raise TypeError(
            f"patch: plan() of a method must return a PoolPlan, a FeaturePooling or None, got {type(plan).__name__}"
        )
    if isinstance(plan, FeaturePooling):
        if not 1 <= plan.num_out <= len(layout):
            raise ValueError(f"patch: num_out of a FeaturePooling must be in [1, {len(layout)}], got {plan.num_out}")
        if int(layout.position[-1] - layout.position[0]) != len(layout) - 1:
            raise ValueError(
                "patch: a FeaturePooling needs an image whose tokens follow each other, got text among them"
            )
    if plan is not None and plan.num_tokens != len(layout):
        raise ValueError(f"patch: plan() must cover the image's {len(layout)} tokens, got {plan.num_tokens}")
    return plan


def _checked_selection(selection: Selection | None, layout: VisionLayout) -> Selection | None:
    if selection is None:
        return None
    if not isinstance(selection, Selection):
        raise TypeError(f"patch: select() of a method must return a Selection or None, got {type(selection).__name__}")
    for name in ("priority", "weight"):
        value = getattr(selection, name)
        if value is not None and value.shape != (len(layout),):
            raise ValueError(f"patch: {name} of a Selection must have shape ({len(layout)},), got {tuple(value.shape)}")
    candidates = int((selection.priority >= 0).sum())
    if not 0 <= selection.num_keep <= candidates:
        raise ValueError(
            f"patch: num_keep of a Selection must be in [0, {candidates}] (tokens of priority >= 0), "
            f"got {selection.num_keep}"
        )
    return selection


def _leader_slots(pool: PoolStep, sample: int, layout: VisionLayout, plan: PoolPlan | None) -> Tensor:
    leaders = layout.position if plan is None else layout.position[plan.leader.long()]
    return pool.slot[sample, leaders]


def _pool_step(images: Sequence[tuple[int, VisionLayout]], plans: Sequence[PoolPlan | None], real: Tensor) -> PoolStep:
    batch, seq_len = real.shape
    # Every token is labelled with the flat position of the token that leads its cell; equal labels are one cell.
    label = torch.arange(batch * seq_len).view(batch, seq_len).masked_fill(~real, -1)
    for (sample, layout), plan in zip(images, plans, strict=True):
        if plan is None:
            continue
        inverse = plan.inverse.long()
        leader = layout.position[plan.leader.long()][inverse.clamp(min=0)]
        label[sample, layout.position] = torch.where(inverse >= 0, sample * seq_len + leader, -1)
    label = label.flatten()
    members = torch.argsort(label, stable=True)
    members = members[int((label < 0).sum()) :]
    leaders, cell, counts = torch.unique_consecutive(label[members], return_inverse=True, return_counts=True)
    plan = PoolPlan(
        members=members.int(),
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        leader=leaders.int(),
        level=torch.zeros(len(leaders), dtype=torch.uint8),
        num_tokens=batch * seq_len,
    )
    is_leader = torch.zeros(batch * seq_len, dtype=torch.bool)
    is_leader[leaders] = True
    is_leader = is_leader.view(batch, seq_len)
    width = int(is_leader.sum(1).max())
    leader_index, leader_slot = left_pack(is_leader, width)
    slot = torch.full((batch * seq_len,), -1, dtype=torch.int64)
    slot[members] = leader_slot.flatten()[leaders][cell]
    filled = None
    if len(leaders) != batch * width:
        filled = torch.nonzero(leader_index.flatten() >= 0).flatten()
    return PoolStep(plan, leader_index, slot.view(batch, seq_len), filled)


def _select_step(cut: Method, images: Sequence[ImagePlan], slots: Tensor) -> PruneStep | None:
    layer = cut.layer
    pruned = [number for number, image in enumerate(images) if layer in image.selections]
    if not pruned:
        return None
    stays = slots.clone()
    kept = slots.sum(1)
    after = _ends(images, slots)
    for image in images:
        kept[image.sample] += image.tokens_at(layer) - len(image.pooled)
    for image in (images[number] for number in pruned):
        if not slots[image.sample, after[image.sample] :].any():
            # Nothing would ask, and the token that predicts the answer could itself be dropped.
            raise ValueError(
                f"patch: text must follow the last image of a prompt to prune inside the decoder, "
                f"got a prompt of sample {image.sample} that ends with an image"
            )
        stays[image.sample, image.pooled.position] = False
    width = int(kept.max())
    chosen = [(images[number], images[number].selections[layer]) for number in pruned]
    weight = None
    if any(selection.weight is not None for _, selection in chosen):
        weight = _stack(
            [torch.ones(len(image.pooled)) if one.weight is None else one.weight for image, one in chosen], 1.0
        )
    return PruneStep(
        stays=stays,
        width=width,
        dense=bool((kept == width).all()),
        images=pruned,
        sample=torch.tensor([image.sample for image, _ in chosen]),
        vision_index=_stack([image.pooled.position for image, _ in chosen], -1),
        priority=_stack([selection.priority for _, selection in chosen], -1),
        weight=weight,
        num_keep=[selection.num_keep for _, selection in chosen],
        rows=_scoring_rows(cut.rows, after, slots) if any(one.needs_scores for _, one in chosen) else None,
        rope=cut.rope,
        raters=cut.rows == "raters",
        recycle=_recycle(cut, [selection for _, selection in chosen], first=layer == min(images[pruned[0]].selections)),
        first=_first_if_contiguous(slots),
    )


def _recycle(cut: Method, selections: Sequence[Selection], first: bool) -> list[tuple[int, int, int]] | None:
    counts = []
    for selection in selections:
        candidates = int((selection.priority >= 0).sum())
        seeds, taken = cut.recycle(selection.num_keep, candidates)
        if not (0 <= seeds <= selection.num_keep and 0 <= taken <= candidates - selection.num_keep):
            raise ValueError(
                f"patch: recycle() of a method must return at most {selection.num_keep} seeds and "
                f"{candidates - selection.num_keep} recycled tokens, got {seeds} and {taken}"
            )
        counts.append((selection.num_keep, selection.num_keep - seeds, selection.num_keep + (taken if seeds else 0)))
    if all(kept == reach for kept, _, reach in counts):
        return None
    if not first:
        raise ValueError(
            "patch: tokens can be recycled at the first cut only, got a method that does so at a later one"
        )
    return counts


def _first_if_contiguous(real: Tensor) -> Tensor | None:
    first = real.int().argmax(1)
    last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return first if bool((last - first + 1 == real.sum(1)).all()) else None


def _stack(rows: Sequence[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


def _ends(images: Sequence[ImagePlan], slots: Tensor) -> list[int]:
    """Position after the last image of every sample."""
    after = [0] * slots.shape[0]
    for image in images:
        after[image.sample] = max(after[image.sample], int(image.pooled.position[-1]) + 1)
    return after


def _scoring_rows(kind: str, after: Sequence[int], slots: Tensor) -> Tensor:
    """Rows whose attention decides: the text after a sample's last image, or its last token alone."""
    rows = [torch.nonzero(row[begin:]).flatten() + begin for row, begin in zip(slots, after, strict=True)]
    return _stack([row[-1:] if kind == "last" else row for row in rows], -1)
