"""Text lines of an image: found at once, recognised on demand, remembered."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crop.localizers.ocr.engine import Engine

if TYPE_CHECKING:
    from PIL.Image import Image

READABLE = 0.85  # mean score from which lines count as read; those that stand on their head reach about 0.75


@dataclass
class Page:
    """The text lines of one image.

    Args:
        size: (width, height) of the image in pixels.
        quads: (num_lines, 4, 2) float32 corners of every line in pixels, clockwise from the top left of the text.
        texts: number of a line -> what it says; missing for lines that nobody has asked for.
        notes: room for what others derive from the page, such as embeddings of its lines; never written to disk.
        scores: number of a line -> how sure the recognition is of its text, in [0, 1].
    """

    size: tuple[int, int]
    quads: np.ndarray
    texts: dict[int, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict, repr=False)
    scores: dict[int, float] = field(default_factory=dict, repr=False)

    @property
    def upright(self) -> bool:
        """Whether most lines run across and the recognition is sure of those read so far."""
        if not self.scores:
            return True
        sides = self.quads.max(1) - self.quads.min(1)
        sure = sum(self.scores.values()) >= READABLE * len(self.scores)
        return sure and bool(np.median(sides[:, 0] / sides[:, 1].clip(min=1)) >= 1)

    def __len__(self) -> int:
        return len(self.quads)

    @property
    def boxes(self) -> np.ndarray:
        """(num_lines, 4) float32 x0, y0, x1, y1 of every line in sides of the image."""
        corners = np.concatenate([self.quads.min(1), self.quads.max(1)], 1)
        return corners / np.tile(np.float32(self.size), 2)


class Reader:
    """An ``Engine`` in two steps; pages are remembered by the content of their image.

    Args:
        side: what is detected on has at most ``side ** 2`` pixels; lines are recognised at full resolution.
        glance: the same of a first look, which is enough where its lines are at least ``legible`` pixels tall.
        legible: median height of the lines found, in pixels of the first look.
        max_lines: of more lines only the tallest are read, to bound the time.
        threads: of ONNX Runtime; None: as many as torch's.
        remember: pages kept in memory, the least recently used goes first.
        folder: an existing folder where pages are kept too, as JSON; None: nowhere.
    Raises:
        ImportError: the extra ``ocr`` is not installed. FileNotFoundError: weights or folder missing.
    """

    def __init__(
        self,
        *,
        side: int = 1024,
        glance: int = 704,
        legible: int = 10,
        max_lines: int = 400,
        threads: int | None = None,
        remember: int = 64,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        threads = torch.get_num_threads() if threads is None else threads
        given = {"side": side, "glance": glance, "legible": legible, "max_lines": max_lines, "threads": threads}
        for name, value in (given | {"remember": remember}).items():
            if value < 1:
                raise ValueError(f"Reader: {name} must be >= 1, got {value}")
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"Reader: folder must exist, got {folder}")
        self.side, self.glance, self.legible = side, glance, legible
        self.max_lines, self.remember = max_lines, remember
        self.folder = None if folder is None else Path(folder)
        self._pages: OrderedDict[str, Page] = OrderedDict()
        self._engine = Engine(threads)

    def detect(self, image: Image) -> Page:
        """The page of an RGB image, its lines perhaps not read yet; the same object for the same pixels."""
        settings = (image.size, self.side, self.glance, self.legible, self.max_lines)
        key = hashlib.sha256(repr(settings).encode() + image.tobytes()).hexdigest()
        page = self._pages.pop(key, None) or self._load(key) or Page(image.size, self._quads(image))
        page.notes["key"] = key
        self._pages[key] = page
        while len(self._pages) > self.remember:
            self._pages.popitem(last=False)
        return page

    def read(self, image: Image, page: Page, lines: Iterable[int] | None = None) -> None:
        """Recognise those of ``lines`` (None: all) that are not known yet, into ``page.texts``."""
        wanted = [line for line in (range(len(page)) if lines is None else lines) if line not in page.texts]
        if not wanted:
            return
        texts, scores = zip(*self._engine.recognize(image, page.quads[wanted]), strict=True)
        page.texts.update(zip(wanted, texts, strict=True))
        page.scores.update(zip(wanted, scores, strict=True))
        self._store(page)

    def _quads(self, image: Image) -> np.ndarray:
        # Areas, not longest sides: a long strip stays legible.
        for side in (self.glance, self.side):
            quads = self._engine.find(image, side**2)
            thick = np.linalg.norm(quads - np.roll(quads, 1, axis=1), axis=2).min(1)
            scale = min(1.0, side / (image.width * image.height) ** 0.5)
            if scale == 1 or (len(quads) and scale * np.median(thick) >= self.legible):
                break
        quads = quads[thick >= 2]  # a crop needs pixels
        if len(quads) > self.max_lines:
            tallest = np.argsort(-np.linalg.norm(quads[:, 3] - quads[:, 0], axis=1), kind="stable")[: self.max_lines]
            quads = quads[np.sort(tallest)]
        return quads

    def _load(self, key: str) -> Page | None:
        file = self.folder and self.folder / f"{key}.json"
        if not file or not file.is_file():
            return None
        stored = json.loads(file.read_text(encoding="utf-8"))
        texts = {int(line): text for line, text in stored["texts"].items()}
        scores = {int(line): score for line, score in stored.get("scores", {}).items()}
        return Page(tuple(stored["size"]), np.float32(stored["quads"]).reshape(-1, 4, 2), texts, scores=scores)

    def _store(self, page: Page) -> None:
        if self.folder is None:
            return
        scores = {line: round(score, 3) for line, score in page.scores.items()}
        stored = {"size": page.size, "quads": page.quads.round(1).tolist(), "texts": page.texts, "scores": scores}
        target = self.folder / f"{page.notes['key']}.json"
        part = target.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
        part.replace(target)  # whole or not at all, whoever else writes
