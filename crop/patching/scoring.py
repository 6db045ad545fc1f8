"""A cut inside the decoder: who is scored by whom, and which tokens stay."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from crop import ops
from crop.methods.base import MergeView, Method, ScoreView
from crop.patching.batch_plan import PruneStep
from crop.patching.cache import CacheState
from crop.patching.masks import layer_valid
from crop.patching.state import ForwardState, LayerState
from crop.patching.token_map import TokenMap, look_up


def score(
    state: ForwardState,
    here: LayerState,
    step: PruneStep,
    query: Tensor,
    key: Tensor,
    scale: float | None,
    lse: Tensor | None,
) -> Tensor:
    """The method's score of every candidate, (num_images, num_candidates) float32.

    Args:
        here: what the scoring layer holds.
        query: (batch, num_heads, entries, head_dim), key: (batch, num_kv_heads, past + entries, head_dim).
        lse: (batch, num_heads, entries) float32 log-sum-exp of what each query sees, None: not known.
    Raises:
        TypeError: the method's score is no float32 tensor of that shape.
    """
    device = query.device
    rows, visible, sample, candidates = (
        item.to(device) for item in (step.rows, step.visible, step.sample, step.candidates)
    )
    planned = rows
    if here.slot_of is not None:
        slot_of = here.slot_of.to(device)
        rows, candidates = look_up(slot_of, rows), look_up(slot_of[sample], candidates)
    dropped = 0 if here.tokens is None else here.tokens.dropped
    key = key[:, :, : state.pooled_total - dropped]  # a static cache is longer
    past = key.shape[2] - query.shape[2]
    row_key = rows
    if past:
        row_key, candidates = (torch.where(index >= 0, index + past, -1) for index in (rows, candidates))
    real, start = layer_valid(state.valid, here.tokens, state.pooled_total), None
    if real is not None:
        real = real.to(device)
        if past == 0 and (here.kept_index is not None or step.first is not None):
            # One span of real keys per sample; after a cut it stands at the right end.
            start = step.first.to(device) if here.kept_index is None else (~real).sum(1)
        else:
            # Real keys with holes between them: close the holes, so that each row sees one span.
            keys, slot = ops.pack(real, real.shape[1])
            key = ops.compact([key], keys, token_dim=2)[0]
            start = real.shape[1] - real.sum(1)
            row_key, candidates = look_up(slot, row_key), look_up(slot[sample], candidates)
    if row_key is not planned:
        visible = row_key + 1
    if state.prefix:
        end = key.shape[2] if start is None else (start + real.sum(1)).unsqueeze(1)
        visible = torch.where(rows >= 0, end, 0)
    query, *given = ops.compact([query] if lse is None else [query, lse.unsqueeze(-1)], rows, token_dim=2)
    lse = given[0].squeeze(-1) if given else None
    found = step.method.score(query, key, ScoreView(candidates, sample, visible, start, scale, lse, row_key))
    got = (found.dtype, tuple(found.shape)) if isinstance(found, Tensor) else type(found).__name__
    if got != (torch.float32, tuple(candidates.shape)):
        raise TypeError(f"patch: score() of a method must return float32 of shape {tuple(candidates.shape)}, got {got}")
    return found


def cut(state: ForwardState, layer: int, step: PruneStep, scores: Tensor) -> tuple[Tensor, LayerState]:
    """The tokens that stay at the input of ``layer``, of those that the layer before it holds.

    Args:
        scores: (num_images, num_candidates) float32, on the plan's device.
    Returns:
        (num_images, most) int64 pooled positions that stay, -1 = filler; what the layers from here on hold.
    """
    here = state.at(layer - 1)
    stays, priority, candidates = step.stays, step.priority, step.candidates
    if here.slot_of is not None:
        # Of what came this far a later cut takes its number, if need be of those it likes least.
        stays = stays & (here.slot_of >= 0)
        alive = look_up(here.slot_of[step.sample], candidates) >= 0
        priority = torch.where(alive, priority.clamp(min=-1) + 1, -1)

    def best(counts: list[int]) -> Tensor:
        return ops.select(scores, counts, weight=step.weight, priority=priority, index=candidates)

    def places(counts: list[int]) -> Tensor:
        found = best(counts)
        return found if here.slot_of is None else look_up(here.slot_of[step.sample], found)

    def merge(hidden: Tensor) -> Tensor:
        return step.method.merge(hidden, MergeView(step.owners, step.num_keep, step.num_candidates, places))

    kept = best(step.num_keep)
    kept_index, slot_of = ops.pack(stays, step.width, kept=kept, sample=step.sample)
    earlier = CacheState.at(state.before.cuts, layer)
    tokens = TokenMap.extended(earlier, state.pooled_past, kept_index, state.pooled_length, step.full)
    taken = kept_index if here.kept_index is None else look_up(here.slot_of, kept_index)
    merges = type(step.method).merge is not Method.merge
    seen_from = step.seen_from if state.pooled_past == 0 else None
    return kept, LayerState(
        tokens, kept_index, slot_of, taken=taken, seen_from=seen_from, merge=merge if merges else None
    )


def restore(state: ForwardState, hidden: Tensor, layer: int) -> Tensor:
    """Hidden states behind ``layer`` at the pooled length: dropped tokens as they went into their cut.

    Those of the last tokens alone stay as they are.
    """
    if hidden.shape[1] < state.entries(max(layer, 0)):  # -1: the embeddings
        return hidden
    for first, here in sorted(state.layers.items(), reverse=True):
        if first <= layer and here.hidden_before is not None:
            before, index = here.hidden_before.to(hidden), here.taken.to(hidden.device)
            if here.taken is here.kept_index and not here.tokens.full:
                slot_of = here.slot_of.to(hidden.device)
                found = ops.compact([hidden], slot_of)[0]
                hidden = torch.where((slot_of >= 0).unsqueeze(-1), found, before)
                continue
            if not here.tokens.full:  # one spare entry at the end swallows the fillers
                before, index = pad(before, (0, 0, 0, 1)), torch.where(index >= 0, index, before.shape[1])
            restored = before.scatter(1, index.unsqueeze(-1).expand_as(hidden), hidden)
            hidden = restored[:, : here.hidden_before.shape[1]]
    return hidden
