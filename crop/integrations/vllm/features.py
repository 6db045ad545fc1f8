"""Vision features of pictures that were asked about before: another region of the same picture runs no encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor


class FeatureCache:
    """Features by picture, up to a number of bytes; the least recently used leave.

    Memory for all of it is taken at once, so that what measures free memory later counts it; the first picture gives it
    back to the allocator, which then serves the features from it.
    """

    def __init__(self, limit: int, device: torch.device | str) -> None:
        self._limit, self._bytes = limit, 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._reserve: Tensor | None = torch.empty(limit, dtype=torch.uint8, device=device)
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, picture: Hashable) -> Tensor | None:
        """Its features, None where they are not known (any more)."""
        found = self._entries.get(picture)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(picture)
        return found

    def put(self, picture: Hashable, features: Tensor) -> None:
        """Keep a copy: the encoder's output is a part of what it made of a whole batch."""
        size = features.numel() * features.element_size()
        if picture in self._entries or size > self._limit:
            return
        self._reserve = None
        self._bytes += size
        while self._bytes > self._limit:
            _, left = self._entries.popitem(last=False)
            self._bytes -= left.numel() * left.element_size()
        self._entries[picture] = features.clone()

    def clear(self) -> None:
        """Forget all, as when the encoder's weights change."""
        self._entries.clear()
        self._bytes = 0
