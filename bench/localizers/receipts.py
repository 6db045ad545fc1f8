"""Receipts with questions and the boxes of their answers, split by image, for the localizer benches."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from bench import jsonl
from bench.common import data_folder
from crop.cli.images import open_image
from crop.localizers.ocr.reader import Page, Reader

Box = tuple[float, float, float, float]
FIELDS = ("company", "date", "address", "total amount")
# Further questions, so that the ranking is not tuned to four of them: asked where exactly one line (or pair of lines in a
# row) bears the label. (field, question, label, what the value looks like)
FURTHER = (
    ("phone", "What is the telephone number?", r"\b(tel|phone|h/?p)\b", r"\d[\d -]{6,}"),
    ("time", "At what time was it bought?", r"\btime\b", r"\d:\d\d"),
    ("cashier", "Who was the cashier?", r"\bcashier\b", r"\w{3,}"),
    ("invoice", "What is the invoice number?", r"\binv(oice)?\b(?!.*tax)", r"\d{3,}"),
    ("change", "How much change was given back?", r"\bchange\b", r"\d[.,]\d\d"),
    ("cash", "How much cash did the customer hand over?", r"\bcash\b(?! sale)", r"\d[.,]\d\d"),
    ("tax id", "What is the GST registration number?", r"\bgst (reg|id|no)", r"\d{6,}"),
    ("counter", "Which counter was it?", r"\b(counter|cntr)\b", r"\w"),
    ("salesperson", "Who is the salesperson?", r"\bsales ?(person|man)\b", r"\w"),
    ("server", "Who served the guests?", r"\b(server|served by|waiter)\b", r"\w{3,}"),
    ("rounding", "What is the rounding adjustment?", r"\bround(ing|ed)? adj", r"\.?\d\d"),
)
# The same in other words, so that it is not tuned to one wording either: for the development part, for the other part.
REPHRASED = {
    "company": (("Which shop is this from?", "What is the company in the invoice shown in the picture?", "Who issued this bill?",
                 "What is the store called?"),
                ("What is the name of the store?", "Which business sold the goods?", "Which company is it?")),
    "date": (("When was this bought?", "What is the date in the invoice shown in the picture?", "On which day was this receipt issued?",
              "date?"),
             ("When did the purchase take place?", "What date is printed on the receipt?", "What day was it?")),
    "address": (("Where is the shop located?", "What is the address in the invoice shown in the picture?", "In which street is the store?",
                 "address of the seller"),
                ("Where is the store?", "What address is given on the receipt?", "Where can the company be found?")),
    "total amount": (("How much was paid in total?", "What is the total amount in the invoice shown in the picture?",
                      "What is the total of this bill?", "What does it all cost?"),
                     ("What is the grand total?", "How much did the customer have to pay?", "total")),
}  # fmt: skip
# What no line of text answers: a localizer should say so.
BESIDE = (
    (
        "What color is the car?",
        "How many people are in the picture?",
        "Is the dog sleeping?",
        "What is the man holding?",
    ),
    ("What is the woman wearing?", "What sport is being played?", "Is it raining?", "Which animal is on the left?"),
)


@dataclass(frozen=True)
class Asked:
    """One question about one receipt.

    Args:
        field: what it asks for.
        text: the question.
        box: (x0, y0, x1, y1) of the answer in sides of the image.
        answer: what it says there; empty where only the box is known.
    """

    field: str
    text: str
    box: Box
    answer: str = ""


@dataclass(frozen=True)
class Receipt:
    """One receipt with its annotated lines and questions."""

    path: Path
    size: tuple[int, int]
    boxes: np.ndarray  # (num_lines, 4) float64 in sides of the image
    texts: list[str]
    asked: tuple[Asked, ...]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def development(self) -> bool:
        """Whether it belongs to the part on which settings are chosen; the other part is only measured on."""
        return hashlib.sha256(self.name.encode()).digest()[0] % 2 == 0

    def annotated(self) -> Page:
        """The page with its annotated text: a perfect OCR."""
        corners = (self.boxes * np.tile(self.size, 2))[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        return Page(self.size, np.float32(corners.reshape(-1, 4, 2)), dict(enumerate(self.texts)))

    def read(self, reader: Reader) -> Page:
        """The page as the OCR reads it."""
        image = open_image(self.path)
        page = reader.detect(image)
        reader.read(image, page)
        return page

    @property
    def turn(self) -> int:
        """A number that chooses among wordings."""
        return hashlib.sha256(self.name.encode()).digest()[1]

    @property
    def beside(self) -> str:
        """A question that no line answers, see ``BESIDE``."""
        questions = BESIDE[0 if self.development else 1]
        return questions[self.turn % len(questions)]

    @cached_property
    def further(self) -> tuple[Asked, ...]:
        """Questions read off the labels, see ``FURTHER``."""
        return tuple(filter(None, (self._labelled(*entry) for entry in FURTHER)))

    @cached_property
    def rephrased(self) -> tuple[Asked, ...]:
        """The receipt's own questions in other words, see ``REPHRASED``."""
        choices = {field: wordings[0 if self.development else 1] for field, wordings in REPHRASED.items()}
        return tuple(
            replace(asked, text=choices[asked.field][self.turn % len(choices[asked.field])]) for asked in self.asked
        )

    def _labelled(self, field: str, question: str, label: str, value: str) -> Asked | None:
        found = [i for i, text in enumerate(self.texts) if re.search(label, text, re.I)]
        if len(found) != 1:
            return None
        here = found[0]
        rest = re.sub(label, "", self.texts[here], flags=re.I)
        if re.search(value, rest):
            return Asked(field, question, tuple(self.boxes[here]))
        x0, y0, x1, y1 = self.boxes.T
        level = (np.minimum(y1, y1[here]) - np.maximum(y0, y0[here])) > 0.6 * (y1 - y0)[here]
        right = np.where(level & (x0 > x1[here] - 0.02), x0, np.inf)
        best = int(right.argmin())
        if np.isinf(right[best]) or not re.search(value, self.texts[best]):
            return None
        return Asked(field, question, tuple(self.boxes[best]))


def load() -> list[Receipt]:
    """All receipts.

    Raises:
        FileNotFoundError: the data files are not there.
    """
    folder = data_folder() / "receipts"
    if not (folder / "lines.jsonl").is_file():
        raise FileNotFoundError(f"receipts must be in {folder}; set CROP_DATA to the folder above them")

    def records(name: str) -> list[dict]:
        return [row.fields for row in jsonl.rows(folder / name)]

    asked: dict[str, list[Asked]] = {}
    pages = {page["image"]: page for page in records("lines.jsonl")}
    for entry in records("questions.jsonl"):
        page = pages[entry["image"]]
        box = tuple(np.array(entry["box"]) / np.tile((page["width"], page["height"]), 2))
        asked.setdefault(entry["image"], []).append(Asked(entry["field"], entry["question"], box, entry["answer"]))
    return [
        Receipt(
            folder / "images" / name,
            (page["width"], page["height"]),
            np.array([line["box"] for line in page["lines"]]) / np.tile((page["width"], page["height"]), 2),
            [line["text"] for line in page["lines"]],
            tuple(asked[name]),
        )
        for name, page in pages.items()
    ]
