"""ToMe: the most similar tokens are merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crop.methods.base import Assignment, Features
from crop.methods.baselines.budget import ByFeatures, unit


@dataclass(frozen=True)
class TokenMerging(ByFeatures):
    """Merge the most similar pairs of tokens, round by round, until the budget is met.

    In a round every other token proposes to the most similar token of the other half; the best proposals merge.

    Source: ToMe (arXiv 2210.09461), bipartite soft matching with averages weighted by size. Departures: all rounds take
        place once, after the projector, on projected features, and a round merges as many as it can.
    """

    def decide(self, features: Features, count: int) -> Assignment:
        rows, device = features.tokens.float(), features.tokens.device
        size = torch.ones(len(rows), 1, device=device)
        leader = torch.arange(len(rows), device=device)
        group = leader  # of every original token
        while (now := len(rows)) > count:
            fewer = min(now - count, now // 2)
            rows_unit = unit(rows)
            best, partner = (rows_unit[0::2] @ rows_unit[1::2].T)[:, : now // 2].max(1)
            order = best.argsort(descending=True, stable=True)
            source, target = 2 * order[:fewer], 2 * partner[order[:fewer]] + 1
            total = (rows * size).index_add(0, target, (rows * size)[source])
            size = size.index_add(0, target, size[source])
            goes = torch.zeros(now, dtype=torch.int64, device=device).index_fill_(0, source, 1)
            stays = goes.argsort(stable=True)[: now - fewer]
            place = ((1 - goes).cumsum(0) - 1).scatter(0, source, ((1 - goes).cumsum(0) - 1)[target])
            rows, size, leader, group = total[stays] / size[stays], size[stays], leader[stays], place[group]
        return Assignment(group, leader)
