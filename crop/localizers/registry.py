"""Localizers by name: those of the package and those that users register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from crop.geometry.region import Region
from crop.localizers.attention import AttentionLocalizer
from crop.localizers.base import BoxLocalizer, Localizer, WholeLocalizer
from crop.localizers.cascade import CascadeLocalizer, UnionLocalizer
from crop.localizers.clip import ClipLocalizer
from crop.localizers.coarse import CoarseLocalizer
from crop.localizers.detector import DetectorLocalizer
from crop.localizers.head import Head, HeadLocalizer
from crop.localizers.ocr.localizer import OCRLocalizer
from crop.localizers.vlm import VLMLocalizer


@dataclass(frozen=True)
class LocalizerArguments:
    """What ``get_localizer`` was given, handed to the function that builds the localizer.

    Fields are those of ``get_localizer``; None where not given.
    """

    name: str
    region: Region | None = None
    model: nn.Module | None = None
    processor: Any = None
    prompt: Callable[[str], str] | None = None
    layer: int | None = None
    path: str | Path | None = None

    def need(self, argument: str) -> Any:
        """An argument that must have been given; ValueError where it is None."""
        value = getattr(self, argument)
        if value is None:
            raise ValueError(f"get_localizer: {argument} must be given for {self.name!r}, got None")
        return value

    @property
    def device(self) -> str:
        """Where a second model goes: beside the first."""
        return "cpu" if self.model is None else str(self.model.device)


Build = Callable[[LocalizerArguments], Localizer]


def _attention(given: LocalizerArguments) -> Localizer:
    return AttentionLocalizer(given.need("model"), given.need("processor"), given.layer, given.prompt)


def _head(given: LocalizerArguments) -> Localizer:
    model, processor = given.need("model"), given.need("processor")
    return HeadLocalizer(model, processor, Head.load(given.need("path")).to(model.device), given.prompt)


def _model_itself(given: LocalizerArguments) -> Localizer:
    """The cheapest that runs on the model itself."""
    return _head(given) if given.path else _attention(given)


_BUILT_IN: dict[str, Build] = {
    "attention": _attention,
    "box": lambda given: BoxLocalizer(given.need("region")),
    "cascade": lambda given: CascadeLocalizer((_model_itself(given), OCRLocalizer())),
    "clip": lambda given: ClipLocalizer.load(given.need("path"), given.device),
    "detector": lambda given: DetectorLocalizer.load(given.need("path"), given.device),
    "head": _head,
    "ocr": lambda given: OCRLocalizer(),
    "union": lambda given: UnionLocalizer((_model_itself(given), OCRLocalizer())),
    "vlm": lambda given: VLMLocalizer.load(given.need("path"), given.device),
    "whole": lambda given: WholeLocalizer(),
}
COARSE = ("attention", "head")  # those that can look at a small copy first
_registered: dict[str, Build] = {}


def localizer_names() -> tuple[str, ...]:
    """Names that ``get_localizer`` knows, those of the package first."""
    return (*_BUILT_IN, *_registered)


def register_localizer(name: str, build: Build) -> None:
    """Make a localizer known by name: to ``get_localizer``, the command line, lmms-eval and the benches.

    Args:
        name: e.g. "center"; registering it again replaces what it stood for.
        build: called with ``LocalizerArguments``, returns ``(image, question) -> Region``.
    Raises:
        ValueError: the name is empty or one of the package's own. TypeError: ``build`` cannot be called.
    """
    if not name or name in _BUILT_IN:
        raise ValueError(f"register_localizer: name must be none of {', '.join(_BUILT_IN)}, got {name!r}")
    if not callable(build):
        got = type(build).__name__
        raise TypeError(f"register_localizer: build must be a function of LocalizerArguments, got {got}")
    _registered[name] = build


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
    coarse: int = 1,
) -> Localizer:
    """A localizer by its name, with default settings.

    Args:
        name: one of ``localizer_names()``.
        region: for "box".
        model, processor, prompt: of the model that answers, for "attention" and "head", and for "cascade" and "union",
            which are one of these (head where ``path`` is given) and ocr.
        layer: for "attention".
        path: for "head" the file of its weights; for "clip", "detector" and "vlm" the folder (or hub name) of a model.
        min_confidence: below it the whole image is returned; None: the localizer's own default. Not for "box", "union", "whole".
        coarse: for "attention" and "head": look at a copy of the picture with sides so many times smaller
            (``CoarseLocalizer``); of tiles, "attention" then looks at the view of the whole picture alone.
    Raises:
        ValueError: unknown name, or something it needs is missing. FileNotFoundError, OSError: nothing to load at
            ``path``. ImportError: an extra is not installed.
    """
    build = _BUILT_IN.get(name) or _registered.get(name)
    if build is None:
        raise ValueError(f"get_localizer: name must be one of {', '.join(localizer_names())}, got {name!r}")
    localizer = build(LocalizerArguments(name, region, model, processor, prompt, layer, path))
    if min_confidence is not None and not hasattr(localizer, "min_confidence"):
        raise ValueError(f"get_localizer: min_confidence must not be given for {name!r}, got {min_confidence}")
    if coarse != 1 and name not in COARSE:
        raise ValueError(f"get_localizer: coarse must be left out for {name!r}, got {coarse}")
    if min_confidence is not None:
        localizer = replace(localizer, min_confidence=min_confidence)
    if coarse == 1:
        return localizer
    return CoarseLocalizer(replace(localizer, overview=True) if name == "attention" else localizer, coarse)
