"""Which tokens a key-value cache still holds after pruning.

A pruned sequence has one thinning before the decoder and one per cut inside it, each a :class:`TokenMap` map:
``pooled`` takes logical positions (what the caller counts) to the slots of the layers below the first cut,
``cuts[layer]`` takes those slots to the slots of the layers from ``layer`` on. They live on the cache object, so they
survive ``copy.deepcopy`` and a later patch of the same conversation finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crop import ops

if TYPE_CHECKING:
    from crop.patching.readmit import Memory

_STATE = "_crop_state"


def left_pack(keep: Tensor, length: int) -> tuple[Tensor, Tensor]:
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
class TokenMap:
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
    def extended(old: TokenMap | None, past: int, index: Tensor, added: int, dense: bool) -> TokenMap:
        """Append a pruned chunk: ``index`` (batch, n) into the chunk's ``added`` source positions, -1 = filler."""
        shifted = torch.where(index >= 0, index + past, -1)
        if past == 0:
            return TokenMap(shifted, added, dense)
        old = old or TokenMap(shifted[:, :0], 0, True)
        merged = torch.cat([old.columns(past), shifted], dim=1)
        return TokenMap(merged, past + added, old.dense and dense)

    def after(self, first: TokenMap | None) -> TokenMap:
        """This thinning applied to the slots of another one: from the source of ``first`` at once."""
        if first is None:
            return self
        source = first.columns(self.covers + first.dropped)
        index = torch.where(self.index >= 0, source.gather(1, self.index.clamp(min=0)), -1)
        return TokenMap(index, source.shape[1] + first.dropped, self.dense)


@dataclass(frozen=True)
class CacheState:
    """Thinnings of one cache; ``cuts`` by the first decoder layer that they hold for.

    ``moved``: (batch,) int64, by first decoder layer, how far renumbered position ids lie below the caller's.
    ``whole_masks``: masks are to be made for all of the caller's tokens, whatever the layers hold.
    ``memory``: what later questions need to cut anew, where that is wanted.
    """

    pooled: TokenMap | None = None
    cuts: dict[int, TokenMap] = field(default_factory=dict)
    moved: dict[int, Tensor] = field(default_factory=dict)
    whole_masks: bool = False
    memory: Memory | None = None

    @staticmethod
    def at(table: dict[int, Any], layer: int) -> Any:
        """The entry of ``cuts`` or ``moved`` that holds for a decoder layer, None before the first cut."""
        return table.get(max((first for first in table if 0 < first <= layer), default=-1))


class _PrunedCache:
    """Cache mixin: the maps follow the batch; callers see the unpruned length, masks are sized by what exists."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        length = super().get_seq_length(layer_idx)
        state = cache_state(self)
        return length if state.pooled is None else length + state.pooled.dropped

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length() if cache_state(self).whole_masks else super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if cache_state(self).whole_masks:
            return self.get_seq_length() + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def reset(self) -> None:
        super().reset()
        delattr(self, _STATE)
        self.__class__ = type(self).__mro__[2]  # nothing is pruned any more

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
    def taken(slots: TokenMap | None) -> TokenMap | None:
        return None if slots is None else replace(slots, index=take(slots.index))

    state = cache_state(cache)
    cuts = {layer: taken(slots) for layer, slots in state.cuts.items()}
    moved = {layer: take(by) for layer, by in state.moved.items()}
    memory = None if state.memory is None else state.memory.take_samples(take)
    setattr(cache, _STATE, replace(state, pooled=taken(state.pooled), cuts=cuts, moved=moved, memory=memory))


_pruned_classes: dict[type, type] = {}


def cache_state(cache: Any) -> CacheState:
    """The thinnings of a cache; empty for none or an untouched one."""
    return getattr(cache, _STATE, None) or CacheState()


def is_pruned(cache: Any) -> bool:
    """Whether calls on a cache must follow what was done to it."""
    state = getattr(cache, _STATE, None)
    return state is not None and bool(state.pooled or state.cuts or state.moved)


def make_uniform(cache: Any, take: list[Tensor | None], past: int) -> None:
    """Leave in every layer the slots that the last layer holds, moved to the front.

    Args:
        take: per layer (batch, width) int64 slots of the last chunk to keep, -1 = filler; None: all of them.
        past: slots before that chunk, which stay.
    """
    for layer, index in zip(cache.layers, take, strict=True):
        if index is None:
            continue
        before = torch.arange(past, device=index.device).expand(len(index), -1)
        index = torch.cat([before, torch.where(index >= 0, index + past, -1)], 1)
        keys, values = ops.compact([layer.keys, layer.values], index.to(layer.keys.device), token_dim=2)
        if hasattr(layer, "cumulative_length"):  # static: the tensors stay where they are
            length = index.shape[1]
            for old, new in ((layer.keys, keys), (layer.values, values)):
                old[:, :, :length] = new
                old[:, :, length:] = 0
            layer.cumulative_length.fill_(length)
        else:
            layer.keys, layer.values = keys, values


def store_state(cache: Any, **changes: Any) -> None:
    """Update what is known of a cache, which is from now on a pruned variant of its class."""
    setattr(cache, _STATE, replace(cache_state(cache), **changes))
    kind = type(cache)
    if not issubclass(kind, _PrunedCache):
        if kind not in _pruned_classes:
            _pruned_classes[kind] = type(f"Pruned{kind.__name__}", (_PrunedCache, kind), {})
        cache.__class__ = _pruned_classes[kind]
