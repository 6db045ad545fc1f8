"""Published methods that choose or merge tokens before the language model by what the tokens hold.

All compare projected features by cosine in float32. Greedy choices take one step per kept token, each a few operations
on whole vectors; nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods.base import Assignment, FeaturePooling, Features, Method, budget_alone, budget_of, check_keep


@dataclass(frozen=True)
class _ByFeatures(Method):
    keep: float | int = 0.11

    def __post_init__(self) -> None:
        check_keep(type(self).__name__, self.keep)

    def plan(self, layout: VisionLayout, region: Region) -> FeaturePooling | None:
        """Promise of the count; None if all tokens stay. Raises ValueError for a count beyond the image's."""
        count = budget_of(type(self).__name__, self.keep, layout)
        if count == len(layout):
            return None
        return FeaturePooling(count, len(layout), lambda features: self._decide(features, count))

    def least(self, tokens: int) -> dict[int, int]:
        """The budget."""
        return {0: budget_alone(self.keep, tokens)}

    def _decide(self, features: Features, count: int) -> Assignment:
        raise NotImplementedError


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1)


@dataclass(frozen=True)
class VisionZip(_ByFeatures):
    """Keep the tokens that the vision tower attends to most, and merge the rest into a few contextual ones.

    Contextual tokens are spread evenly over the rest in reading order; every other token joins the most similar one.

    Args:
        keep: fraction in (0, 1] or count. contextual: share of the kept tokens that are contextual, in [0, 1).
    Source: VisionZip (arXiv 2412.04467), training-free. Departures: similarity of projected features, not of the
        tower's keys; the share is 10 of 64 at every budget; a tower without a class token ranks by the mean attention
        over all its tokens.
    """

    salience = True
    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise ValueError(f"VisionZip: contextual must be in [0, 1), got {self.contextual}")

    def _decide(self, features: Features, count: int) -> Assignment:
        size, device = len(features.tokens), features.tokens.device
        few = int(count * self.contextual)
        dominant = features.salience.argsort(descending=True, stable=True)[: count - few]
        if few == 0:
            return Assignment.of_kept(dominant, size)
        taken = torch.zeros(size, dtype=torch.uint8, device=device).index_fill_(0, dominant, 1)
        rest = taken.argsort(stable=True)[: size - len(dominant)]
        target = rest[torch.arange(few, device=device) * (len(rest) // few)]
        rows = _unit(features.tokens)
        nearest = target[(rows[rest] @ rows[target].T).argmax(1)]
        leader_of = torch.arange(size, device=device).scatter(0, rest, nearest).scatter(0, target, target)
        return Assignment.of_leaders(leader_of, torch.cat([dominant, target]))


@dataclass(frozen=True)
class DivPrune(_ByFeatures):
    """Keep the most diverse tokens: each next one is the farthest from those chosen.

    Args:
        keep: fraction in (0, 1] or count.
    Source: DivPrune (arXiv 2503.02175), greedy max-min of cosine distance; the first is the token farthest from its
        nearest neighbour.
    """

    def _decide(self, features: Features, count: int) -> Assignment:
        rows = _unit(features.tokens)
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


@dataclass(frozen=True)
class CDPruner(_ByFeatures):
    """Keep tokens that are diverse and relevant to the question: a determinantal point process conditioned on the text.

    The kernel is ``diag(r) S diag(r)`` with cosine similarity S and relevance r; greedy MAP.

    Args:
        keep: fraction in (0, 1] or count.
    Source: CDPruner (arXiv 2506.10967); greedy MAP by incremental Cholesky (arXiv 1709.05135). Departure: relevance is
        the cosine between a token and the mean embedding of the text after the image, scaled to [0, 1], where the paper
        has a CLIP text encoder.
    """

    def _decide(self, features: Features, count: int) -> Assignment:
        rows = _unit(features.tokens)
        relevance = rows @ _unit(features.text.float().mean(0))
        low, high = relevance.aminmax()
        relevance = (relevance - low) / (high - low).clamp(min=1e-6)
        kernel = relevance[:, None] * (rows @ rows.T) * relevance
        gain = kernel.diagonal().clone()
        factor = rows.new_zeros(count, len(rows))
        chosen = torch.empty(count, dtype=torch.int64, device=rows.device)
        for step in range(count):
            best = gain.argmax().unsqueeze(0)
            chosen[step : step + 1] = best
            # Beyond the rank of the kernel nothing is gained any more; the floor keeps that finite.
            scale = gain.index_select(0, best).clamp(min=1e-9).sqrt()
            known = factor[:step].index_select(1, best).squeeze(1) @ factor[:step]
            factor[step] = (kernel.index_select(0, best).squeeze(0) - known) / scale
            gain = (gain - factor[step] ** 2).clamp(min=0).index_fill(0, chosen[: step + 1], -torch.inf)
        return Assignment.of_kept(chosen, len(rows))


@dataclass(frozen=True)
class TokenMerging(_ByFeatures):
    """Merge the most similar pairs of tokens, round by round, until the budget is met.

    In a round every other token proposes to the most similar token of the other half; the best proposals merge.

    Args:
        keep: fraction in (0, 1] or count.
    Source: ToMe (arXiv 2210.09461), bipartite soft matching with averages weighted by size. Departures: all rounds take
        place once, after the projector, on projected features, and a round merges as many as it can.
    """

    def _decide(self, features: Features, count: int) -> Assignment:
        rows, device = features.tokens.float(), features.tokens.device
        size = torch.ones(len(rows), 1, device=device)
        leader = torch.arange(len(rows), device=device)
        group = leader  # of every original token
        while (now := len(rows)) > count:
            fewer = min(now - count, now // 2)
            unit = _unit(rows)
            best, partner = (unit[0::2] @ unit[1::2].T)[:, : now // 2].max(1)
            order = best.argsort(descending=True, stable=True)
            source, target = 2 * order[:fewer], 2 * partner[order[:fewer]] + 1
            total = (rows * size).index_add(0, target, (rows * size)[source])
            size = size.index_add(0, target, size[source])
            goes = torch.zeros(now, dtype=torch.int64, device=device).index_fill_(0, source, 1)
            stays = goes.argsort(stable=True)[: now - fewer]
            place = ((1 - goes).cumsum(0) - 1).scatter(0, source, ((1 - goes).cumsum(0) - 1)[target])
            rows, size, leader, group = total[stays] / size[stays], size[stays], leader[stays], place[group]
        return Assignment(group, leader)
