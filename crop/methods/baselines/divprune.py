"""DivPrune: the most diverse tokens stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crop.methods.base import Assignment, Features
from crop.methods.baselines.budget import ByFeatures, unit


@dataclass(frozen=True)
class DivPrune(ByFeatures):
    """Keep the most diverse tokens: each next one is the farthest from those chosen.

    Source: DivPrune (arXiv 2503.02175), greedy max-min of cosine distance; the first is the token farthest from its
        nearest neighbour.
    """

    def decide(self, features: Features, count: int) -> Assignment:
        rows = unit(features.tokens)
        apart = 1 - rows @ rows.T
        free = apart.clone().fill_diagonal_(torch.inf).amin(1)
        chosen = torch.empty(count, dtype=torch.int64, device=rows.device)
        for step in range(count):
            best = free.argmax().unsqueeze(0)
            chosen[step : step + 1] = best
            row = apart.index_select(0, best).squeeze(0)
            # The first choice is judged by its neighbours, later ones by those chosen.
            free = (row if step == 0 else torch.minimum(free, row)).index_fill(0, chosen[: step + 1], -torch.inf)
        return Assignment.of_kept(chosen, len(rows))
