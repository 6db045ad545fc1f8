"""A vision tower that sees all of a picture, and attends to a part of it: what pruning before the encoder must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index


@contextmanager
def attending_to(tower: Any, images: Sequence[tuple[int, tuple[int, ...]]], grid: Tensor | None) -> Iterator[None]:
    """Inside, no patch of a Qwen-like tower attends to one of a token that is not named; other towers are as they are.

    Args:
        images: (tokens, indices of those that may be attended to) of each image of the call. grid: of the call.
    """
    if grid is None or not images:
        yield
        return
    seen = torch.zeros(sum(count for count, _ in images), dtype=torch.bool)
    start = 0
    for count, own in images:
        seen[[start + n for n in own]] = True
        start += count
    merge = tower.spatial_merge_size
    if hasattr(tower, "window_size"):
        order, _ = get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
        seen = seen[order]
    seen, done = seen.repeat_interleave(merge**2), [0]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, **_: Any) -> Any:
        """One window or image of a layer; they come in the order of the sequence."""
        here = seen[done[0] : done[0] + key.shape[2]]
        done[0] = (done[0] + key.shape[2]) % len(seen)
        weight = (query @ key.transpose(2, 3) * scaling).masked_fill(~here, -torch.inf).softmax(-1)
        return (weight.nan_to_num(0.0) @ value).transpose(1, 2), None

    before, name = tower.config._attn_implementation_internal, "attending_to"
    ALL_ATTENTION_FUNCTIONS[name] = attend
    tower.config._attn_implementation_internal = name
    try:
        yield
    finally:
        tower.config._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS[name]
