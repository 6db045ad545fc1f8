"""Fits the ranking of the localizer "ocr" on the development part of the receipts: on their annotated text and, with
--pages, also on what the OCR makes of them.

    python -m bench.localizers.fit_ocr --pages FOLDER            # writes the weights into the package

Pages that are not in the folder are read and put there first (seconds each). Logistic regression, ridge towards zero for
the shared weights and towards the shared ones for every kind of answer.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.localizers import receipts
from crop.localizers.ocr.encoder import Encoder
from crop.localizers.ocr.features import FEATURES, OUTLINE, Neighbours, features, neighbours, outline
from crop.localizers.ocr.question import Question
from crop.localizers.ocr.ranking import OTHER, STAGES, SUPPORT, WEIGHTS, Weights, logistic, with_support
from crop.localizers.ocr.reader import Reader

SUPPORTIVE = ("meaning", "label meaning", "words", "label exact", "own label", "value", "value of label", "example")


@dataclass(frozen=True)
class Case:
    """One question on one page."""

    field: str
    kind: str
    beside: Neighbours
    outline: np.ndarray  # (num_lines, len(OUTLINE))
    table: np.ndarray  # (num_lines, len(FEATURES))
    right: np.ndarray  # (num_lines,) bool: lines that answer


def cases(found: list[receipts.Receipt], reader: Reader | None) -> list[Case]:
    """The questions about every receipt on its annotated page and on the page as read."""
    encoder, known = Encoder(), {}

    def encode(texts: list[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, encoder(new), strict=True))
        return np.stack([known[text] for text in texts]) if texts else encoder(texts)

    made = []
    for receipt in tqdm(found, "pages", disable=None):
        for page in (receipt.annotated(), *((receipt.read(reader),) if reader else ())):
            boxes, texts = page.boxes.astype(np.float64), [page.texts[line] for line in range(len(page))]
            beside, meanings = neighbours(boxes, texts), encode(texts)
            nothing = receipts.Asked("nothing", receipt.beside, (0.0, 0.0, 0.0, 0.0))
            for asked in (*receipt.asked, *receipt.rephrased, *receipt.further, nothing):
                question = Question.of(asked.text)
                vector, examples = encode([asked.text])[0], encode(list(question.kind.examples))
                table = features(question, boxes, texts, beside, vector, meanings, examples)
                right = answers(boxes, texts, asked)
                if right.any() or asked is nothing:
                    made.append(Case(asked.field, question.kind.name, beside, outline(boxes), table, right))
    return made


def answers(boxes: np.ndarray, texts: list[str], asked: receipts.Asked) -> np.ndarray:
    """Lines in the answer's box; those that say the same date or amount elsewhere are as good."""
    x0, y0, x1, y1 = boxes.T
    left, top, right, bottom = asked.box
    common = (np.minimum(x1, right) - np.maximum(x0, left)).clip(0) * (
        np.minimum(y1, bottom) - np.maximum(y0, top)
    ).clip(0)
    least = np.minimum((x1 - x0) * (y1 - y0), (right - left) * (bottom - top))
    found = common > 0.5 * np.maximum(least, 1e-9)
    if asked.field in ("date", "total amount"):
        longer = 40 if asked.field == "date" else 3
        answer = _fold(asked.answer)
        found |= np.array([answer in _fold(text) and len(_fold(text)) <= len(answer) + longer for text in texts])
    return found


def _fold(text: str) -> str:
    return re.sub(r"\W", "", text.casefold())


def fit(found: list[Case], ridge: float) -> Weights:
    place = _stage(found, [case.outline for case in found], 1.0)
    first = _stage(found, [case.table for case in found], ridge)
    tables = [
        with_support(case.table, logistic(case.table, first.get(case.kind, first[OTHER])), case.beside)
        for case in found
    ]
    return Weights(place, first, _stage(found, tables, ridge))


def _stage(found: list[Case], tables: list[np.ndarray], ridge: float) -> dict[str, np.ndarray]:
    number = Counter(case.field for case in found)
    rights = [case.right.astype(float) for case in found]
    # Every field counts the same for the shared weights, however many questions it has.
    weight = [np.full(len(right), 60 / number[case.field]) for case, right in zip(found, rights, strict=True)]
    start = np.zeros(tables[0].shape[1] + 1)
    shared = _logistic_regression(*map(np.concatenate, (tables, rights, weight)), start, ridge)
    fitted = {}
    for kind in sorted({case.kind for case in found}):
        mine = [index for index, case in enumerate(found) if case.kind == kind]
        table, right = (np.concatenate([parts[index] for index in mine]) for parts in (tables, rights))
        fitted[kind] = _logistic_regression(table, right, np.ones(len(right)), shared, ridge)
    return fitted


def _logistic_regression(
    table: np.ndarray, right: np.ndarray, weight: np.ndarray, centre: np.ndarray, ridge: float
) -> np.ndarray:
    """Damped, projected Newton; the ridge pulls towards ``centre``, the bias hardly.

    What speaks for a line by its nature must not speak against it, whatever the receipts at hand suggest.
    """
    rows = np.concatenate([table, np.ones((len(table), 1))], 1)
    pull = np.full(rows.shape[1], ridge)
    pull[-1] *= 0.01
    helps = np.zeros(rows.shape[1], dtype=bool)
    if table.shape[1] != len(OUTLINE):
        helps[[FEATURES.index(name) for name in SUPPORTIVE]] = True
    found = np.where(helps, centre.clip(0), centre)
    for _ in range(100):
        guess = logistic(table, found)
        slope = rows.T @ (weight * (guess - right)) + pull * (found - centre)
        curve = (rows * (weight * (guess * (1 - guess) + 1e-4))[:, None]).T @ rows + np.diag(pull)
        held = helps & (found <= 0) & (slope > 0)  # at the border, and the slope points outside
        free = np.flatnonzero(~held)
        step = np.zeros_like(found)
        step[free] = np.linalg.solve(curve[np.ix_(free, free)], slope[free])
        step *= min(1.0, 2 / max(np.abs(step).max(), 1e-12))
        before, found = found, found - step
        found[helps] = found[helps].clip(0)
        if np.abs(found - before).max() < 1e-6:
            break
    return found


def save(weights: Weights, path: Path) -> None:
    """Write what ``Weights.shipped`` reads."""
    stored: dict = {"features": OUTLINE + FEATURES}
    for name in STAGES:
        stored[name] = {kind: row.round(3).tolist() for kind, row in sorted(getattr(weights, name).items())}
    lines = json.dumps(stored, indent=1).replace("\n   ", " ").replace("\n  ]", "]")
    path.write_text(lines + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.localizers.fit_ocr",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ridge", type=float, default=10.0)
    parser.add_argument("--pages", type=Path, help="folder where the read pages are kept")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    reader = options.pages and Reader(folder=options.pages)
    found = cases([receipt for receipt in receipts.load() if receipt.development], reader)
    weights = fit(found, options.ridge)
    save(weights, options.out)
    tables = (
        ("place", weights.place, OUTLINE),
        ("first", weights.first, FEATURES),
        ("second", weights.second, FEATURES + SUPPORT),
    )
    for name, rows, columns in tables:
        print(f"{name:18}" + "".join(f"{kind:>9}" for kind in rows))
        for index, feature in enumerate((*columns, "bias")):
            print(f"{feature:18}" + "".join(f"{row[index]:9.2f}" for row in rows.values()))


if __name__ == "__main__":
    main()
