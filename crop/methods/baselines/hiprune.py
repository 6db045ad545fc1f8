"""HiPrune: tokens that a middle layer of the vision tower attends to, their neighbours, and those of its last layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.methods.base import Assignment, FeaturePooling, Features
from crop.methods.baselines.tower import ByTowerAttention


def neighbours(layout: VisionLayout) -> Tensor:
    """(N, 4) int64 token above, below, left and right in the same view; the token itself where there is none."""
    places = list(zip(layout.view.tolist(), layout.row.tolist(), layout.col.tolist(), strict=True))
    number = {place: n for n, place in enumerate(places)}
    beside = ((-1, 0), (1, 0), (0, -1), (0, 1))
    return torch.tensor(
        [[number.get((view, row + down, col + right), n) for down, right in beside]
         for n, (view, row, col) in enumerate(places)]
    )  # fmt: skip


@dataclass(frozen=True)
class HiPrune(ByTowerAttention):
    """Keep anchors (most attended in a middle layer), buffers (beside an anchor) and registers (most attended at the end).

    A tenth of the budget is for anchors and their four neighbours, the rest for registers.

    Source: HiPrune (arXiv 2508.00553); layer 9 of CLIP's 24 as the middle one, here three eighths of any depth. Departures:
        what anchors' neighbours have in common goes to registers; a class token, where there is one, rates alone.
    """

    anchored: float = 0.1  # share of the budget for anchors and buffers, in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.anchored <= 1:
            raise ValueError(f"HiPrune: anchored must be in [0, 1], got {self.anchored}")

    def depths(self, feature: int) -> tuple[int, ...]:
        return round(feature * 3 / 8), feature

    def pool(self, layout: VisionLayout, count: int) -> FeaturePooling:
        def decide(features: Features, beside: Tensor) -> Assignment:
            return self._decide(features, count, beside)

        return FeaturePooling(count, len(layout), decide, (neighbours(layout),))

    def _decide(self, features: Features, count: int, beside: Tensor) -> Assignment:
        middle, last = features.observed.unbind(1)
        anchors = middle.argsort(descending=True, stable=True)[: int(count * self.anchored / 5)]
        # Anchors and buffers before all others, each group by the last layer's attention.
        tier = torch.zeros_like(last, dtype=torch.int64)
        tier.index_fill_(0, beside[anchors].flatten(), 1).index_fill_(0, anchors, 2)
        order = last.argsort(descending=True, stable=True)
        return Assignment.of_kept(order[tier[order].argsort(descending=True, stable=True)[:count]], len(last))
