"""Read the query, key and log-sum-exp of an attention call without changing what the model computes.

The log-sum-exp saves the scores their first pass. No other kernel runs for it: torch's flash operators return it always and
are only watched; cuDNN, the memory-efficient kernel (``compute_log_sumexp``, as in training) and flash-attn
(``return_attn_probs``) write it on demand. It covers what the model's own mask let each row see.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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
            that it returned as a fourth argument (None where it returns none).
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
    cos, sin = cos / norm, -sin / norm
    if list(inspect.signature(turn).parameters).index("cos") == 1:  # takes one tensor at a time (Gemma 4)
        return turn(query.float(), cos, sin), turn(key.float(), cos, sin)
    return turn(query.float(), key.float(), cos, sin)


_aten = torch.ops.aten
WATCHED = {  # return (output, log-sum-exp, ...); the number of the argument that asks for the latter, None: it is always there
    _aten._scaled_dot_product_flash_attention.default: None,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: None,
    _aten._scaled_dot_product_efficient_attention.default: 4,
    _aten._scaled_dot_product_cudnn_attention.default: 4,
}


def call_with_lse(function: Callable[..., Any], query: Tensor, call: Callable[..., Any]) -> tuple[Any, Tensor | None]:
    """Run an attention function of transformers.

    Args:
        function: e.g. ``sdpa_attention_forward``.
        query: (batch, num_heads, rows, head_dim), what it gets.
        call: calls a function with the arguments meant for ``function``.
    Returns:
        What it returned; (batch, num_heads, rows) float32 natural log of the softmax denominators, None where the backend
        gives none.
    """
    from transformers.integrations.flash_attention import flash_attention_forward

    lse: Tensor | None = None
    if function is flash_attention_forward:
        found: list[Tensor] = []
        out = call(_asking(function, found))
        lse = found[-1] if found else None
    else:
        with _Watch() as watch:
            out = call(function)
        lse = watch.lse
    return out, lse.detach().float() if lse is not None and lse.shape == query.shape[:3] else None


class _Watch(TorchDispatchMode):
    """Notes what torch's fused attention returns, and has it return the log-sum-exp."""

    lse: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.scaled_dot_product_attention.default:  # in inference mode it comes in one piece
            with self:
                return func.decompose(*args, **kwargs)
        if func not in WATCHED:
            return func(*args, **kwargs)
        if (asks := WATCHED[func]) is not None:
            args = (*args[:asks], True, *args[asks + 1 :])
        out = func(*args, **kwargs)
        # cuDNN's has a last axis of one; the efficient kernel's rows are a multiple of 32.
        self.lse = out[1][..., 0] if out[1].dim() == 4 else out[1]
        self.lse = self.lse[..., : args[0].shape[2]]
        return out


def _asking(function: Any, found: list[Tensor]) -> Callable[..., Any]:
    """transformers' flash attention, whose kernels are asked for the log-sum-exp; no other call of them is."""
    inner = function.__globals__["_flash_attention_forward"]
    load = inner.__globals__["lazy_import_flash_attention"]

    def loaded(*args: Any, **kwargs: Any) -> Any:
        (dense, varlen, paged, pad, unpad), rest = load(*args, **kwargs)

        def padded(tokens: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
            if found:  # (num_heads, tokens), without the padding
                found.append(pad(found.pop().T.contiguous(), indices, batch, length).transpose(1, 2))
            return pad(tokens, indices, batch, length)

        return (_asked(dense, found), _asked(varlen, found), paged, padded, unpad), rest

    return _with_globals(function, _flash_attention_forward=_with_globals(inner, lazy_import_flash_attention=loaded))


def _asked(kernel: Any, found: list[Tensor]) -> Any:
    try:
        knows = kernel is not None and "return_attn_probs" in inspect.signature(kernel).parameters
    except ValueError:  # compiled code that tells nothing of itself
        knows = False
    if not knows:
        return kernel

    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dropout_p"):
            return kernel(*args, **kwargs)  # the probabilities would be written out, too
        out, lse, *_ = kernel(*args, **kwargs, return_attn_probs=True)
        if lse.dim() == (3 if args[0].dim() == 4 else 2):
            found.append(lse)
        return out

    return call


def _with_globals(function: FunctionType, **names: Any) -> FunctionType:
    """The same function, for which global names stand for something else; the original stays as it is."""
    twin = FunctionType(
        function.__code__, function.__globals__ | names, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
