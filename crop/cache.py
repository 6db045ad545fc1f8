"""Which tokens a key-value cache still holds after pruning.

A pruned sequence has two thinnings, each described by a :class:`Slots` map:
``pooled`` takes logical positions (what the caller counts) to the slots of layers below the cut,
``pruned`` takes those slots to the slots of the layers from the cut on. Both live on the cache object, so they
survive ``copy.deepcopy`` and a later patch of the same conversation finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_STATE = "_crop_state"


def left_fill(keep: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Index that moves the kept tokens of every sample, in order, to the right end of ``length`` slots.

    Fillers always stand at the left, whatever the padding side of the input was, so the real tokens of a sample
    are contiguous and causal order is slot order. No host sync.

    Args:
        keep: (batch, seq_len) bool, at most ``length`` True per row.
        length: number of slots.
    Returns:
        index (batch, length) int64, source position of each slot, -1 = filler;
        slot (batch, seq_len) int64, slot of each source position, -1 = dropped.
    """
    batch, seq_len = keep.shape
    rank = keep.cumsum(1)
    slot = torch.where(keep, rank - 1 + length - rank[:, -1:], -1) if seq_len else rank
    index = torch.full((batch, length + 1), -1, dtype=torch.int64, device=keep.device)
    source = torch.arange(seq_len, device=keep.device).expand(batch, -1)
    index.scatter_(1, torch.where(keep, slot, length), source)
    return index[:, :length], slot


@dataclass(frozen=True)
class Slots:
    """Source position of every slot: (batch, num_slots) int64, -1 = filler; later positions follow one to one.

    Args:
        index: source positions, ascending where >= 0.
        covers: number of source positions that ``index`` accounts for.
        dense: no filler in ``index``, known on the host.
    """

    index: Tensor
    covers: int
    dense: bool

    @property
    def dropped(self) -> int:
        """Source positions without a slot of their own."""
        return self.covers - self.index.shape[1]

    def columns(self, total: int) -> Tensor:
        """Source position of every slot once ``total`` source positions were seen: (batch, total - dropped)."""
        new = torch.arange(self.covers, total, device=self.index.device)
        return torch.cat([self.index, new.expand(self.index.shape[0], -1)], dim=1)

    @staticmethod
    def extended(old: Slots | None, past: int, index: Tensor, added: int, dense: bool) -> Slots:
        """Append a pruned chunk: ``index`` (batch, n) into the chunk's ``added`` source positions, -1 = filler."""
        shifted = torch.where(index >= 0, index + past, -1)
        if past == 0:
            return Slots(shifted, added, dense)
        old = old or Slots(shifted[:, :0], 0, True)
        merged = torch.cat([old.columns(past), shifted], dim=1)
        return Slots(merged, past + added, old.dense and dense)


@dataclass(frozen=True)
class CacheState:
    """Thinnings of one cache; ``layer`` is the first decoder layer that holds pruned tokens."""

    pooled: Slots | None = None
    pruned: Slots | None = None
    layer: int | None = None


class _PrunedCache:
    """Cache mixin: the maps follow the batch; callers see the unpruned length, masks are sized by what exists."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        length = super().get_seq_length(layer_idx)
        state = cache_state(self)
        return length + state.pooled.dropped if length and state.pooled is not None else length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        _take_samples(self, lambda index: index.index_select(0, beam_idx.to(index.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        _take_samples(self, lambda index: index.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        _take_samples(self, lambda index: index[indices.to(index.device)])

    def crop(self, *_args: Any, **_kwargs: Any) -> None:
        raise NotImplementedError(
            "crop: a cache of pruned vision tokens cannot be shortened (assisted generation); use plain generation"
        )


def _take_samples(cache: Any, take: Callable[[Tensor], Tensor]) -> None:
    state = cache_state(cache)
    changes = {
        name: replace(slots, index=take(slots.index))
        for name, slots in (("pooled", state.pooled), ("pruned", state.pruned))
        if slots is not None
    }
    setattr(cache, _STATE, replace(state, **changes))


_pruned_classes: dict[type, type] = {}


def cache_state(cache: Any) -> CacheState:
    """The thinnings of a cache; empty for none or an untouched one."""
    return getattr(cache, _STATE, None) or CacheState()


def num_slots(cache: Any) -> int:
    """Tokens held by the first layer of a cache."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    state = cache_state(cache)
    return length - state.pooled.dropped if length and state.pooled is not None else length


def store_state(cache: Any, **changes: Any) -> None:
    """Update the thinnings of a cache, which is from now on a pruned variant of its class."""
    setattr(cache, _STATE, replace(cache_state(cache), **changes))
    kind = type(cache)
    if not issubclass(kind, _PrunedCache):
        if kind not in _pruned_classes:
            _pruned_classes[kind] = type(f"Pruned{kind.__name__}", (_PrunedCache, kind), {})
        cache.__class__ = _pruned_classes[kind]
