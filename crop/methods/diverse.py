"""Pooling before the language model by region and features: the region first, of the rest what is least alike."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from crop import ops
from crop.geometry.layout import PATCH, VisionLayout
from crop.geometry.region import Region
from crop.methods.base import Assignment, FeaturePooling, Features, Method, PoolMode, budget_of, check_keep
from crop.ops.reference import spread_rounds

ROUNDS = 64  # of greedy choices at most, whatever their number
PAIRS = 4096  # tokens of which all pairs are compared at once: 64 MiB


@dataclass(frozen=True)
class DiverseCompression(Method):
    """Keep the region, and of everything else the tokens that are least alike; every other token joins its nearest.

    Tokens of the region stay as they are while they take no more than ``share`` of the budget; of a larger one, the most
    diverse do. The other places go to tokens of the rest, each as far as possible from all chosen before it, those of the
    region among them. What is not chosen is pooled into the nearest chosen token of its side of the region's border, by a
    mean that favours tokens unlike their image ("distinct").

    The number of tokens is known on the host, which ones is decided on the device; nothing waits for it. Distances are of
    cosines of the projected features in float32, of zeros and NaN 1; ties go to the smaller index. A region that is the whole
    image has no rest; a rest for which no place is left is dropped.

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
        count, budget = len(layout), budget_of("DiverseCompression", self.keep, layout)
        if budget == count:
            return None
        if region.is_whole:
            inside = np.ones(count, dtype=bool)
        else:
            inside = layout.inside(region).numpy() & (layout.kind.numpy() == PATCH)
        size, most = np.count_nonzero(inside), max(1, int(self.share * budget))
        # What the rest cannot use goes back to the region.
        first = max(min(size, most), budget - (count - size))
        sides = [(inside, first), (~inside, budget - first)]
        places = [(members.nonzero()[0], leading) for members, leading in sides if leading]
        counts = [(len(own), leading) for own, leading in places]

        def decide(features: Features, order: Tensor) -> Assignment:
            return _decide(features.tokens, order, counts)

        return FeaturePooling(budget, count, decide, (torch.from_numpy(np.concatenate([own for own, _ in places])),))


def _decide(tokens: Tensor, order: Tensor, counts: list[tuple[int, int]]) -> Assignment:
    """Leaders of every side, and whom each token joins.

    Args:
        tokens: (N, dim). order: (M,) int64 tokens, those of a side one after the other.
        counts: of every side, its tokens and how many of them lead.
    """
    rows = torch.nn.functional.normalize(tokens[order].float(), dim=-1).nan_to_num()
    sizes = [size for size, _ in counts]
    others, leaders, leader_of = rows[:0], [], []
    for own, names, (_, count) in zip(rows.split(sizes), order.split(sizes), counts, strict=True):
        if count < len(own):
            chosen, nearest = spread(own, others, count)
            own, names = own[chosen], names[chosen]
            leader_of.append(names[nearest].scatter(0, chosen, names))
        else:
            leader_of.append(names)
        others = own
        leaders.append(names)
    every = order.new_full((len(tokens),), -1).scatter(0, order, torch.cat(leader_of))
    return Assignment.of_leaders(every, torch.cat(leaders))


def spread(rows: Tensor, others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows that are each as far as possible from ``others`` and from those chosen before it, by at most ``ROUNDS`` rounds.

    Of a round the farthest are chosen, which do not know of each other. Without others, the first round is measured from the
    mean of the rows. Ties: the smaller index.

    Args:
        rows: (N, dim) float32 of length 1, N >= count. others: (M, dim) likewise.
    Returns:
        (count,) int64 rows in the order of choice; (N,) int64 which of them each row is nearest to.
    """
    near = (rows @ others.T).amax(1) if len(others) else rows @ rows.sum(0)
    at_once, fresh = ceil(count / ROUNDS), not len(others)
    if len(rows) <= PAIRS:
        alike = rows @ rows.T
        chosen = ops.spread(alike, near, count, at_once, fresh=fresh)
        alike = alike[:, chosen]
    else:
        chosen = spread_rounds(lambda best: rows[best] @ rows.T, near, count, at_once, fresh)
        alike = rows @ rows[chosen].T
    return chosen, alike.argmax(1)
