"""What one prefill will do, decided on the host before the vision tower runs.

Planning needs token ids, the padding mask and the regions only, so every size is known up front: the device is never
asked. All tensors of a plan go to the device in one copy of one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Encoding
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods.base import FeaturePooling, Method, Selection
from crop.methods.encoding import planned
from crop.methods.saliency import patches_of
from crop.ops.transfer import upload
from crop.patching.pool_step import PoolStep, pool_images


@dataclass(frozen=True)
class ImagePlan:
    """One image: where its tokens are, how they are pooled, which of the pooled ones stay at which layer.

    Args:
        sample: its batch row.
        layout: its tokens, input positions.
        plan: its cells, a stand-in of the right size where features decide; None: not pooled.
        pooled: its tokens after pooling, pooled positions; where features decide, of no kind: those of a stand-in say nothing.
        selections: by decoder layer, what stays there.
        by_features: what decides in the place of ``plan``, or None.
        encoding: what the encoder gets of it; None: no method leaves anything out.
    """

    sample: int
    layout: VisionLayout
    plan: PoolPlan | None
    pooled: VisionLayout
    selections: dict[int, Selection]
    by_features: FeaturePooling | None
    encoding: Encoding | None

    @property
    def encoded(self) -> VisionLayout:
        """Its tokens that are encoded, input positions."""
        return self.layout if self.encoding is None else self.encoding.left

    def tokens_at(self, layer: int) -> int:
        """How many of its tokens decoder layer ``layer`` sees."""
        counts = [selection.num_keep for cut, selection in self.selections.items() if cut <= layer]
        return counts[-1] if counts else len(self.pooled)


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
        rows: (batch, num_rows) int64 scoring rows, -1 = filler; None where no scores are needed. visible: so many of the pooled
            tokens each sees, one more than its own number.
        first: (batch,) int64 first real token of each sample; None where padding stands between real tokens.
        seen_from: (batch, width) int64 the first of the entries afterwards that sees each of them, ``width`` for a filler, which
            none does; None where there are no fillers.
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
    visible: Tensor | None
    first: Tensor | None
    seen_from: Tensor | None


@dataclass(frozen=True)
class FeatureStep:
    """Pooling of one image that features decide.

    Args:
        image: its number in the batch.
        pooling: what decides; its ``given`` is where the plan is.
        num_tokens: of the image.
        places: (num_tokens + M,) int64 flat input positions of its tokens, and of the text after the sample's last image.
    """

    image: int
    pooling: FeaturePooling
    num_tokens: int
    places: Tensor


@dataclass(frozen=True)
class BatchPlan:
    """Everything one prefill does.

    Args:
        images: all images, in prompt order.
        valid: (batch, seq_len) bool marks what is no padding, before pooling.
        pool: the pooling, None: there is none.
        prunes: by decoder layer, the cuts at which a token leaves, ascending.
        positions: per image, (N,) int64 pooled positions of its pooled tokens.
        features: the images whose pooling features decide.
        leader_of: (batch, seq_len) int64 flat input position of the token that leads each token's cell, -1 = in none, and
            leaders: per image, (N,) int64 those of its pooled tokens, both as planned; None where no feature decides.
        patches: of the images that are pooled by ``saliency_weights``, as by ``patches_of``; None where none is.
    """

    images: list[ImagePlan]
    valid: Tensor
    pool: PoolStep | None
    prunes: dict[int, PruneStep]
    positions: list[Tensor]
    features: list[FeatureStep]
    leader_of: Tensor | None = None
    leaders: list[Tensor] | None = None
    patches: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.valid.device

    def to(self, device: torch.device) -> BatchPlan:
        """The plan on ``device``, by one copy of one buffer."""
        if device == self.device:
            return self
        found = iter(upload(self._tensors(), device))
        return _map_tensors(self, lambda _: next(found))

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        _map_tensors(self, lambda tensor: found.append(tensor) or tensor)
        return found


# What of a plan is on the device; the rest describes single images, and numbers that the host knows.
_ON_DEVICE = {
    BatchPlan: ("valid", "pool", "prunes", "positions", "features", "leader_of", "leaders", "patches"),
    FeatureStep: ("pooling", "places"),
    FeaturePooling: ("given",),
    PoolStep: ("plan", "kept_index", "slot_of", "source", "alone", "real"),
    PruneStep: (
        "stays",
        "sample",
        "candidates",
        "priority",
        "weight",
        "by_features",
        "rows",
        "visible",
        "first",
        "seen_from",
    ),
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
    encodings, seq_len = encodings or [None] * len(images), valid.shape[1]
    made = [
        planned(method, layout, region, encoding)
        for (_, layout), region, encoding in zip(images, regions, encodings, strict=True)
    ]
    by_features = [plan if isinstance(plan, FeaturePooling) else None for plan in made]
    plans = [plan if later is None else later.stand_in() for plan, later in zip(made, by_features, strict=True)]
    pool, leader_of, real, slot_of, found = None, None, valid.numpy(), None, []
    if any(plan is not None for plan in plans):
        pool, counts, leader_of = pool_images(valid, images, plans)
        real, slot_of = pool.real.numpy(), pool.slot_of.numpy()
    else:
        counts = real.sum(1).tolist()
    made = zip(images, plans, regions, by_features, encodings, strict=True)
    for (sample, layout), plan, region, later, encoding in made:
        pooled = layout if pool is None else _pooled(layout, plan, slot_of[sample])
        if later is not None:
            pooled = pooled.of_patches()
        selections = _selections(method, pooled if later is None else layout, region, len(pooled))
        found.append(ImagePlan(sample, layout, plan, pooled, selections, later, encoding))
    features, leaders, prunes = [], None, {}
    if any(image.selections or image.by_features for image in found):
        text = _text_after(images, valid.numpy())
        rows = text if pool is None else {sample: slot_of[sample][places] for sample, places in text.items()}
        steps = {cut.layer: _prune_step(cut, found, real, counts, rows) for cut in method.cuts}
        prunes = {layer: step for layer, step in steps.items() if step is not None}
        features = [
            FeatureStep(
                number,
                image.by_features,
                len(image.layout),
                _flat(np.concatenate([image.layout.position.numpy(), text[image.sample]]), image, seq_len),
            )
            for number, image in enumerate(found)
            if image.by_features is not None
        ]
        if features:
            places = pool.kept_index.numpy()
            leaders = [_flat(places[image.sample][image.pooled.position.numpy()], image, seq_len) for image in found]
    patches = None
    if pool is not None and method.pool_mode == "distinct":
        patches = patches_of([(image.sample, image.encoded) for image in found if image.plan is not None], seq_len)
    positions = [image.pooled.position for image in found]
    return BatchPlan(found, valid, pool, prunes, positions, features, leader_of if features else None, leaders, patches)


def _flat(places: np.ndarray, image: ImagePlan, seq_len: int) -> Tensor:
    """Input positions of an image's sample as flat ones."""
    return torch.from_numpy(places + image.sample * seq_len)


def _pooled(layout: VisionLayout, plan: PoolPlan | None, slot_of: np.ndarray) -> VisionLayout:
    """The tokens of an image after pooling; slot_of (seq_len,): pooled position that stands for each of its sample's."""
    position = layout.position.numpy()
    if plan is None:
        return layout.at(torch.from_numpy(slot_of[position]))
    return layout.pool(plan, torch.from_numpy(slot_of[position[plan.leader.numpy()]]))


def _text_after(images: Sequence[tuple[int, VisionLayout]], valid: np.ndarray) -> dict[int, np.ndarray]:
    """(M,) int64 positions of the text after the last image, by sample with one."""
    ends = {sample: int(layout.position.numpy()[-1]) + 1 for sample, layout in images}
    return {sample: valid[sample, end:].nonzero()[0] + end for sample, end in ends.items()}


def _selections(method: Method, layout: VisionLayout, region: Region, count: int) -> dict[int, Selection]:
    """What each cut keeps of one image of ``count`` pooled tokens; only those cuts at which a token leaves.

    Where features decide the pooling, ``layout`` is the one before it, and every token must stay a candidate.
    """
    found, left = {}, count
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
            priority = np.maximum(selection.priority.numpy(), -1)
            selection = replace(selection, priority=torch.from_numpy(priority - min(priority.min(), 0)))
        if selection is not None and selection.num_keep < left:
            if found and not selection.needs_scores:
                # What an earlier cut left is known on the device only, so that priorities alone may not decide.
                selection = replace(selection, needs_scores=True)
            found[cut.layer], left = selection, selection.num_keep
    return found


def _prune_step(
    cut: Method, images: Sequence[ImagePlan], real: np.ndarray, counts: list[int], text: dict[int, np.ndarray]
) -> PruneStep | None:
    """What a cut does. counts: real tokens of each sample; text: by sample, pooled positions of what follows its images."""
    layer = cut.layer
    pruned = [number for number, image in enumerate(images) if layer in image.selections]
    if not pruned:
        return None
    stays, kept = real.copy(), counts.copy()
    for image in images:
        kept[image.sample] += image.tokens_at(layer) - len(image.pooled)
    chosen = [(images[number], images[number].selections[layer]) for number in pruned]
    by_features = {
        row: (one.priority, one.weight) for row, (image, one) in enumerate(chosen) if image.by_features is not None
    }
    shape = len(chosen), max(len(image.pooled) for image, _ in chosen)
    candidates, priority = np.full(shape, -1, dtype=np.int64), np.full(shape, -1, dtype=np.int8)
    weight = None if all(one.weight is None for _, one in chosen) else np.ones(shape, dtype=np.float32)
    for row, (image, one) in enumerate(chosen):
        if not len(text[image.sample]):
            # Nothing would ask, and the token that predicts the answer could itself be dropped.
            raise ValueError(
                f"patch: text must follow the last image of a prompt to prune inside the decoder, "
                f"got a prompt of sample {image.sample} that ends with an image"
            )
        places = image.pooled.position.numpy()
        stays[image.sample][places] = False
        candidates[row, : len(places)] = places
        # Where features decide, which of its tokens are left is decided later.
        priority[row, : len(places)] = one.priority.numpy()[: len(places)]
        if one.weight is not None:
            weight[row, : len(places)] = one.weight.numpy()[: len(places)]
    width, full = max(kept), min(kept) == max(kept)
    sample = [image.sample for image, _ in chosen]
    rows = _scoring_rows(cut.rows, text, len(real)) if any(one.needs_scores for _, one in chosen) else None
    entry = np.arange(width)
    return PruneStep(
        method=cut,
        stays=torch.from_numpy(stays),
        width=width,
        full=full,
        images=pruned,
        owners=sample,
        sample=torch.from_numpy(np.array(sample, dtype=np.int64)),
        candidates=torch.from_numpy(candidates),
        priority=torch.from_numpy(priority),
        weight=None if weight is None else torch.from_numpy(weight),
        num_keep=[one.num_keep for _, one in chosen],
        num_candidates=(priority >= 0).sum(1).tolist(),
        by_features=by_features,
        rows=None if rows is None else torch.from_numpy(rows),
        visible=None if rows is None else torch.from_numpy(rows + 1),
        first=_first_if_contiguous(real, counts),
        # Packed to the right end.
        seen_from=None if full else torch.from_numpy(np.where(entry >= width - np.array(kept)[:, None], entry, width)),
    )


def _first_if_contiguous(real: np.ndarray, counts: list[int]) -> Tensor | None:
    first = real.argmax(1)
    last = real.shape[1] - 1 - real[:, ::-1].argmax(1)
    return torch.from_numpy(first) if (last - first + 1 == counts).all() else None


def _scoring_rows(kind: str, text: dict[int, np.ndarray], batch: int) -> np.ndarray:
    """Rows whose attention decides: the text after a sample's last image, or its last token alone."""
    most = 1 if kind == "last" else max(map(len, text.values()))
    rows = np.full((batch, most), -1, dtype=np.int64)
    for sample, found in text.items():
        rows[sample, : len(found)] = found[-most:]
    return rows
