"""Scores of one answer, each in [0, 1]."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

Box = tuple[float, float, float, float]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation.replace(".", ""))


def normal(text: str) -> str:
    """Lower case without articles, punctuation (a point between digits stays) and superfluous blanks."""
    text = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text).split())


def verbatim(answer: str, truths: Sequence[str]) -> float:
    """Equal to one of the truths, letter by letter: for models that answer in the words of their pictures."""
    return float(answer in truths)


def exact(answer: str, truths: Sequence[str]) -> float:
    """Equal to one of the truths after ``normal``."""
    return float(normal(answer) in map(normal, truths))


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(other) + 1))
    for number, left in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for column, right in enumerate(other, 1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(answer: str, truths: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity: ``1 - distance / length``, below one half 0; the best of the truths.

    Source: Biten et al. (arXiv 1905.13648).
    """
    best = 0.0
    given = " ".join(answer.lower().split())
    for truth in truths:
        wanted = " ".join(truth.lower().split())
        length = max(len(given), len(wanted))
        best = max(best, 1 - edit_distance(given, wanted) / length if length else 1.0)
    return best if best >= 0.5 else 0.0


def _number(text: str) -> float | None:
    cleaned = text.strip().lower().replace(",", "").lstrip("$€£").removeprefix("rm").strip()
    percent = cleaned.endswith("%")
    try:
        return float(cleaned.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        return None


def relaxed(answer: str, truths: Sequence[str]) -> float:
    """Numbers within 5 % of the truth, anything else as in ``exact``.

    Source: relaxed accuracy of ChartQA (arXiv 2203.10244).
    """
    value = _number(answer)
    for truth in truths:
        wanted = _number(truth)
        if value is None or wanted is None:
            if exact(answer, [truth]):
                return 1.0
        elif abs(value - wanted) <= 0.05 * abs(wanted):
            return 1.0
    return 0.0


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - both
    return both / area if area > 0 else 0.0


def parse_box(answer: str) -> Box | None:
    """A box that an answer names: four numbers, normalised, or in thousandths where any exceeds 1; None: no such.

    Raises nothing: a model may say anything.
    """
    found = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", answer)]
    if len(found) != 4:
        return None
    if max(found) > 1:
        found = [number / 1000 for number in found]
    x0, y0, x1, y1 = found
    return (x0, y0, x1, y1) if x0 < x1 <= 1 and y0 < y1 <= 1 else None


TEXT_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "verbatim": verbatim,
    "exact": exact,
    "anls": anls,
    "relaxed": relaxed,
}
