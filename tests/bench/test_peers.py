"""The calls of other people's kernels in the kernel bench, against stand-ins of the documented signatures and result shapes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels import peers, torch_forms
from crop.ops import reference
from tests.support.operators import mass_inputs


def shares(query: Tensor, key: Tensor, lse: Tensor | None = None) -> Tensor:
    """(B, H, M, N); heads grouped or equal."""
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * query.shape[3] ** -0.5
    return logits.softmax(-1) if lse is None else torch.exp(logits - lse[..., None])


class Packages:
    """One function per package, with its argument names and the layout of its result."""

    @staticmethod
    def flash_colreduce(
        query: Tensor, key: Tensor, reduction: str, is_causal: bool = False, scale: Any = None
    ) -> Tensor:
        assert query.shape[1] == key.shape[1] and reduction == "mean"
        return shares(query, key).mean(2)

    @staticmethod
    def flash_attention(
        q: Tensor, k: Tensor, v: Tensor, causal: bool = False, sm_scale: Any = None,
        return_log_normalizer: bool = False, return_total_attention: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert q.shape[1] == k.shape[1]
        return None, None, shares(q, k).sum(2)

    @staticmethod
    def triton_score_sum(
        Q: Tensor, K: Tensor, LSE: Tensor, scale: float, n_kv_heads: int, group_size: int, causal_masking: bool = True
    ) -> Tensor:
        assert not causal_masking and scale == Q.shape[3] ** -0.5 and K.shape[2] == n_kv_heads
        part = shares(Q.transpose(1, 2), K.transpose(1, 2), LSE.transpose(1, 2) / peers.LOG2_E)
        return part.sum(2).unflatten(1, (n_kv_heads, group_size)).mean(2)

    @staticmethod
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool = False) -> tuple[Any, ...]:
        query, key = q.transpose(1, 2), k.transpose(1, 2)
        wide = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        return None, (query @ wide.mT * q.shape[3] ** -0.5).logsumexp(-1), None

    @staticmethod
    def top_k(
        input: Tensor, k: int, sorted: bool = False, deterministic: bool = False, tie_break: int = 0
    ) -> tuple[Tensor, Tensor]:
        values, index = input.topk(k)
        return values, index.int()

    @staticmethod
    def top_k_ragged_transform(
        input: Tensor, offsets: Tensor, lengths: Tensor, k: int, deterministic: bool = False
    ) -> Tensor:
        assert (lengths == input.shape[1]).all()
        return (input.topk(k).indices + offsets[:, None]).int()

    @staticmethod
    def fast_topk_v2(score: Tensor, lengths: Tensor, topk: int) -> Tensor:
        return score.topk(topk).indices.int()

    @staticmethod
    def index_first_axis(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor[index]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> str:
    name = "stand_in_for_peers"
    monkeypatch.setitem(sys.modules, name, Packages)
    monkeypatch.setattr(peers, "installed", lambda module: module == name)
    return name


def test_peers(stand_in: str) -> None:
    query, key = mass_inputs(2, 6, 2, 3, 50, 16)
    lse = (query @ torch_forms.repeated(query, key).mT * 0.25).logsumexp(-1)
    exact = reference.attention_mass(query, key, torch.arange(50).expand(2, 50))
    for function, *args in (
        (peers.flash_colreduce, query, key),
        (peers.flag_attn, query, key),
        (peers.keys_values, query, key, lse),
        (peers.flash_attn_then, query, key, torch_forms.mass_grouped),
    ):
        torch.testing.assert_close(peers.call(stand_in, function, *args)(), exact)
    for mass in (torch_forms.mass_rows, torch_forms.mass_grouped, torch_forms.mass_flash_lse):
        torch.testing.assert_close(mass(query, key), exact)

    score, zeros = torch.rand(3, 40), torch.zeros(3, dtype=torch.int32)
    for function, *args in (
        (peers.flashinfer, score, 7),
        (peers.flashinfer_ragged, score, 7, zeros, zeros + 40),
        (peers.sgl, score, 7, zeros + 40),
    ):
        assert torch.equal(peers.call(stand_in, function, *args)().long(), reference.select(score, 7))
    assert torch.equal(torch_forms.topk_sort(score, 7), torch_forms.stable_sort(score, 7))

    hidden, index = torch.randn(2, 9, 4), torch.tensor([[0, 3, 5], [1, 2, 8]])
    moved = peers.call(stand_in, peers.first_axis, hidden, index)()
    assert torch.equal(moved, reference.compact([hidden], index)[0])
    assert peers.call("absent_package", peers.first_axis, hidden, index) == "absent_package"
