"""VisionZip: what the vision tower attends to stays, the rest is merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crop.methods.base import Assignment, Features
from crop.methods.baselines.budget import unit
from crop.methods.baselines.tower import ByTowerAttention


@dataclass(frozen=True)
class VisionZip(ByTowerAttention):
    """Keep the tokens that the vision tower attends to most, and merge the rest into a few contextual ones.

    Contextual tokens are spread evenly over the rest in reading order; every other token joins the most similar one.

    Source: VisionZip (arXiv 2412.04467), training-free. Departures: similarity of projected features, not of the
        tower's keys; the share is 10 of 64 at every budget; a tower without a class token ranks by the mean attention
        over all its tokens.
    """

    contextual: float = 10 / 64  # share of the kept tokens that are contextual, in [0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise ValueError(f"VisionZip: contextual must be in [0, 1), got {self.contextual}")

    def decide(self, features: Features, count: int) -> Assignment:
        size, device = len(features.tokens), features.tokens.device
        few = int(count * self.contextual)
        dominant = features.observed.argsort(descending=True, stable=True)[: count - few]
        if few == 0:
            return Assignment.of_kept(dominant, size)
        taken = torch.zeros(size, dtype=torch.uint8, device=device).index_fill_(0, dominant, 1)
        rest = taken.argsort(stable=True)[: size - len(dominant)]
        target = rest[torch.arange(few, device=device) * (len(rest) // few)]
        rows = unit(features.tokens)
        nearest = target[(rows[rest] @ rows[target].T).argmax(1)]
        leader_of = torch.arange(size, device=device).scatter(0, rest, nearest).scatter(0, target, target)
        return Assignment.of_leaders(leader_of, torch.cat([dominant, target]))
