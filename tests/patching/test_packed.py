"""Kept tokens have gaps in their position ids, which transformers takes for packed sequences: not inside a patch."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_flash_attention_utils import _is_packed_sequence

from tests.support.batches import make_batch, standard_batch
from tests.support.cases import METHODS, get_model, patched, regions_of
from tests.support.tiny_families import FAMILIES, decoder_of

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
FLASH = [family for family in FAMILIES if "flash_attention_2" in FAMILIES[family].attentions]


@matrix("cached", [True, False])
@matrix("name", list(METHODS))
@matrix("family", FLASH)
def test_every_argument_of_flash_attention(family, name, cached, flash):
    """One sample, neither padding nor mask: no layer may hand over sequence borders of its own making, and every length
    is that of the tokens which the layer holds."""
    model = get_model(family, "flash_attention_2")
    batch = make_batch(standard_batch(family, "none", 2).samples[:1], "none")
    inputs = {key: value for key, value in batch.inputs.items() if key != "attention_mask"}
    with patched(model, METHODS[name], batch, regions_of(batch)) as stats:
        flash.arguments.clear()
        model(**inputs, use_cache=cached)
    text = len(batch.samples[0].ids) - sum(stats.tokens_before)
    calls = [call for call in flash.arguments if call["causal"]]
    layers = [n for n, layer in enumerate(decoder_of(family, model).layers) if hasattr(layer, "self_attn")]
    for layer, call in zip(layers, calls, strict=True):
        length = text + sum(stats.tokens_from[max(first for first in stats.tokens_from if first <= layer)])
        if "cu_seqlens_q" in call:  # without a cache a mask keeps the gaps from being read: all of one sequence
            assert not cached
            for side in "qk":
                assert call[f"cu_seqlens_{side}"].tolist() == [0, length]
                assert int(call[f"max_seqlen_{side}"]) == length
        else:
            assert call["q"].shape[:2] == call["k"].shape[:2] == call["v"].shape[:2] == (1, length)
        assert call["window_size"] == (-1, -1) and not call["dropout_p"] and not call["softcap"]
    assert sum(stats.tokens_after_ilp) < sum(stats.tokens_before)


def test_gaps_are_what_transformers_looks_for():
    """The premise: were the ids of kept tokens handed over, they would be packed sequences."""
    assert _is_packed_sequence(torch.tensor([[0, 1, 5, 6, 9]]), 1)
    assert not _is_packed_sequence(torch.tensor([[0, 1, 2, 3, 4]]), 1)
