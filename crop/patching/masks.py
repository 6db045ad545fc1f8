"""Attention masks that the multimodal model makes before the language model runs (bidirectional prefix or images,
sliding windows), over all tokens of the caller: each layer takes the rows and columns of the tokens it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crop.patching.cache import TokenMap
from crop.patching.state import look_up


def held(
    thinnings: Sequence[TokenMap | None], batch: int, past: int, added: int, queries: int, window: int | None
) -> tuple[Tensor, bool]:
    """The caller's positions of the keys that a layer's attention gets in this call.

    Args:
        thinnings: how the layer's slots came about, one after the other.
        past, added: the caller's tokens before and in this call.
        queries: slots of this call in the layer.
        window: sliding window of the layer; its cache holds one slot less.
    Returns:
        (batch, keys) int64, -1 = filler, the last ``queries`` of them those of this call; whether there is no filler.
    """
    columns, dense = torch.arange(past + added).expand(batch, -1), True
    for slots in thinnings:
        if slots is not None:
            index = slots.columns(columns.shape[1])
            columns = look_up(columns.to(index.device), index)
            dense = dense and slots.dense
    if window is not None:
        columns = columns[:, -(min(columns.shape[1] - queries, window - 1) + queries) :]
    return columns, dense


def fit_mask(mask: Tensor | None, keys: Tensor, dense: bool, queries: int, past: int, total: int) -> Tensor | None:
    """Rows and columns of a mask over all tokens: (batch, 1, queries, keys).

    Args:
        mask: (1 or batch, 1, tokens of this call, last of the ``total`` tokens) bool or additive; None: plain causal.
        keys, dense: as by ``held``.
        past, total: the caller's tokens before and after this call.
    """
    if mask is None:
        if dense:
            return None
        place = torch.arange(keys.shape[1], device=keys.device)
        return (keys >= 0)[:, None, None, :] & (place <= place[-queries:, None])
    keys = keys.to(mask.device)
    rows, columns = (keys[:, -queries:] - past).clamp(min=0), keys - (total - mask.shape[-1])
    real = ((keys >= 0) & (columns >= 0))[:, None, None, :]
    mask = mask.expand(len(keys), -1, -1, -1)
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns.clamp(min=0)[:, None, None, :].expand(-1, mask.shape[1], queries, -1))
    if mask.dtype == torch.bool:
        return mask & real
    return mask.masked_fill(~real, torch.finfo(mask.dtype).min)


def windows(config: Any) -> list[int | None]:
    """Sliding window of every decoder layer, None where it sees everything."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def refuse_prepared(model_type: str, config: Any, positions: str, uniform: bool) -> None:
    """What these families cannot do, or not with what was asked for."""
    if "flash" in (config._attn_implementation or ""):
        raise ValueError(
            f"patch: the attention implementation must be eager or sdpa for {model_type!r}, got "
            f"{config._attn_implementation!r}: flash attention cannot express its masks, with or without pruning"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"patch: attn_logit_softcapping must be None, got {config.attn_logit_softcapping} (Gemma 2 text model): the "
            "scores would not be the model's attention; use a family without"
        )
    if positions != "original" or uniform:
        got = f"positions={positions!r}" if positions != "original" else "cache='uniform'"
        raise ValueError(
            f"patch: {model_type!r}, whose masks are more than causal, needs positions='original' and cache='ragged', "
            f"got {got}"
        )


def refuse_short_sight(layers: Sequence[int], config: Any, total: int) -> None:
    """A sliding layer whose window is shorter than the prompt does not see what it would have to score.

    Args:
        layers: where cuts by score are.
        total: tokens, those of the cache included.
    """
    seen = windows(config)
    for layer in layers:
        window = seen[layer - 1]
        if window is not None and total > window:
            full = [number + 1 for number, width in enumerate(seen[:-1]) if width is None]
            raise ValueError(
                f"patch: layer must follow a layer that sees all {total} tokens, i.e. be one of {full}, got {layer}: "
                f"layer {layer - 1} scores and has a sliding window of {window}"
            )
