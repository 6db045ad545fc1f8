"""What the encoder has to see: not more images at once than memory was measured for, and none that it has seen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Rows = Callable[[Mapping[str, Any]], Tensor]  # arguments of a call -> (num_images,) rows of each image


class FeatureCache:
    """Features by picture, up to a number of bytes, so that another region of a picture runs no encoder; the least recently
    used leave.

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


def batches(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Images that the encoder sees together: as many in order as vLLM measured memory for, at least one.

    The scheduler counts what stays of them, and would send ten times as many.
    """
    found: list[list[int]] = []
    room = 0
    for number, count in enumerate(tokens):
        if not found or count > room:
            found.append([])
            room = budget
        found[-1].append(number)
        room -= count
    return found


def part_of(kwargs: Mapping[str, Any], numbers: Sequence[int], flat: Mapping[str, Rows]) -> dict[str, Any]:
    """Arguments of some of the images."""
    found = {}
    for name, value in kwargs.items():
        rows = flat[name](kwargs).tolist() if name in flat else []
        if rows and len(value) != len(rows):
            pieces = value.split(rows)
            found[name] = torch.cat([pieces[number] for number in numbers])
        elif getattr(value, "ndim", 1) == 0:  # one for all
            found[name] = value
        elif isinstance(value, Tensor):
            found[name] = value[list(numbers)]
        else:
            found[name] = [value[number] for number in numbers]
    return found
