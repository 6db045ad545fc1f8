"""Localizers: question and image -> the region the question needs.

A localizer that is unsure returns the whole image with a low confidence, never a guess in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from crop.geometry.region import Region
from crop.localizers.attention import Attention, AttentionLocalizer, score_tokens
from crop.localizers.base import BoxLocalizer, Localizer, WholeLocalizer, encode
from crop.localizers.boxes import find_region
from crop.localizers.cascade import CascadeLocalizer, UnionLocalizer
from crop.localizers.clip import ClipLocalizer
from crop.localizers.detector import DetectorLocalizer
from crop.localizers.head import Head, HeadLocalizer
from crop.localizers.ocr.localizer import OCRLocalizer
from crop.localizers.vlm import VLMLocalizer

__all__ = [
    "LOCALIZERS",
    "Attention",
    "AttentionLocalizer",
    "BoxLocalizer",
    "CascadeLocalizer",
    "ClipLocalizer",
    "DetectorLocalizer",
    "Head",
    "HeadLocalizer",
    "Localizer",
    "OCRLocalizer",
    "UnionLocalizer",
    "VLMLocalizer",
    "WholeLocalizer",
    "encode",
    "find_region",
    "get_localizer",
    "score_tokens",
]


@dataclass(frozen=True)
class _Given:
    """What ``get_localizer`` was given, for the builders below."""

    name: str
    region: Region | None
    model: nn.Module | None
    processor: Any
    prompt: Callable[[str], str] | None
    layer: int | None
    path: str | Path | None

    def need(self, argument: str) -> Any:
        """The argument, which must be there."""
        value = getattr(self, argument)
        if value is None:
            raise ValueError(f"get_localizer: {argument} must be given for {self.name!r}, got None")
        return value

    @property
    def device(self) -> str:
        """Where a second model goes: beside the first."""
        return "cpu" if self.model is None else str(self.model.device)


def _attention(given: _Given) -> Localizer:
    return AttentionLocalizer(given.need("model"), given.need("processor"), given.layer, given.prompt)


def _head(given: _Given) -> Localizer:
    model, processor = given.need("model"), given.need("processor")
    return HeadLocalizer(model, processor, Head.load(given.need("path")).to(model.device), given.prompt)


def _own(given: _Given) -> Localizer:
    """The cheapest, which runs on the model itself."""
    return _head(given) if given.path else _attention(given)


_BUILDERS: dict[str, Callable[[_Given], Localizer]] = {
    "attention": _attention,
    "box": lambda given: BoxLocalizer(given.need("region")),
    "cascade": lambda given: CascadeLocalizer((_own(given), OCRLocalizer())),
    "clip": lambda given: ClipLocalizer.load(given.need("path"), given.device),
    "detector": lambda given: DetectorLocalizer.load(given.need("path"), given.device),
    "head": _head,
    "ocr": lambda given: OCRLocalizer(),
    "union": lambda given: UnionLocalizer((_own(given), OCRLocalizer())),
    "vlm": lambda given: VLMLocalizer.load(given.need("path"), given.device),
    "whole": lambda given: WholeLocalizer(),
}
LOCALIZERS = tuple(_BUILDERS)


def get_localizer(
    name: str,
    *,
    region: Region | None = None,
    model: nn.Module | None = None,
    processor: Any = None,
    prompt: Callable[[str], str] | None = None,
    layer: int | None = None,
    path: str | Path | None = None,
    min_confidence: float | None = None,
) -> Localizer:
    """A localizer by its name, with default settings.

    Args:
        name: one of ``LOCALIZERS``.
        region: for "box".
        model, processor, prompt: of the model that answers, for "attention" and "head", and for "cascade" and "union",
            which are one of these (head where ``path`` is given) and ocr.
        layer: for "attention".
        path: for "head" the file of its weights; for "clip", "detector" and "vlm" the folder (or hub name) of a model.
        min_confidence: below it the whole image is returned; None: the localizer's own default. Not for "box", "union", "whole".
    Raises:
        ValueError: unknown name, or something it needs is missing. FileNotFoundError, OSError: nothing to load at
            ``path``. ImportError: an extra is not installed.
    """
    if name not in _BUILDERS:
        raise ValueError(f"get_localizer: name must be one of {', '.join(LOCALIZERS)}, got {name!r}")
    localizer = _BUILDERS[name](_Given(name, region, model, processor, prompt, layer, path))
    if min_confidence is None:
        return localizer
    if not hasattr(localizer, "min_confidence"):
        raise ValueError(f"get_localizer: min_confidence must not be given for {name!r}, got {min_confidence}")
    return replace(localizer, min_confidence=min_confidence)
