"""A vision tower that sees all of a picture, and attends to a part of it: what pruning before the encoder must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index


@contextmanager
def attending_to(
    tower: Any, images: Sequence[tuple[int, tuple[int, ...]]], grid: Tensor | None, cut: int | None
) -> Iterator[None]:
    """Inside, no patch attends to one of a token that is not named: in a Qwen-like tower nowhere, in CLIP and SigLIP from
    layer `cut` on. Towers of tiles are as they are.

    Args:
        images: (tokens, indices of those that may be attended to) of each image of the call. grid: of the call.
    """
    if not images or (grid is None and cut is None):
        yield
        return
    attend = _in_one_sequence(tower, images, grid) if cut is None else _behind(tower, images, cut)
    before, name = tower.config._attn_implementation_internal, "attending_to"
    ALL_ATTENTION_FUNCTIONS[name] = attend
    tower.config._attn_implementation_internal = name
    try:
        yield
    finally:
        tower.config._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS[name]


def _behind(tower: Any, images: Sequence[tuple[int, tuple[int, ...]]], cut: int) -> Callable[..., Any]:
    """An attention function for images that stand below each other."""
    late = [layer.self_attn for layer in tower.encoder.layers[cut:]]
    first = int(tower.config.model_type == "clip_vision_model")
    seen = torch.zeros(len(images), first + images[0][0], dtype=torch.bool)
    for row, (_, own) in zip(seen, images, strict=True):
        row[[*range(first), *(first + n for n in own)]] = True

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **more: Any) -> Any:
        weight = query @ key.transpose(2, 3) * more["scaling"]
        if any(module is one for one in late):
            weight = weight.masked_fill(~seen[:, None, None], -torch.inf)
        return (weight.softmax(-1) @ value).transpose(1, 2), None

    return attend


def _in_one_sequence(tower: Any, images: Sequence[tuple[int, tuple[int, ...]]], grid: Tensor) -> Callable[..., Any]:
    """An attention function for images that follow each other, called for one window or image at a time."""
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
        here = seen[done[0] : done[0] + key.shape[2]]
        done[0] = (done[0] + key.shape[2]) % len(seen)
        weight = (query @ key.transpose(2, 3) * scaling).masked_fill(~here, -torch.inf).softmax(-1)
        return (weight.nan_to_num(0.0) @ value).transpose(1, 2), None

    return attend


@torch.no_grad()
def class_token_attention(tower: Any, pixels: Tensor, method: Any = None) -> Tensor:
    """(tokens,) attention from the class token of a CLIP tower in the layer before the last, from eager weights; of a
    method that names several ``depths``, (tokens, depths)."""
    out = tower(pixels, output_attentions=True)
    last = len(out.attentions) - 2
    depths = method.depths(last) if hasattr(method, "depths") else (last,)
    found = [out.attentions[depth][0].double().mean(0)[0, 1:].float() for depth in depths]
    return torch.stack(found, 1) if len(found) > 1 else found[0]
