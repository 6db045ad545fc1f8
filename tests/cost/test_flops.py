"""Estimated FLOPs against those that torch counts, for every family."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

import crop
from tests.support.batches import standard_batch
from tests.support.cases import families, patched, regions_of, where
from tests.support.tiny_families import FAMILIES, build_model, decoder_of, get_config

pytestmark = pytest.mark.usefixtures("one_thread")
aten = torch.ops.aten
PLC = crop.PreLLMCompression(keep=0.5)


def solved(matrix: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """A triangular system as the product with its inverse, by the convention of ``State.flops``."""
    batch = matrix[:-2].numel()
    return bmm_flop([batch, *matrix[-2:]], [batch, *right[-2:]])


def counted(model: Any, decoder: Any, inputs: dict[str, Any]) -> tuple[float, Any]:
    """FLOPs of the decoder layers as torch counts them, under a sliding window the share of the square that is seen; the
    cache that is left."""
    total, before = 0.0, {}
    products = (aten.bmm, aten.linalg_solve_triangular)

    def now() -> dict[Any, int]:
        return dict(counter.get_flop_counts().get("Global", {}))

    def enter(module: Any, args: tuple, kwargs: dict) -> None:
        before.clear()
        before.update(now(), share=1.0)

    def see(module: Any, args: tuple, kwargs: dict) -> None:
        if getattr(module, "is_sliding", getattr(module, "sliding_window", None)):
            seen = kwargs["attention_mask"][0, 0] == 0
            square = seen.shape[0] == seen.shape[1]  # else the last token alone asks
            before["share"] = float((seen | seen.T if square else seen).double().mean())

    def leave(*_: Any) -> None:
        nonlocal total
        spent = {op: flops - before.get(op, 0) for op, flops in now().items()}
        total += sum(flops * (before["share"] if op in products else 1) for op, flops in spent.items())

    with FlopCounterMode(display=False, custom_mapping={aten.linalg_solve_triangular: solved}) as counter:
        handles = []
        for layer in decoder.layers:
            handles += [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]
            if hasattr(layer, "self_attn"):
                handles.append(layer.self_attn.register_forward_pre_hook(see, with_kwargs=True))
        with torch.no_grad():
            cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values  # as generate() does
    for handle in handles:
        handle.remove()
    return total, cache


def held(cache: Any) -> int:
    """Bytes of all tensors that the layers of a cache hold."""
    names = ("keys", "values", "conv_states", "recurrent_states")
    parts = [getattr(layer, name, None) for layer in cache.layers for name in names]
    tensors = [tensor for part in parts for tensor in _tensors(part)]
    return sum(tensor.nbytes for tensor in tensors)


def _tensors(part: Any) -> list[torch.Tensor]:
    """transformers 5.24 keeps several states of a layer by number; a convolution has but one of the two."""
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else [part]
    return [one for one in parts if one is not None]


@functools.cache
def prepared(family: str, wide: bool = False) -> Any:
    """A model whose experts run one by one, which torch counts; ``wide``: no window is shorter than the prompt."""
    model = build_model(family, "eager")
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "eager"
        if wide and getattr(config, "sliding_window", None):
            config.sliding_window = 512
        if wide and getattr(module, "sliding_window", None):
            module.sliding_window = 512
    return model


def compared(family: str, method: crop.Method | None, wide: bool = False) -> tuple[float, float]:
    """Estimated over counted FLOPs, and over held bytes of the cache, of the first sample."""
    model, batch = prepared(family, wide), standard_batch(family, "single", 1)
    regions = regions_of(batch)
    estimate = crop.estimate(model, batch.inputs, method or PLC, regions, **where(batch))
    with patched(model, method, batch, regions):
        flops, cache = counted(model, decoder_of(family, model), batch.inputs)
    cost = estimate.after if method else estimate.before
    return cost.decoder_flops / flops, cost.kv_bytes / held(cache)


@families()
def test_unpruned(family: str) -> None:
    # Where images see themselves beyond a window, it must not be shorter than they are, as in no real checkpoint.
    wide = FAMILIES[family].mask == "image beyond windows"
    assert compared(family, None, wide) == pytest.approx((1, 1), abs=0.02)


@families()
def test_pruned(family: str) -> None:
    """After a cut a window lets less through than the estimate says, unless it is as long as the prompt."""
    method = crop.Compose(PLC, crop.InnerLLMPruning(0.25, layer=FAMILIES[family].cuts[-1]))
    wide = compared(family, method, wide=True)
    assert wide == pytest.approx((1, 1), abs=0.02)
    config = get_config(family).get_text_config()
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        assert min(compared(family, method)) > 0.98
