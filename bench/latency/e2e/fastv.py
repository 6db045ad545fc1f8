"""FastV as it is usually done: one layer in eager attention that returns its weights, tokens cut behind it.

Source: arXiv 2403.06764, from the paper: rank by the attention of the last row, averaged over the heads, cut behind layer 2.
Ours does the same without an attention matrix; this is here to show what the matrix costs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.latency.e2e.workload import Workload

LAYER = 2


class NotPlain(ValueError):
    """A family that the usual form does not serve."""


class FastV:
    """Statistics of the block: ``kept`` (batch, tokens) int64 positions in the prompt, ascending."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None


@contextmanager
def fastv(work: Workload, keep: float) -> Iterator[FastV]:
    """Prune every prefill of prompts of equal length, one picture each.

    Args:
        work: model and prompts; the vision tokens stand in one run, at the same place in every sample.
        keep: fraction of the vision tokens.
    Raises:
        NotPlain: a family that adds vision features behind the cut.
    """
    decoder = work.model.decoder
    if hasattr(decoder, "_deepstack_process"):
        raise NotPlain("the plain form knows nothing of vision features that are added behind the cut (DeepStack)")
    vision = torch.nonzero(work.inputs["input_ids"][0] == work.model.model.config.image_token_id).flatten()
    first, count, done = int(vision[0]), len(vision), FastV()
    scoring, attend = decoder.layers[LAYER - 1], decoder.layers[LAYER - 1].self_attn
    eager = copy.copy(attend.config)
    eager._attn_implementation_internal = "eager"
    weights: list[Tensor] = []

    def with_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        done.kept = done.kept if hidden.shape[1] == 1 else None
        length = hidden.shape[1]
        if length == 1:
            return None
        module.self_attn.config = eager
        mask = hidden.new_full((length, length), torch.finfo(hidden.dtype).min).triu(1)
        return args, kwargs | {"attention_mask": mask.expand(hidden.shape[0], 1, -1, -1)}

    def rank(module: nn.Module, args: tuple, output: Any) -> None:
        if module.config is not eager:
            return
        module.config = plain
        score = output[1].mean(1)[:, -1, first : first + count]
        top = score.topk(max(1, round(keep * count))).indices.sort(-1).values + first
        text = torch.cat([torch.arange(first), torch.arange(first + count, output[1].shape[-1])]).to(top.device)
        done.kept, weights[:] = top, [torch.cat([top, text.expand(len(top), -1)], 1).sort(-1).values]

    def cut(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == 1 or not weights:
            return None
        index = weights[0]
        if module is decoder.layers[LAYER]:
            hidden = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        tables = tuple(
            table.expand(len(index), -1, -1).gather(1, index.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
            for table in kwargs["position_embeddings"]
        )
        kwargs = kwargs | {"position_embeddings": tables, "position_ids": None}
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    plain = attend.config
    with ExitStack() as undo:
        undo.callback(scoring.register_forward_pre_hook(with_mask, with_kwargs=True).remove)
        undo.callback(attend.register_forward_hook(rank).remove)
        for layer in decoder.layers[LAYER:]:
            undo.callback(layer.register_forward_pre_hook(cut, with_kwargs=True).remove)
        undo.callback(setattr, attend, "config", plain)
        yield done
