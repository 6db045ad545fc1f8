"""Intervals and tests for answers that come in pairs and in clusters: questions of one picture are not independent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS, LEVEL, POWER = 2000, 0.95, 0.8


def _cluster_sums(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """(clusters, k) sums of values (n, k)."""
    _, number = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((number.max(initial=-1) + 1, values.shape[1]))
    np.add.at(sums, number, values)
    return sums


def drawn_sums(values: np.ndarray, clusters: Sequence[str], seed: int = 0) -> np.ndarray:
    """Sums over bootstrap samples of whole clusters.

    Args:
        values: (n, k) of n questions. clusters: (n,) the picture of each.
    Returns:
        (DRAWS, k) float64; as many clusters are drawn with replacement as there are.
    Source: cluster bootstrap, Davison and Hinkley (1997), 3.8.
    """
    sums = _cluster_sums(values, clusters)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    return np.stack([sums[row].sum(0) for row in drawn])


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    return tuple(float(value) for value in np.nanpercentile(values, (tail, 100 - tail)))


def interval(scores: np.ndarray, base: np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """Percentile interval of the ratio of means of paired scores.

    Args:
        scores, base: (n,) of the same questions, pruned and unpruned. clusters: (n,) the picture of each.
    Returns:
        (low, high); NaN where the unpruned model scores nothing.
    """
    top, bottom = drawn_sums(np.stack([scores, base], 1), clusters).T
    return _percentiles(np.divide(top, bottom, out=np.full(DRAWS, np.nan), where=bottom > 0))


def difference_interval(ahead: np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """Percentile interval of the mean of paired differences (n,)."""
    sums, count = drawn_sums(np.stack([ahead, np.ones(len(ahead))], 1), clusters).T
    return _percentiles(sums / count)


def exact_test(ahead: np.ndarray, clusters: Sequence[str]) -> float:
    """Two-sided p-value that a picture is as likely to be ahead as behind; with one question each, McNemar's exact test.

    Args:
        ahead: (n,) paired differences. clusters: (n,) the picture of each; one whose differences add up to 0 says nothing.
    Source: McNemar (1947), exact binomial form; the sign test of whole clusters.
    """
    sums = _cluster_sums(ahead[:, None], clusters).round(9)
    wins, losses = int((sums > 0).sum()), int((sums < 0).sum())
    differ, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(differ, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**differ)


def questions_needed(ahead: np.ndarray, clusters: Sequence[str]) -> int | None:
    """Questions that would show a difference of this size at 5 % with a power of 80 %; None where there is none.

    Args:
        ahead: (n,) paired differences, of which only the sign counts. clusters: (n,) the picture of each; asked are as many
            questions of a picture as here.
    Source: Connor (1987), sample size for McNemar's test, times the design effect of Kish (1965), not below 1.
    """
    ahead = np.sign(ahead)
    wins, losses = float((ahead > 0).mean()), float((ahead < 0).mean())
    differ, gap = wins + losses, abs(wins - losses)
    if gap == 0:
        return None
    two_sided, power = 1.959964, 0.841621  # normal quantiles of 0.975 and of POWER
    needed = ((two_sided * math.sqrt(differ) + power * math.sqrt(differ - gap**2)) / gap) ** 2
    apart = ahead - ahead.mean()
    alone = (apart**2).sum()
    together = (_cluster_sums(apart[:, None], clusters) ** 2).sum()
    return math.ceil(needed * max(1.0, together / alone if alone else 1.0))
