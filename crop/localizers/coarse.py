"""Coarse to fine: look for the region in a small copy, before the picture itself is encoded; or answer from copy and region."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crop.geometry.region import Region
from crop.localizers.base import Localizer
from crop.methods.base import check_count

if TYPE_CHECKING:
    from PIL.Image import Image


def small_size(size: tuple[int, int], times: int, least: int) -> tuple[int, int]:
    """A ``times``-th of both sides in pixels, the shorter one not below ``least``; the same where it is smaller."""
    shorter = min(size)
    side = min(max(shorter / times, least), shorter)
    width, height = (max(1, round(length * side / shorter)) for length in size)
    return width, height


def small_copy(image: Image, times: int, least: int) -> Image:
    """The picture at its ``small_size``; itself where that is its own."""
    size = small_size(image.size, times, least)
    return image if size == image.size else image.resize(size, reducing_gap=2.0)


@dataclass(frozen=True)
class CoarseLocalizer:
    """Ask another localizer about a small copy of the picture, of which a model makes a ``times ** 2``-th of the tokens.

    With ``EncoderPruning`` the region is thus known before the picture is encoded: the same weights look twice, once at
    little, once at what matters. Models that scale every picture to one size gain nothing.

    Args:
        localizer: e.g. an ``AttentionLocalizer`` or ``HeadLocalizer``; its boxes are fractions, so they hold for the picture.
        times: how much smaller the sides of the copy are, >= 1.
        least: pixels that its shorter side has at least.
    Raises:
        ValueError, TypeError: an argument out of its range.
    Source: own choice.
    """

    localizer: Localizer
    times: int = 4
    least: int = 112

    def __post_init__(self) -> None:
        check_count("CoarseLocalizer", "times", self.times, 1)
        check_count("CoarseLocalizer", "least", self.least, 1)

    def __call__(self, image: Image, question: str) -> Region:
        return self.localizer(small_copy(image, self.times, self.least), question)

    @property
    def glance(self) -> Callable[[tuple[int, int]], Any] | None:
        """That of its localizer, at the copy; None where it does not look with the model itself."""
        glance = getattr(self.localizer, "glance", None)
        return None if glance is None else lambda size: glance(small_size(size, self.times, self.least))


def zoom(image: Image, region: Region, *, margin: float = 0.02, times: int = 4, least: int = 112) -> list[Image]:
    """A small copy of the picture, and the region cut out of it: two pictures for a prompt, in the place of pruning.

    No token is left out and no model is changed; the model must have learned to read two pictures as one::

        inputs = crop.encode(processor, crop.zoom(image, region), question)
        model.generate(**inputs)

    Args:
        region: several boxes are cut out as one, their bounds. margin: around it, fraction of the picture's sides.
        times, least: of the copy, as ``CoarseLocalizer``.
    Returns:
        [copy, cut-out], or the picture alone where the region is all of it.
    Raises:
        ValueError, TypeError: an argument out of its range.
    """
    check_count("zoom", "times", times, 1)
    check_count("zoom", "least", least, 1)
    if region.is_whole:
        return [image]
    x0, y0, x1, y1 = zip(*region.dilate(margin).boxes, strict=True)
    width, height = image.size
    # Whole pixels, none of the region is lost; a border that was given in pixels is not moved by rounding.
    left, top = (math.floor(min(low) * side + 1e-6) for low, side in ((x0, width), (y0, height)))
    right, bottom = (math.ceil(max(high) * side - 1e-6) for high, side in ((x1, width), (y1, height)))
    return [small_copy(image, times, least), image.crop((left, top, right, bottom))]
