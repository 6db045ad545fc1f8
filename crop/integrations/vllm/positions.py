"""Position ids of pruned prompts, and how far they may reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crop.integrations.vllm.plans import PlaceholderPlan
from crop.patching.positions import Policy, close_gaps

LENGTHENED = ("default", "llama3", "linear")  # rotary embeddings whose rows do not depend on how many there are


@dataclass(frozen=True)
class UnprunedPrompt:
    """A prompt as it would be without pruning.

    Args:
        tokens: ids; within an image its first token's, repeated.
        starts: where each placeholder begins. lengths: of each.
        stays: (len(tokens),) bool, what the pruned prompt holds.
        images: which placeholders are pruned images.
    """

    tokens: list[int]
    starts: list[int]
    lengths: list[int]
    stays: Tensor
    images: list[int]

    @staticmethod
    def of(tokens: Sequence[int], placeholders: Sequence[tuple[int, int, PlaceholderPlan | None]]) -> UnprunedPrompt:
        """From a pruned prompt and its placeholders, ascending: (start, length, plan; None where it has none)."""
        full: list[int] = []
        stays: list[Tensor] = []
        starts, lengths, images, at = [], [], [], 0
        for number, (start, length, plan) in enumerate(placeholders):
            full += tokens[at:start]
            stays.append(torch.ones(start - at, dtype=torch.bool))
            starts.append(len(full))
            if plan is None or not plan.prunes:
                full += tokens[start : start + length]
                stays.append(torch.ones(length, dtype=torch.bool))
            else:
                full += [tokens[start]] * plan.full
                stays.append(torch.zeros(plan.full, dtype=torch.bool).index_fill(0, plan.places, True))
                images.append(number)
            lengths.append(len(full) - starts[-1])
            at = start + length
        full += tokens[at:]
        stays.append(torch.ones(len(tokens) - at, dtype=torch.bool))
        return UnprunedPrompt(full, starts, lengths, torch.cat(stays), images)

    def pruned_ids(self, ids: Tensor, delta: int, positions: Policy) -> tuple[Tensor, int]:
        """Ids of what stays, and what is to be added to the place of a later token in the pruned prompt.

        Args:
            ids: (axes, len(tokens)) int64 of the unpruned prompt. delta: the same for that.
            positions: "original" or "compact".
        """
        moved = 0
        if positions == "compact":
            spans = [(0, torch.arange(self.lengths[n]) + self.starts[n]) for n in self.images]
            closed, shift = close_gaps(ids.unsqueeze(1), self.stays.unsqueeze(0), spans)
            ids, moved = closed.squeeze(1), int(shift)
        lost = len(self.tokens) - int(self.stays.sum())
        return ids[:, self.stays].contiguous(), delta + lost - moved


def lengthen_rotary(config: Any, max_model_len: int) -> None:
    """Give a decoder's rotary table, which is read without a check, room for positions of prompts before pruning.

    Args:
        config: of the text model; its ``max_position_embeddings`` grows where rows of the table do not depend on it.
    """
    kinds = {rope.get("rope_type", "default") for rope in _ropes(config)}
    if kinds <= set(LENGTHENED) and not getattr(config, "dual_chunk_attention_config", None):
        config.max_position_embeddings = max(config.max_position_embeddings, 2 * max_model_len)


def check_reach(config: Any, max_model_len: int, lost: int) -> None:
    """Refuse a prompt whose answer could leave the rotary table: ValueError.

    Args:
        config: of the text model. lost: tokens that pruning took out of the prompt.
    """
    limit = config.max_position_embeddings
    for rope in _ropes(config):
        if "original_max_position_embeddings" in rope and rope.get("rope_type") not in LENGTHENED:
            limit = min(limit, int(rope["original_max_position_embeddings"] * rope.get("factor", 1.0)))
    _check_room(f"{limit} positions", limit, max_model_len, lost, ", or with positions='compact'")


def check_windows(windows: Sequence[int | None], max_model_len: int, lost: int) -> None:
    """Refuse a prompt whose answer could reach behind a sliding window, which counts the tokens that are left: ValueError.

    Args:
        windows: of every decoder layer, None where it sees everything. lost: tokens that pruning took out of the prompt.
    """
    limit = min((window for window in windows if window is not None), default=None)
    if limit is not None:
        _check_room(f"sliding window of {limit} tokens", limit, max_model_len, lost, "")


def _check_room(what: str, limit: int, max_model_len: int, lost: int, further: str) -> None:
    if lost + max_model_len > limit:
        raise ValueError(
            f"crop: tokens pruned from a prompt must be at most {max(limit - max_model_len, 0)}, what max_model_len="
            f"{max_model_len} leaves of the model's {what}, got {lost}; start the server with a smaller "
            f"--max-model-len{further}"
        )


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Its rotary embeddings: one, or one per kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return nested or [given]
