"""Pooling before the language model by region and features: the region first, of the rest what is least alike."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from crop.geometry.layout import PATCH, VisionLayout
from crop.geometry.region import Region
from crop.methods.base import Assignment, FeaturePooling, Method, PoolMode, budget_of, check_keep

ROUNDS = 64  # of greedy choices at most, whatever their number: each costs a few operations on all tokens


@dataclass(frozen=True)
class DiverseCompression(Method):
    """Keep the region, and of everything else the tokens that are least alike; every other token joins its nearest.

    Tokens of the region stay as they are while they take no more than ``share`` of the budget; of a larger one, the most
    diverse do. The other places go to tokens of the rest, each as far as possible from all chosen before it, those of the
    region among them. What is not chosen is pooled into the nearest chosen token of its side of the region's border, by a
    mean that favours tokens unlike their image ("distinct").

    The number of tokens is known on the host, which ones is decided on the device. Distances are of cosines of the projected
    features in float32, of zeros and NaN 1; ties go to the smaller index. A region that is the whole image has no rest; a
    rest for which no place is left is dropped.

    Args:
        keep: float in (0, 1] (fraction of the image's tokens) or int >= 1 (tokens).
        share: of the budget that a region may take at most, in (0, 1].
    Raises:
        ValueError, TypeError: an argument out of its range.
    Source: own choice, in the place of CROP's learned queries (arXiv 2505.21233); greedy max-min choice as in DivPrune
        (arXiv 2503.02175), whose tokens know no region and are not pooled.
    """

    keep: float | int = 0.11
    share: float = 0.75

    def __post_init__(self) -> None:
        check_keep("DiverseCompression", self.keep)
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)):
            raise TypeError(f"DiverseCompression: share must be a number in (0, 1], got {self.share!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"DiverseCompression: share must be in (0, 1], got {self.share}")

    @property
    def pool_mode(self) -> PoolMode:
        return "distinct"

    def plan(self, layout: VisionLayout, region: Region) -> FeaturePooling | None:
        """Pooling of one image; None if all tokens stay.

        Raises:
            ValueError: ``keep`` is a token count larger than the image has.
        """
        budget = budget_of("DiverseCompression", self.keep, layout)
        if budget == len(layout):
            return None
        inside = layout.inside(region) & (layout.kind == PATCH)
        if region.is_whole:
            inside = torch.ones_like(inside)
        size, most = int(inside.sum()), max(1, int(self.share * budget))
        # What the rest cannot use goes back to the region.
        first = max(min(size, most), budget - (len(layout) - size))
        sides = [(inside, first), (~inside, budget - first)]
        return FeaturePooling(budget, len(layout), lambda features: _decide(features.tokens, sides))


def _decide(tokens: Tensor, sides: list[tuple[Tensor, int]]) -> Assignment:
    """Leaders of every side, one side after the other, and whom each token joins."""
    rows = torch.nn.functional.normalize(tokens.float(), dim=-1).nan_to_num()
    chosen, leader_of = rows.new_empty(0, dtype=torch.int64), torch.full((len(rows),), -1, device=rows.device)
    for members, count in sides:
        if count == 0:
            continue
        own = members.nonzero().squeeze(1).to(rows.device, non_blocking=True)  # on the host: sizes are known
        leaders = own if count == len(own) else own[spread(rows[own], rows[chosen], count)]
        nearest = (rows[own] @ rows[leaders].T).argmax(1)
        leader_of[own] = leaders[nearest]
        leader_of[leaders] = leaders
        chosen = torch.cat([chosen, leaders])
    return Assignment.of_leaders(leader_of, chosen)


def spread(rows: Tensor, others: Tensor, count: int) -> Tensor:
    """(count,) int64 rows, each as far as possible from ``others`` and from those chosen before it.

    At most ``ROUNDS`` rounds; of each, the farthest ones, which do not know of each other. Without others, the first round is
    measured from the mean of the rows. Ties: the smaller index.

    Args:
        rows: (N, dim) float32 of length 1, N >= count. others: (M, dim) likewise.
    """
    near = (rows @ others.T).amax(1) if len(others) else rows @ rows.sum(0)
    chosen, at_once = [], ceil(count / ROUNDS)
    for start in range(0, count, at_once):
        best = _smallest(near, min(at_once, count - start))
        alike = (rows @ rows[best].T).amax(1)
        near = alike if start == 0 and not len(others) else torch.maximum(near, alike)
        chosen.append(best)
        near = near.index_fill(0, torch.cat(chosen), torch.inf)
    return torch.cat(chosen)


def _smallest(values: Tensor, count: int) -> Tensor:
    return values.argmin().unsqueeze(0) if count == 1 else values.argsort(stable=True)[:count]
