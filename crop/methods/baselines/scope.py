"""SCOPE: tokens that the vision tower attends to and that cover what is not covered yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crop.methods.base import Assignment, Features
from crop.methods.baselines.budget import unit
from crop.methods.baselines.tower import ByTowerAttention


@dataclass(frozen=True)
class Scope(ByTowerAttention):
    """Greedy: the next token is the one whose gain of coverage, times its saliency, is largest.

    The coverage of a token is its highest cosine similarity to a kept one, at least 0; the gain of a candidate is what it
    adds to the sum over all tokens; saliency is the attention it receives in the vision tower.

    Source: SCOPE (arXiv 2510.24214), exponent 1. Departures: similarity of projected features; a kept token does not go on
        to be covered; towers without a class token by mean attention.
    """

    def decide(self, features: Features, count: int) -> Assignment:
        rows = unit(features.tokens)
        alike, saliency = rows @ rows.T, features.observed.float()
        covered = rows.new_zeros(len(rows))
        chosen = torch.empty(count, dtype=torch.int64, device=rows.device)
        for step in range(count):
            gain = (alike - covered).clamp(min=0).sum(1) * saliency
            best = gain.index_fill(0, chosen[:step], -torch.inf).argmax().unsqueeze(0)
            chosen[step : step + 1] = best
            covered = torch.maximum(covered, alike.index_select(0, best).squeeze(0))
        return Assignment.of_kept(chosen, len(rows))
