"""What a key-value cache still holds after pruning.

The maps (``token_map``) live on the cache object, so they survive ``copy.deepcopy``, and a later block on the same
conversation finds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from crop import ops
from crop.patching.current import CALL
from crop.patching.token_map import TokenMap

_STATE = "_crop_state"


@dataclass(frozen=True)
class CacheState:
    """What was pruned in one cache.

    Args:
        pooled: input to pooled coordinates, None: nothing was pooled.
        cuts: by first decoder layer, pooled coordinates to those of that layer and the following ones.
        shifts: by first decoder layer, (batch,) int64 how far renumbered position ids lie below: at 0 the caller's, later
            those at 0.
        whole_masks: masks are to be made for all of the caller's tokens, whatever the layers hold.
    """

    pooled: TokenMap | None = None
    cuts: dict[int, TokenMap] = field(default_factory=dict)
    shifts: dict[int, Tensor] = field(default_factory=dict)
    whole_masks: bool = False

    @staticmethod
    def at(table: dict[int, Any], layer: int) -> Any:
        """The entry of ``cuts`` or ``shifts`` that holds for a decoder layer, None before the first cut."""
        return table.get(max((first for first in table if 0 < first <= layer), default=-1))


class _PrunedCache:
    """Cache mixin: the maps follow the batch; callers see the unpruned length, masks are sized by what exists."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if CALL.get() is None:
            raise RuntimeError(
                "patch: a cache of pruned vision tokens must be used inside a patch block (method=None prunes nothing more), "
                "got a call outside"
            )
        return super().update(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _pruned_again, (type(self).__mro__[2],), vars(self)

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
    def taken(tokens: TokenMap | None) -> TokenMap | None:
        return None if tokens is None else replace(tokens, index=take(tokens.index))

    state = cache_state(cache)
    cuts = {layer: taken(tokens) for layer, tokens in state.cuts.items()}
    shifts = {layer: take(by) for layer, by in state.shifts.items()}
    setattr(cache, _STATE, replace(state, pooled=taken(state.pooled), cuts=cuts, shifts=shifts))


@functools.cache
def _pruned(kind: type) -> type:
    return type(f"Pruned{kind.__name__}", (_PrunedCache, kind), {})


def _pruned_again(kind: type) -> Any:
    """An empty cache, for copies and files."""
    return object.__new__(_pruned(kind))


def cache_state(cache: Any) -> CacheState:
    """What was pruned in a cache; empty for none or an untouched one."""
    return getattr(cache, _STATE, None) or CacheState()


def store_state(cache: Any, **changes: Any) -> None:
    """Update what is known of a cache, which is from now on a pruned variant of its class."""
    setattr(cache, _STATE, replace(cache_state(cache), **changes))
    if not isinstance(cache, _PrunedCache):
        cache.__class__ = _pruned(type(cache))


def make_uniform(cache: Any, take: list[Tensor | None], past: int) -> None:
    """Leave in every layer the entries that the last layer holds, moved to the front.

    Args:
        take: per layer (batch, width) int64 entries of the last call to keep, -1 = filler; None: all of them.
        past: entries before that call, which stay.
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
