"""How likely each line of a page is to be (part of) the answer, and which lines to take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from crop.localizers.ocr.features import FEATURES, OUTLINE, Neighbours, outline
from crop.localizers.ocr.question import Question

WEIGHTS = Path(__file__).with_name("weights.json")
OTHER = "other"
STAGES = ("place", "first", "second")
SUPPORT = ("support", "between", "run on")


@dataclass(frozen=True)
class Weights:
    """Logistic regressions for every kind of answer: from the place of lines that are not read yet, and two in a row
    for lines that are, the second of which knows what the first found around a line.

    Args:
        place: kind -> (len(OUTLINE) + 1,) float64, the bias last; "other" serves all kinds that have none.
        first: kind -> (len(FEATURES) + 1,) float64.
        second: kind -> (len(FEATURES) + len(SUPPORT) + 1,) float64.
    Source: own choice; fitted by ``bench.localizers.fit_ocr`` on the development part of the receipts.
    """

    place: dict[str, np.ndarray]
    first: dict[str, np.ndarray]
    second: dict[str, np.ndarray]

    @staticmethod
    @cache
    def shipped() -> Weights:
        """Those of the package."""
        stored = json.loads(WEIGHTS.read_text(encoding="utf-8"))
        if tuple(stored["features"]) != OUTLINE + FEATURES:
            raise ValueError(f"Weights: weights.json must be fitted for {OUTLINE + FEATURES}, got {stored['features']}")
        return Weights(*({kind: np.array(row) for kind, row in stored[name].items()} for name in STAGES))

    def expect(self, question: Question, boxes: np.ndarray) -> np.ndarray:
        """(num_lines,) float64 probability of every line to answer, by place alone; boxes: (num_lines, 4), any unit."""
        return logistic(outline(boxes), self.place.get(question.kind.name, self.place[OTHER]))

    def rank(self, question: Question, table: np.ndarray, beside: Neighbours) -> np.ndarray:
        """(num_lines,) float64 probability of every line to hold the answer or a part of it, from its ``features``."""
        kind = question.kind.name
        found = logistic(table, self.first.get(kind, self.first[OTHER]))
        return logistic(with_support(table, found, beside), self.second.get(kind, self.second[OTHER]))


def logistic(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-(table @ weights + bias))), the bias last in ``weights``."""
    return 1 / (1 + np.exp(-np.clip(table @ weights[:-1] + weights[-1], -30, 30)))


def with_support(table: np.ndarray, found: np.ndarray, beside: Neighbours) -> np.ndarray:
    """The features, and the ``SUPPORT`` that each line gets from the probabilities of those directly above and below.

    It is the better of both; the worse, high inside a block; the best of those that the text runs on to or from.
    """
    over, on = beside.over, beside.over & beside.unfinished[:, None]
    above, below, joined = (np.where(side, found, 0).max(1, initial=0) for side in (over.T, over, on | on.T))
    support = np.stack([np.maximum(above, below), np.minimum(above, below), joined], 1)
    return np.concatenate([table, support], 1)


def choose(found: np.ndarray, area: np.ndarray, *, limit: float, tail: float, sure: float) -> list[int]:
    """Lines to take, the likeliest first; the first always.

    Args:
        found: (num_lines,) probabilities.
        area: (num_lines,) of the lines as they will be boxed, as fractions of the image.
        limit: area at which only ``sure`` lines are still taken.
        tail: lines below this share of the probability of all lines together (of 1, where that is less) are left.
        sure: probability of lines that are taken up to twice the limit.
    Source: own choice.
    """
    chosen: list[int] = []
    taken, least = 0.0, tail * max(found.sum(), 1.0)
    for line in np.argsort(-found, kind="stable").tolist():
        likely = found[line] >= least and taken + area[line] <= (2 * limit if found[line] >= sure else limit)
        if likely or not chosen:
            chosen.append(line)
            taken += area[line]
    return chosen
