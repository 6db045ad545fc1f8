"""Localizers: question and image -> the region the question needs.

A localizer that is unsure returns the whole image with a low confidence, never a guess in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from crop.region import Region

from .attention import Attention, AttentionLocalizer, score_tokens
from .base import BoxLocalizer, Localizer, WholeLocalizer, encode
from .boxes import find_region
from .cascade import CascadeLocalizer, UnionLocalizer
from .ocr import OCRLocalizer

__all__ = [
    "LOCALIZERS",
    "Attention",
    "AttentionLocalizer",
    "BoxLocalizer",
    "CascadeLocalizer",
    "Localizer",
    "OCRLocalizer",
    "UnionLocalizer",
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
    min_confidence: float

    def need(self, argument: str) -> Any:
        """The argument, which must be there."""
        value = getattr(self, argument)
        if value is None:
            raise ValueError(f"get_localizer: {argument} must be given for {self.name!r}, got None")
        return value


def _attention(given: _Given) -> Localizer:
    model, processor = given.need("model"), given.need("processor")
    return AttentionLocalizer(model, processor, given.layer, given.prompt, min_confidence=given.min_confidence)


_BUILDERS: dict[str, Callable[[_Given], Localizer]] = {
    "attention": _attention,
    "box": lambda given: BoxLocalizer(given.need("region")),
    "cascade": lambda given: CascadeLocalizer((_attention(given), OCRLocalizer()), given.min_confidence),
    "ocr": lambda given: OCRLocalizer(),
    "union": lambda given: UnionLocalizer((_attention(given), OCRLocalizer())),
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
    min_confidence: float = 0.5,
) -> Localizer:
    """A localizer by its name, with default settings.

    Args:
        name: one of ``LOCALIZERS``.
        region: for "box".
        model, processor: for "attention", and for "cascade" and "union", which are attention and ocr.
        prompt, layer, min_confidence: for "attention", see ``AttentionLocalizer``.
    Raises:
        ValueError: unknown name, or something it needs is missing. ImportError: an extra is not installed.
    """
    if name not in _BUILDERS:
        raise ValueError(f"get_localizer: name must be one of {', '.join(LOCALIZERS)}, got {name!r}")
    return _BUILDERS[name](_Given(name, region, model, processor, prompt, layer, min_confidence))
