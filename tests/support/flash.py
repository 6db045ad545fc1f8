"""Flash attention on the CPU: transformers' own integration with plain kernels of the same signature behind it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import modeling_flash_attention_utils as flash_utils


@dataclass
class FlashCalls:
    """What the fake kernels were asked: (kernel, causal, query tokens, key tokens) per call, and all by name."""

    calls: list[tuple[str, bool, int, int]] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)

    def decoder(self) -> list[tuple[str, int, int]]:
        """The causal calls, i.e. those of the language model."""
        return [(name, q, k) for name, causal, q, k in self.calls if causal]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None,
            causal: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Plain attention of one sequence, (tokens, heads, head_dim), bottom-right causal as flash is; its log-sum-exp."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    dtype, (query, key, value) = query.dtype, (states.float() for states in (query, key, value))
    logits = torch.einsum("qhd,khd->hqk", query, key) * scale
    if causal:
        rows = torch.arange(query.shape[0])[:, None] + key.shape[0] - query.shape[0]
        logits = logits.masked_fill(torch.arange(key.shape[0])[None] > rows, -torch.inf)
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1).nan_to_num(0.0), value)
    return out.to(dtype), logits.logsumexp(-1)


@contextlib.contextmanager
def flash_on_cpu() -> Iterator[FlashCalls]:
    """Transformers' own flash integration with CPU kernels of the same signature behind it."""
    record = FlashCalls()

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False,
                        window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                        deterministic=False, return_attn_probs=False):  # fmt: skip
        record.calls.append(("dense", causal, q.shape[1], k.shape[1]))
        record.arguments.append(dict(locals()))
        out, lse = zip(*(_attend(q[b], k[b], v[b], softmax_scale, causal) for b in range(q.shape[0])), strict=True)
        return (torch.stack(out), torch.stack(lse), None) if return_attn_probs else torch.stack(out)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                               dropout_p=0.0, softmax_scale=None, causal=False,
                               window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False):  # fmt: skip
        record.calls.append(("varlen", causal, q.shape[0], k.shape[0]))
        record.arguments.append(dict(locals()))
        edges_q, edges_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        parts = [
            _attend(q[q0:q1], k[k0:k1], v[k0:k1], softmax_scale, causal)
            for q0, q1, k0, k1 in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False)
        ]
        out, lse = zip(*parts, strict=True)
        return (torch.cat(out), torch.cat(lse, 1), None) if return_attn_probs else torch.cat(out)

    def lazy_imports(implementation, attention_wrapper=None, allow_all_kernels=False):
        pad, unpad = flash_utils._pad_input, flash_utils._unpad_input
        return flash_attn_func, flash_attn_varlen_func, None, pad, unpad

    names = ("_lazy_imports", "_loaded_implementation", "_flash_fn", "_flash_varlen_fn",
             "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn")  # fmt: skip
    saved = {name: getattr(flash_utils, name) for name in names}
    flash_utils._lazy_imports = lazy_imports
    flash_utils._loaded_implementation = None
    try:
        yield record
    finally:
        for name, value in saved.items():
            setattr(flash_utils, name, value)
