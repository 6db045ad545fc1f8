"""Calls of other people's kernels, for `bench.kernels.cuda`: each the public function of its package, as its documentation states.

A peer is a function that takes the inputs and returns the result in our form: mass (B, N), or ascending indices (B, k). What
a package makes its caller do (repeat keys, transpose, sort) is part of the call. None of the packages is needed here:
`call` gives the name of the missing module instead.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.kernels.torch_forms import mass_grouped, repeated
from crop.selftest.cases import Case
from crop.selftest.timing import Call

LOG2_E = 1.4426950408889634


def installed(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def call(module: str, function: Callable[..., Any], *args: Any) -> Call | str:
    """The call of a peer, or the name of its module where that is not installed."""
    return (lambda: function(importlib.import_module(module), *args)) if installed(module) else module


def peers_of(case: Case) -> dict[str, Call | str]:
    """Peers of a case by name, as calls or as names of modules that are not installed."""
    given = case.inputs
    if case.op == "attention_mass, lse given":
        query, key, lse = given["query"], given["key"], given["lse"]
        return {
            "flash_colreduce": call("flash_colreduce", flash_colreduce, query, key),
            "keys_values": call("keys_values.attention.flashinfer_wrapper", keys_values, query, key, lse),
        }
    if case.op == "attention_mass, lse computed":
        query, key = given["query"], given["key"]
        return {
            "flash_attn lse, grouped": call("flash_attn", flash_attn_then, query, key, mass_grouped),
            "flash_colreduce": call("flash_colreduce", flash_colreduce, query, key),
            "flag_attn": call("flag_attn", flag_attn, query, key),
        }
    if case.op == "select":
        score, k = given["score"], given["k"]
        lengths = torch.full((len(score),), score.shape[1], dtype=torch.int32, device=score.device)
        rows = (score, k, torch.zeros_like(lengths), lengths)
        found = {
            "flashinfer.top_k + sort": call("flashinfer", flashinfer, score, k),
            "flashinfer ragged + sort": call("flashinfer", flashinfer_ragged, *rows),
            "vllm top_k_per_row + sort": call("vllm._C", vllm, *rows),
        }
        if case.size["tokens"] // 4 == 2048:
            found["sgl fast_topk_v2 + sort"] = call("sgl_kernel", sgl, score, k, lengths)
        return found
    if case.op == "compact" and len(given["tensors"]) == 1:
        first = call("flash_attn.bert_padding", first_axis, given["tensors"][0], given["index"])
        return {"flash_attn index_first_axis": first if isinstance(first, str) else lambda: [first()]}
    if case.op == "adaptive_pool":
        plan = given["plan"]
        inputs = (given["tokens"], plan.members.long(), plan.offsets.long())
        return {"torch_scatter.segment_csr": call("torch_scatter", segment_csr, *inputs)}
    return {}


# --- mass: query (B, H, M, d), key (B, Hkv, N, d), lse (B, H, M) natural ----------------------------------------------


def flash_colreduce(package: Any, query: Tensor, key: Tensor) -> Tensor:
    """flash-colreduce 0.2.2: (B, H, N) sums over the rows; its keys have as many heads as the queries."""
    return package.flash_colreduce(query, repeated(query, key), "mean").float().mean(1)


def flag_attn(package: Any, query: Tensor, key: Tensor) -> Tensor:
    """FlagAttention: the third result is (B, H, N), the attention summed over the rows."""
    wide = repeated(query, key)
    result = package.flash_attention(query, wide, wide, return_log_normalizer=True, return_total_attention=True)
    return result[2].float().mean(1) / query.shape[2]


def keys_values(package: Any, query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
    """keys_values: (B, Hkv, N), summed over rows, mean over the heads of a group; log-sum-exp to base 2."""
    heads, groups = query.shape[1], key.shape[1]
    rows = (query.transpose(1, 2), key.transpose(1, 2), (lse * LOG2_E).transpose(1, 2))
    share = package.triton_score_sum(*rows, query.shape[3] ** -0.5, groups, heads // groups, causal_masking=False)
    return share.mean(1) / query.shape[2]


def flash_attn_lse(package: Any, query: Tensor, key: Tensor) -> Tensor:
    """(B, H, M) from FlashAttention, which takes grouped heads."""
    rows, keys = query.transpose(1, 2), key.transpose(1, 2)
    return package.flash_attn_func(rows, keys, keys, return_attn_probs=True)[1]


def flash_attn_then(package: Any, query: Tensor, key: Tensor, mass: Callable[..., Tensor]) -> Tensor:
    """Someone's mass with the log-sum-exp of FlashAttention, both timed."""
    return mass(query, key, flash_attn_lse(package, query, key))


# --- selection: score (B, N) float32, k; ascending order is part of the work -------------------------------------------


def flashinfer(package: Any, score: Tensor, k: int) -> Tensor:
    return package.top_k(score, k, deterministic=True, tie_break=1)[1].sort().values


def flashinfer_ragged(package: Any, score: Tensor, k: int, zeros: Tensor, lengths: Tensor) -> Tensor:
    return package.top_k_ragged_transform(score, zeros, lengths, k, deterministic=True).sort().values


def sgl(package: Any, score: Tensor, k: int, lengths: Tensor) -> Tensor:
    """For k = 2048 alone."""
    return package.fast_topk_v2(score, lengths, k).sort().values


def vllm(package: Any, score: Tensor, k: int, zeros: Tensor, lengths: Tensor) -> Tensor:
    """`package` is vllm._C, whose import registers the operator."""
    out = torch.empty(score.shape[0], k, dtype=torch.int32, device=score.device)
    torch.ops._C.top_k_per_row_prefill(score, zeros, lengths, out, score.shape[0], *score.stride(), k)
    return out.sort().values


# --- movement ---------------------------------------------------------------------------------------------------------


def first_axis(package: Any, tensor: Tensor, index: Tensor) -> Tensor:
    """FlashAttention's gather of rows; `package` is flash_attn.bert_padding."""
    base = torch.arange(index.shape[0], device=index.device)[:, None] * tensor.shape[1]
    return package.index_first_axis(tensor.flatten(0, 1), (index + base).flatten()).view(*index.shape, -1)


def segment_csr(package: Any, tokens: Tensor, members: Tensor, offsets: Tensor) -> Tensor:
    """torch_scatter, after the members were put side by side."""
    return package.segment_csr(tokens[members], offsets, reduce="mean")
