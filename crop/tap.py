"""Doors into a model that leave what it computes as it is: read an attention call, keep vision features."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_numbers = itertools.count()


@contextmanager
def tap(
    module: nn.Module,
    read: Callable[[Tensor, Tensor, float | None], None],
    *,
    when: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Call ``read(query, key, scale)`` before every attention call of ``module`` inside the block.

    The module looks its attention function up by the name in its configuration; while its forward
    runs, it carries a copy of the configuration that names a function of ours, which reads and then
    calls what the model would have called. No weight is read, and no other module sees the name.

    Args:
        module: attention module of a Hugging Face decoder layer.
        read: receives query (batch, num_heads, rows, head_dim) and key (batch, num_kv_heads, keys,
            head_dim), rotated, and the scale of their product. An exception leaves the model as it
            was before the call.
        when: asked at the start of each forward of ``module``; False leaves that call alone.
    Source: own choice; config copy instead of a process-wide switch of the attention function.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"crop_tap_{next(_numbers)}"
    untapped: Any = None

    def enter(module: nn.Module, args: tuple) -> None:
        nonlocal untapped
        if when():
            untapped = module.config
            tapped = copy.copy(untapped)
            tapped._attn_implementation_internal = name
            module.config = tapped

    def leave(*_: Any) -> None:
        nonlocal untapped
        if untapped is not None:
            module.config, untapped = untapped, None

    def attend(
        called: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        leave()
        read(query, key, kwargs.get("scaling"))
        eager = getattr(sys.modules[type(called).__module__], "eager_attention_forward", None)
        attention = called.config._attn_implementation
        function = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager)
        return function(called, query, key, value, mask, **kwargs)

    handles = []
    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        leave()
        del ALL_ATTENTION_FUNCTIONS[name]


@contextmanager
def shared_vision(base: nn.Module) -> Iterator[None]:
    """Run the vision tower once for calls on the same pixels inside the block.

    A localizer that looks through the model itself and the answer that follows see the same image; the second call
    gets the features of the first. Only the last features are held, and only to the end of the block.

    Args:
        base: multimodal model below the head; has ``get_image_features``, as all of transformers' do.
    Source: own choice.
    """
    compute = base.get_image_features
    held: list[Any] = []  # arguments and features of the last call

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        if not held or not _same(held[0], (args, kwargs)):
            held[:] = (args, kwargs), compute(*args, **kwargs)
        return held[1]

    base.get_image_features = get_image_features
    try:
        yield
    finally:
        del base.get_image_features


def _same(a: Any, b: Any) -> bool:
    """Equal arguments; tensors by value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b
