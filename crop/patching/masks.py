"""Attention masks: the model makes them for the tokens that it knows of; every layer takes those of the tokens it holds.

A causal decoder makes its masks over pooled tokens, from ``pooled_valid``. Where images or prompts see themselves, or
windows slide, the multimodal model makes them over input tokens. ``gather`` fits either to a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crop.patching.token_map import TokenMap, look_up


def layer_valid(valid: Tensor | None, tokens: TokenMap | None, total: int) -> Tensor | None:
    """Which entries of a map hold a real token: (batch, entries) bool; None: all do.

    Args:
        valid: (batch, total) of the map's sources, None: all are real. tokens: the map, None: one to one.
        total: sources seen by now.
    """
    if tokens is None or (tokens.full and valid is None):
        return valid
    sources = tokens.sources(total)
    real = sources >= 0
    return real if valid is None else real & valid.gather(1, sources.clamp(min=0))


def pooled_valid(
    valid: Tensor | None, before: TokenMap | None, later: Tensor | None, past: int, pooled_past: int, pooled_length: int
) -> Tensor | None:
    """Which pooled tokens, those of the cache first, are real: (batch, pooled_past + pooled_length) bool; None: all are.

    Args:
        valid: (batch, past + added) mask over input tokens, None: all are real.
        before: pooled tokens of the cache; None: nothing was pooled.
        later: (batch, pooled_length) bool, which pooled tokens of this call are real; None: all.
        past: input tokens before this call. pooled_past, pooled_length: pooled tokens before and in it.
    """
    if pooled_past == 0:
        return later
    earlier = layer_valid(None if valid is None else valid[:, :past].bool(), before, past)
    if earlier is None and later is None:
        return None
    known = later if earlier is None else earlier
    earlier = known.new_ones(len(known), pooled_past) if earlier is None else earlier
    later = known.new_ones(len(known), pooled_length) if later is None else later
    return torch.cat([earlier, later], dim=1)


def key_positions(maps: Sequence[TokenMap | None], batch: int, total: int, added: int, window: int | None) -> Tensor:
    """The positions, in the coordinates of a mask, of the keys that a layer's attention gets.

    Args:
        maps: how the layer's entries came about, one after the other; None: nothing was dropped there.
        batch: samples. total: positions after this call. added: entries of this call in the layer.
        window: sliding window of the layer, whose cache holds one entry less; None: there is none.
    Returns:
        (batch, keys) int64, -1 = filler; the last ``added`` are those of this call.
    """
    positions = None
    for tokens in maps:
        if tokens is not None and positions is None:
            positions = tokens.sources(total)
        elif tokens is not None:
            sources = tokens.sources(positions.shape[1])
            positions = look_up(positions.to(sources.device), sources)
    if positions is None:
        positions = torch.arange(total, device="cpu").expand(batch, -1)
    if window is not None:
        positions = positions[:, -(min(positions.shape[1] - added, window - 1) + added) :]
    return positions


def causal(seen_from: Tensor) -> Tensor:
    """The mask of entries packed to the right end, (batch, 1, width, width) bool; ``seen_from``: as in ``PruneStep``.

    A filler sees all, which is no matter.
    """
    return seen_from[:, None, None, :] <= seen_from[:, None, :, None]


def gather(mask: Tensor | None, keys: Tensor, full: bool, queries: int, total: int, flash: bool) -> Tensor | None:
    """Rows and columns of a mask for the tokens that a layer holds.

    Args:
        mask: (batch, keys) for flash attention, (1 or batch, 1, last tokens, last of the ``total`` tokens) bool or additive
            otherwise; None: plain causal.
        keys: as by ``key_positions``. full: there is no filler among them.
        queries: the last of ``keys`` that ask.
        total: positions after this call, in the mask's coordinates.
        flash: a mask that is made anew is one for flash attention.
    Returns:
        A mask of the same kind; None: plain causal still.
    """
    if mask is None:
        if full:
            return None
        if flash:
            return keys >= 0
        entry = torch.arange(keys.shape[1], device=keys.device)
        return (keys >= 0)[:, None, None, :] & (entry <= entry[-queries:, None])
    keys = keys.to(mask.device)
    if mask.ndim == 2:
        return mask.gather(1, keys.clamp(min=0)).bool() & (keys >= 0)
    # A static cache has more columns than tokens, a sliding window fewer.
    rows, columns = (keys[:, -queries:] - (total - mask.shape[2])).clamp(min=0), keys - max(0, total - mask.shape[-1])
    real = ((keys >= 0) & (columns >= 0))[:, None, None, :]
    mask = mask.expand(len(keys), -1, -1, -1)
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns.clamp(min=0)[:, None, None, :].expand(-1, mask.shape[1], queries, -1))
    return mask & real if mask.dtype == torch.bool else mask.masked_fill(~real, torch.finfo(mask.dtype).min)


def gather_own(mask: Tensor | None, keys: Tensor, total: int) -> Tensor:
    """The mask of a layer that carries a state, which is of the tokens of its call alone: (batch, entries) bool.

    Fillers before the first token leave the state empty.

    Args:
        mask: (batch, last of the ``total`` tokens); None: all are real. keys: as by ``key_positions``, of this call.
    """
    if mask is None:
        return keys >= 0
    columns = (keys - (total - mask.shape[1])).clamp(min=0).to(mask.device)
    return mask.bool().gather(1, columns) & (keys >= 0).to(mask.device)


def pad_columns(mask: Tensor | None, capacity: int | None) -> Tensor | None:
    """A 4-D mask with as many columns as the cache has room for; None: it grows."""
    if mask is None or mask.ndim == 2 or capacity is None:
        return mask
    unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.nn.functional.pad(mask, (0, capacity - mask.shape[3]), value=unseen)
