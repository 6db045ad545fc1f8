"""The log-sum-exp that an attention backend computes beside its output, which saves the scores their first pass.

Nothing is run in another way for it: torch's flash operators return it always and are only watched; flash-attn returns it
on demand (``return_attn_probs``), of the same kernel. It covers what the model's own mask let each row see.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
WATCHED = {  # (output, log-sum-exp, ...)
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
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
    lse: Tensor | None = None
    if _is_flash(function):
        found: list[Tensor] = []
        out = call(_asking(function, found))
        lse = found[-1] if found else None
    else:
        with _Watch() as watch:
            out = call(function)
        lse = watch.lse
    return out, lse.detach().float() if lse is not None and lse.shape == query.shape[:3] else None


class _Watch(TorchDispatchMode):
    """Notes what torch's flash operators return."""

    lse: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.scaled_dot_product_attention.default:  # in inference mode it comes in one piece
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in WATCHED:
            self.lse = out[1]
        return out


def _is_flash(function: Callable[..., Any]) -> bool:
    from transformers.integrations.flash_attention import flash_attention_forward

    return function is flash_attention_forward


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
