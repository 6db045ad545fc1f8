"""What one prefill will do, decided on the host before the vision tower runs.

Planning needs token ids, the padding mask and the regions only, so every size is known up front: the device is never
asked. All tensors of a plan are views into one host buffer, which goes to the device in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crop.geometry.layout import PATCH, VisionLayout
from crop.geometry.pieces import Encoding
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods.base import FeaturePooling, Method, Selection
from crop.methods.encoding import planned
from crop.methods.saliency import patches_of
from crop.patching.pool_step import PoolStep, pool_step


@dataclass(frozen=True)
class ImagePlan:
    """One image: where its tokens are, how they are pooled, which of the pooled ones stay at which layer.

    Args:
        sample: its batch row.
        layout: its tokens, input positions.
        plan: its cells, a stand-in of the right size where features decide; None: not pooled.
        pooled: its tokens after pooling, pooled positions.
        selections: by decoder layer, what stays there.
        by_features: what decides in the place of ``plan``, or None.
        encoding: what the encoder gets of it; None: no method leaves anything out.
    """

    sample: int
    layout: VisionLayout
    plan: PoolPlan | None
    pooled: VisionLayout
    selections: dict[int, Selection]
    by_features: FeaturePooling | None = None
    encoding: Encoding | None = None

    @property
    def encoded(self) -> VisionLayout:
        """Its tokens that are encoded, input positions."""
        return self.layout if self.encoding is None else self.encoding.left

    @property
    def leaders(self) -> Tensor:
        """(num_pooled,) input positions of the tokens that lead its cells, as planned."""
        return _leaders(self.layout, self.plan)

    def tokens_at(self, layer: int) -> int:
        """How many of its tokens decoder layer ``layer`` sees."""
        counts = [selection.num_keep for cut, selection in self.selections.items() if cut <= layer]
        return counts[-1] if counts else len(self.pooled)


def _leaders(layout: VisionLayout, plan: PoolPlan | None) -> Tensor:
    return layout.position if plan is None else layout.position[plan.leader.long()]


@dataclass(frozen=True)
class PruneStep:
    """One cut of inner-LLM pruning, for a whole batch; positions are pooled ones.

    Args:
        method: scores and merges.
        stays: (batch, pooled length) bool, tokens that this cut leaves alone (text, images kept whole).
        width: entries of the longest sample afterwards.
        full: every sample fills all of them.
        images: the pruned images, by their number in the batch; owners: the batch row of each.
        sample: (num_images,) int64, ``owners``.
        candidates: (num_images, num_candidates) int64 positions of the tokens, -1 = filler.
        priority: int8, weight: float32 or None, both like ``candidates``.
        num_keep, num_candidates: tokens to keep per image, and those to choose from.
        by_features: (priority, weight or None) of the original tokens of each pruned image whose pooling features decide.
        rows: (batch, num_rows) int64 scoring rows, -1 = filler; None where no scores are needed.
        first: (batch,) int64 first real token of each sample; None where padding stands between real tokens.
    """

    method: Method
    stays: Tensor
    width: int
    full: bool
    images: list[int]
    owners: list[int]
    sample: Tensor
    candidates: Tensor
    priority: Tensor
    weight: Tensor | None
    num_keep: list[int]
    num_candidates: list[int]
    by_features: dict[int, tuple[Tensor, Tensor | None]]
    rows: Tensor | None
    first: Tensor | None


@dataclass(frozen=True)
class BatchPlan:
    """Everything one prefill does.

    Args:
        images: all images, in prompt order.
        valid: (batch, seq_len) bool marks what is no padding, before pooling.
        pool: the pooling, None: there is none.
        prunes: by decoder layer, the cuts at which a token leaves, ascending.
        positions: per image, (N,) int64 pooled positions of its pooled tokens.
        text: per sample, (M,) int64 input positions of the text after its last image; None where no feature decides.
        patches: of the images that are pooled by ``saliency_weights``, as by ``patches_of``; None where none is.
    """

    images: list[ImagePlan]
    valid: Tensor
    pool: PoolStep | None
    prunes: dict[int, PruneStep]
    positions: list[Tensor]
    text: list[Tensor] | None = None
    patches: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.valid.device

    def packed(self) -> BatchPlan:
        """The same plan with all tensors as views into one buffer."""
        tensors: list[Tensor] = []
        _map_tensors(self, lambda tensor: tensors.append(tensor) or tensor)
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.numel() * tensor.element_size() // 16) * 16  # views need aligned starts
        buffer, found = torch.empty(size, dtype=torch.uint8), iter(starts)

        def place(tensor: Tensor) -> Tensor:
            view = _view(buffer, next(found), tensor)
            view.copy_(tensor)
            return view

        return _map_tensors(self, place)

    def to(self, device: torch.device) -> BatchPlan:
        """A packed plan on ``device``, by one copy of its buffer."""
        if device == self.device:
            return self
        storage = self.valid.untyped_storage()
        buffer = torch.empty(0, dtype=torch.uint8).set_(storage)
        if device.type == "cuda":
            buffer = buffer.pin_memory()  # or the copy would wait for what the device has yet to do
        buffer = buffer.to(device, non_blocking=True)
        return _map_tensors(self, lambda tensor: _view(buffer, tensor.storage_offset() * tensor.element_size(), tensor))


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


# What of a plan is on the device; the rest describes single images, and numbers that the host knows.
_ON_DEVICE = {
    BatchPlan: ("valid", "pool", "prunes", "positions", "text", "patches"),
    PoolStep: ("plan", "kept_index", "slot_of", "filled", "alone", "source"),
    PruneStep: ("stays", "sample", "candidates", "priority", "weight", "by_features", "rows", "first"),
    PoolPlan: ("members", "offsets", "leader", "level"),
}


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same plan with every tensor changed, in a fixed order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(entry, change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_map_tensors(entry, change) for entry in value])
    names = _ON_DEVICE.get(type(value))
    if names is None:
        return value
    found = {name: _map_tensors(getattr(value, name), change) for name in names}
    if isinstance(value, PoolPlan):
        return PoolPlan(**found, num_tokens=value.num_tokens, check=False)
    return replace(value, **found)


def plan_batch(
    method: Method,
    images: Sequence[tuple[int, VisionLayout]],
    regions: Sequence[Region],
    valid: Tensor,
    encodings: Sequence[Encoding | None] | None = None,
) -> BatchPlan:
    """Turn regions into pooling cells and candidate lists.

    Args:
        method: the pruning policy.
        images: (sample, layout) per image in prompt order.
        regions: one per image.
        valid: (batch, seq_len) bool, False for padding.
        encodings: what the encoder gets of each; None: all of all.
    """
    encodings = encodings or [None] * len(images)
    made = [
        planned(method, layout, region, encoding)
        for (_, layout), region, encoding in zip(images, regions, encodings, strict=True)
    ]
    by_features = [plan if isinstance(plan, FeaturePooling) else None for plan in made]
    plans = [plan if later is None else later.stand_in() for plan, later in zip(made, by_features, strict=True)]
    pool, real, pooled = None, valid, [layout for _, layout in images]
    if any(plan is not None for plan in plans):
        batch, seq_len = valid.shape
        leader_of = torch.arange(batch * seq_len).view(batch, seq_len).masked_fill(~valid, -1)
        for (sample, layout), plan in zip(images, plans, strict=True):
            if plan is not None:
                cell = plan.inverse.long()
                leader = layout.position[plan.leader.long()][cell.clamp(min=0)]
                leader_of[sample, layout.position] = torch.where(cell >= 0, sample * seq_len + leader, -1)
        counts = (leader_of.flatten() == torch.arange(batch * seq_len)).view(batch, seq_len).sum(1)
        pool = pool_step(leader_of, int(counts.max()), int(counts.sum()))
        real = pool.kept_index >= 0
        pooled = [
            layout.pool(plan or PoolPlan.identity(len(layout)), pool.slot_of[sample, _leaders(layout, plan)])
            for (sample, layout), plan in zip(images, plans, strict=True)
        ]
    found = []
    made = zip(images, plans, pooled, regions, by_features, encodings, strict=True)
    for (sample, layout), plan, after, region, later, encoding in made:
        if later is not None:  # the kind of a stand-in's tokens says nothing about those that will take their places
            after = replace(after, kind=torch.full_like(after.kind, PATCH))
        selections = _selections(method, layout if later else after, region, len(after))
        found.append(ImagePlan(sample, layout, plan, after, selections, later, encoding))
    text = _text_after(found, valid) if any(later is not None for later in by_features) else None
    ends = _ends(found, valid, real, pool is not None)
    steps = {cut.layer: _prune_step(cut, found, real, ends) for cut in method.cuts}
    prunes = {layer: step for layer, step in steps.items() if step is not None}
    patches = None
    if pool is not None and method.pool_mode == "distinct":
        patches = patches_of(
            [(image.sample, image.encoded) for image in found if image.plan is not None], valid.shape[1]
        )
    positions = [image.pooled.position for image in found]
    return BatchPlan(found, valid, pool, prunes, positions, text, patches).packed()


def _selections(method: Method, layout: VisionLayout, region: Region, count: int) -> dict[int, Selection]:
    """What each cut keeps of one image of ``count`` pooled tokens; only those cuts at which a token leaves.

    Where features decide the pooling, ``layout`` is the one before it, and every token must stay a candidate.
    """
    found: dict[int, Selection] = {}
    for cut in method.cuts:
        selection = cut.select(layout, region)
        if selection is not None and not isinstance(selection, Selection):
            got = type(selection).__name__
            raise TypeError(f"patch: select() of a method must return a Selection or None, got {got}")
        if selection is not None:
            selection.check(layout)
        if selection is not None and count < len(layout):
            if not selection.needs_scores:
                raise ValueError(
                    "patch: a cut behind pooling by features must go by scores, got a Selection without (mode='strict'), "
                    "whose number of tokens nobody knows beforehand; use mode='budget'"
                )
            priority = selection.priority.clamp(min=-1)
            selection = replace(selection, priority=priority - priority.min().clamp(max=0))
        left = [count, *(earlier.num_keep for earlier in found.values())][-1]
        if selection is not None and selection.num_keep < left:
            # What an earlier cut left is known on the device only, so that priorities alone may not decide.
            found[cut.layer] = replace(selection, needs_scores=selection.needs_scores or bool(found))
    return found


def _text_after(images: Sequence[ImagePlan], valid: Tensor) -> list[Tensor]:
    """(M,) int64 positions of the text after the last image, per sample."""
    begin = [0] * len(valid)
    for image in images:
        begin[image.sample] = int(image.layout.position[-1]) + 1
    return [torch.nonzero(row[first:]).flatten() + first for row, first in zip(valid, begin, strict=True)]


def _ends(images: Sequence[ImagePlan], valid: Tensor, real: Tensor, pooled: bool) -> list[int]:
    """Pooled position behind the last image, per sample."""
    ends = [0] * len(real)
    for image in images:
        end = int(image.layout.position[-1]) + 1
        if pooled:  # packed to the right; text may stand behind the last token that is left
            end = real.shape[1] - int(valid[image.sample, end:].sum())
        ends[image.sample] = max(ends[image.sample], end)
    return ends


def _prune_step(cut: Method, images: Sequence[ImagePlan], real: Tensor, after: Sequence[int]) -> PruneStep | None:
    layer = cut.layer
    pruned = [number for number, image in enumerate(images) if layer in image.selections]
    if not pruned:
        return None
    stays, kept = real.clone(), real.sum(1)
    for image in images:
        kept[image.sample] += image.tokens_at(layer) - len(image.pooled)
    for image in (images[number] for number in pruned):
        if not real[image.sample, after[image.sample] :].any():
            # Nothing would ask, and the token that predicts the answer could itself be dropped.
            raise ValueError(
                f"patch: text must follow the last image of a prompt to prune inside the decoder, "
                f"got a prompt of sample {image.sample} that ends with an image"
            )
        stays[image.sample, image.pooled.position] = False
    width = int(kept.max())
    chosen = [(images[number], images[number].selections[layer]) for number in pruned]
    by_features = {
        row: (one.priority, one.weight) for row, (image, one) in enumerate(chosen) if image.by_features is not None
    }
    chosen = [  # which of its tokens are left is decided later
        (image, one if image.by_features is None else _first_of(one, len(image.pooled))) for image, one in chosen
    ]
    weight = None
    if any(one.weight is not None for _, one in chosen):
        weight = _stack(
            [
                torch.ones(len(one.priority), dtype=torch.float32) if one.weight is None else one.weight
                for _, one in chosen
            ],
            1.0,
        )
    return PruneStep(
        method=cut,
        stays=stays,
        width=width,
        full=bool((kept == width).all()),
        images=pruned,
        owners=[image.sample for image, _ in chosen],
        sample=torch.tensor([image.sample for image, _ in chosen]),
        candidates=_stack([image.pooled.position for image, _ in chosen], -1),
        priority=_stack([one.priority for _, one in chosen], -1),
        weight=weight,
        num_keep=[one.num_keep for _, one in chosen],
        num_candidates=[int((one.priority >= 0).sum()) for _, one in chosen],
        by_features=by_features,
        rows=_scoring_rows(cut.rows, after, real) if any(one.needs_scores for _, one in chosen) else None,
        first=_first_if_contiguous(real),
    )


def _first_of(selection: Selection, count: int) -> Selection:
    weight = None if selection.weight is None else selection.weight[:count]
    return replace(selection, priority=selection.priority[:count], weight=weight)


def _first_if_contiguous(real: Tensor) -> Tensor | None:
    first = real.int().argmax(1)
    last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return first if bool((last - first + 1 == real.sum(1)).all()) else None


def _stack(rows: Sequence[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


def _scoring_rows(kind: str, after: Sequence[int], real: Tensor) -> Tensor:
    """Rows whose attention decides: the text after a sample's last image, or its last token alone."""
    rows = [torch.nonzero(row[begin:]).flatten() + begin for row, begin in zip(real, after, strict=True)]
    return _stack([row[-1:] if kind == "last" else row for row in rows], -1)
