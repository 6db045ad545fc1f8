"""Read the query and key of an attention call without changing what the model computes."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crop.patching.lse import call_with_lse

_naming = threading.Lock()


@contextmanager
def attention_hook(
    module: nn.Module,
    read: Callable[..., None],
    *,
    when: Callable[[], bool] = lambda: True,
    with_lse: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Call ``read(query, key, scale)`` at every attention call of ``module`` inside the block.

    The module looks its attention function up by the name in its configuration; inside the block it carries a copy of the
    configuration that names a function of ours, which reads and then calls what the model would have called. No weight is
    read, no other module sees the name, and any number of threads may call the module at once.

    Args:
        module: attention module of a Hugging Face decoder layer.
        read: receives query (batch, num_heads, rows, head_dim) and key (batch, num_kv_heads, keys,
            head_dim), rotated, and the scale of their product.
        when: asked at each attention call; False leaves that call alone.
        with_lse: asked at each attention call; True lets the attention run first, and ``read`` receives the log-sum-exp
            that it returned as a fourth argument (``patching.lse``; None where it returns none).
    Source: own choice; config copy instead of a process-wide switch of the attention function.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = module.config

    @torch.compiler.disable
    def attend(called: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        eager = getattr(sys.modules[type(called).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(original._attn_implementation, eager)

        def call(function: Callable[..., Any]) -> Any:
            return function(called, query, key, value, mask, **kwargs)

        if not when():
            return call(function)
        if not with_lse():
            read(query, key, kwargs.get("scaling"))
            return call(function)
        out, lse = call_with_lse(function, query, call)
        read(query, key, kwargs.get("scaling"), lse)
        return out

    # The first free name: compiled code is compiled again for every new one.
    with _naming:
        name = next(
            name for name in map("crop_attention_{}".format, itertools.count()) if name not in ALL_ATTENTION_FUNCTIONS
        )
        ALL_ATTENTION_FUNCTIONS[name] = attend
    renamed = copy.copy(original)
    renamed._attn_implementation_internal = name
    module.config = renamed
    try:
        yield
    finally:
        module.config = original
        del ALL_ATTENTION_FUNCTIONS[name]


def undo_rope(module: nn.Module, query: Tensor, key: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Query and key as they were before the rotary embedding, up to rounding.

    The function that turned them turns them back: by the same angles with the other sign, so that halves, interleaved
    pairs and partial rotations need no code of ours. A scale in the tables is divided out.

    Args:
        module: attention module. query: (batch, num_heads, seq_len, head_dim), key: (batch, num_kv_heads, seq_len,
            head_dim), both of the same tokens.
        tables: (cos, sin) that the module's layer received.
    Raises:
        ValueError: the module's file has no ``apply_rotary_pos_emb``.
    """
    turn = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        raise ValueError(
            f"patch: rope must be True for {type(module).__name__}, whose file defines no apply_rotary_pos_emb, got False"
        )
    cos, sin = (table.float() for table in tables)
    norm = (cos.square() + sin.square()).clamp(min=1e-12)  # 0 in the rows of fillers
    return turn(query.float(), key.float(), cos / norm, -sin / norm)
