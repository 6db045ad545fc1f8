"""VisPruner: half of the tokens by the tower's attention, half by removing duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crop.methods.base import Assignment, Features
from crop.methods.baselines.budget import unit
from crop.methods.baselines.tower import ByTowerAttention

AT_ONCE = 8  # tokens removed in a round


@dataclass(frozen=True)
class VisPruner(ByTowerAttention):
    """Keep what the vision tower attends to most, and of the others those that are least alike.

    Of the others, those at even places are compared with those at odd ones, and the even ones that are most like an odd one
    leave, eight in a round.

    Source: VisPruner (arXiv 2412.01818). Departures: projected features; reading order is kept between rounds; towers
        without a class token by mean attention.
    """

    important: float = 0.5  # share of the kept tokens that is chosen by attention, in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"VisPruner: important must be in [0, 1], got {self.important}")

    def decide(self, features: Features, count: int) -> Assignment:
        rows = unit(features.tokens)
        order = features.observed.argsort(descending=True, stable=True)
        seen = int(count * self.important)
        rest = order[seen:].sort().values
        while len(rest) > count - seen:
            alike = (rows[rest[::2]] @ rows[rest[1::2]].T).amax(1) if len(rest) > 1 else rows.new_zeros(1)
            leave = min(AT_ONCE, len(rest) - (count - seen), len(alike))
            even = alike.argsort(descending=True, stable=True)[leave:]
            rest = torch.cat([rest[::2][even], rest[1::2]]).sort().values
        return Assignment.of_kept(torch.cat([order[:seen], rest]), len(rows))
