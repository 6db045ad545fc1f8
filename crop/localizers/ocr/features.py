"""What is known of every line of a page with regard to a question, as numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from crop.localizers.ocr.question import Question, alike, words_of

FEATURES = (
    "meaning", "label meaning", "words", "label exact", "own label", "value", "value of label", "example", "digits", "first",
    "top", "height", "largest", "size", "repeated",
)  # fmt: skip
PLACES = tuple(place / 10 for place in range(11))
OUTLINE = ("width", "left", "right", "height", "off centre", "first", "early", *(f"at {place}" for place in PLACES))
_AMOUNT = re.compile(r"\d[\d ,.']*[.,]\s?\d{2}(?!\d)")


@dataclass(frozen=True)
class Neighbours:
    """Which lines stand beside which; -1 where none does.

    Args:
        left: (num_lines,) int64 nearest line with letters to the left in the same row: the label of a value.
        above: (num_lines,) int64 nearest line with letters above in the same column, not far.
        over: (num_lines, num_lines) bool the first line stands directly above the second, as in a block of text.
        unfinished: (num_lines,) bool lines that end as if they went on below, with a comma, say.
    """

    left: np.ndarray
    above: np.ndarray
    over: np.ndarray
    unfinished: np.ndarray

    @property
    def near(self) -> np.ndarray:
        """(num_lines, num_lines) bool directly above or below each other."""
        return self.over | self.over.T


def neighbours(boxes: np.ndarray, texts: list[str]) -> Neighbours:
    """Labels and blocks of a page, from boxes (num_lines, 4) x0, y0, x1, y1 of its lines, any unit, and their texts."""
    count = len(boxes)
    x0, y0, x1, y1 = boxes.T
    height = y1 - y0
    least = np.minimum(height[:, None], height)
    level = same_row(boxes)
    same_column = np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0) > 0
    lettered = np.array([_letters(text) >= 0.5 for text in texts], dtype=bool).reshape(count)
    gap = y0[:, None] - y1  # from the lower line (row) up to the upper (column)
    before = level & lettered & ((x0 + x1)[:, None] > x0 + x1) & ~np.eye(count, dtype=bool)
    left = _nearest(np.where(before, x0[:, None] - x1, np.inf))
    upper = same_column & ~level & lettered & ((y0 + y1)[:, None] > y0 + y1) & (gap < 2 * height[:, None])
    above = _nearest(np.where(upper, gap, np.inf))
    near = same_column & ~level & (np.maximum(gap, gap.T) < 1.0 * least)
    unfinished = np.array([text.rstrip().endswith((",", "-", "&", "/")) for text in texts], dtype=bool).reshape(count)
    return Neighbours(left, above, near & ((y0 + y1)[:, None] < y0 + y1), unfinished)


def same_row(boxes: np.ndarray) -> np.ndarray:
    """(num_lines, num_lines) bool: pairs of lines that share more than half of the height of the lower one."""
    _, y0, _, y1 = boxes.T
    height = y1 - y0
    return np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0) > 0.5 * np.minimum(height[:, None], height)


def _nearest(distance: np.ndarray) -> np.ndarray:
    if not distance.size:
        return np.zeros(len(distance), dtype=np.int64)
    index = distance.argmin(1)
    return np.where(np.isfinite(distance.min(1)), index, -1)


def _letters(text: str) -> float:
    """Share of letters among letters and digits."""
    letters, digits = sum(map(str.isalpha, text)), sum(map(str.isdigit, text))
    return letters / max(letters + digits, 1)


def amounts_of(text: str) -> list[float]:
    """Numbers with two decimals in a text."""
    return [int(re.sub(r"\D", "", match)) / 100 for match in _AMOUNT.findall(text)]


def outline(boxes: np.ndarray) -> np.ndarray:
    """(num_lines, len(OUTLINE)) float64: what is known of lines that nobody has read yet, their place and size.

    All figures are relative to what the lines, (num_lines, 4) in any unit, cover together. Source: own choice.
    """
    if not len(boxes):
        return np.zeros((0, len(OUTLINE)))
    x0, y0, x1, y1 = boxes.T
    left, right = ((side - x0.min()) / (x1.max() - x0.min()) for side in (x0, x1))
    height, rank = y1 - y0, np.argsort(np.argsort(y0, kind="stable"), kind="stable")
    place = ((y0 + y1) / 2 - y0.min()) / (y1.max() - y0.min())
    tall = np.clip(height / np.median(height), 0, 3)
    shape = [right - left, left, right, tall, abs(left + right - 1), 1 / (1 + rank), np.exp(-rank / 8)]
    return np.stack([*shape, *(np.exp(-(((place - there) / 0.08) ** 2)) for there in PLACES)], 1)


def features(
    question: Question,
    boxes: np.ndarray,
    texts: list[str],
    beside: Neighbours,
    asked: np.ndarray,
    meanings: np.ndarray,
    examples: np.ndarray,
) -> np.ndarray:
    """(num_lines, len(FEATURES)) float64, each of the order of 1.

    Args:
        boxes: (num_lines, 4) in sides of the image. texts: what the lines say. beside: their ``neighbours``.
        asked: (width,) embedding of the question.
        meanings: (num_lines, width) embeddings of the lines.
        examples: (num_examples, width) embeddings of ``question.kind.examples``.
    Source: own choice.
    """
    count = len(boxes)
    found = dict.fromkeys(FEATURES, np.zeros(count))
    if not count:
        return np.zeros((0, len(FEATURES)))
    y0, y1 = boxes[:, 1], boxes[:, 3]
    height = y1 - y0

    def of_label(values: np.ndarray) -> np.ndarray:
        """The better of both labels' values, the one above at a discount."""
        left = np.where(beside.left >= 0, values[beside.left], 0)
        above = np.where(beside.above >= 0, values[beside.above], 0)
        return np.maximum(left, 0.8 * above)

    found["meaning"] = meanings @ asked
    found["label meaning"] = of_label(found["meaning"])
    lines = [words_of(text) for text in texts]
    recall, precision = _overlap(question.words, lines)
    found["words"] = recall
    found["label exact"] = of_label(recall * precision)
    value = np.array([bool(question.kind.value.search(text)) for text in texts], dtype=float)
    found["value"] = value
    found["own label"] = value * recall
    found["value of label"] = value * of_label(recall)
    if len(examples):
        found["example"] = (meanings @ examples.T).max(1)
    found["digits"] = np.array([1 - _letters(text) for text in texts])
    order = np.argsort(np.argsort(y0, kind="stable"), kind="stable")
    wordy = np.array([sum(map(str.isalpha, text)) >= 4 for text in texts])
    rank = np.array([(wordy & (order < place)).sum() for place in order])
    found["first"] = wordy / (1 + rank)
    found["top"] = np.exp(-4 * ((y0 + y1) / 2 - y0.min()) / (y1.max() - y0.min()))
    found["height"] = np.clip(height / np.median(height), 0, 3) - 1
    sums = [amounts_of(text) for text in texts]
    largest = np.array([max(values, default=0.0) for values in sums])
    if largest.any():
        paid = np.where(largest < 1e6, largest, 0)
        found["size"] = np.log1p(paid) / max(np.log1p(paid.max()), 1e-9)
        found["largest"] = (paid == paid.max()).astype(float) * (paid > 0)
        same = np.array([sum(bool(set(a) & set(b)) for b in sums) for a in sums])
        found["repeated"] = np.minimum(np.maximum(same - 1, 0), 3) / 3
    return np.stack([found[name] for name in FEATURES], 1)


def _overlap(wanted: tuple[str, ...], lines: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Share of the question's words that a line has, and of a line's words that the question has, rare words count more."""
    recall, precision = np.zeros(len(lines)), np.zeros(len(lines))
    if not wanted:
        return recall, precision
    match = np.zeros((len(wanted), len(lines)))
    for column, words in enumerate(lines):
        if words:
            table = np.array([[alike(one, other) for other in words] for one in wanted])
            match[:, column] = table.max(1)
            precision[column] = table.max(0).mean()
    weight = 1 / (1 + match.sum(1))
    weight = np.where(match.any(1), weight, weight.min()) if match.any() else weight
    return weight @ match / weight.sum(), precision
