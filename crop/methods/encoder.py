"""Encoder pruning: parts of a picture that the question does not need are never encoded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Pieces
from crop.geometry.region import Region
from crop.methods.base import Method, check_count


@dataclass(frozen=True)
class EncoderPruning(Method):
    """Encode only what holds the region and a ring around it; what stands for the rest depends on the encoder.

    An encoder of tiles always gets the view of the whole image, one of patches or windows a copy at low resolution, whose
    tokens stand in the places of those that they show. Where an encoder can have neither, every ``every``-th token of every
    ``every``-th row stands for the outside. Other tokens that were not encoded are dropped.

    Args:
        ring: width of the ring in tokens, >= 0.
        every: >= 1, tokens from one to the next outside; 1 encodes everything where there is no view of the whole image.
    Raises:
        ValueError, TypeError: an argument out of its range.
    Source: own choice. With tiles the tokens that are left are those of a full run; where an encoder's attention goes
        across the whole image, they lose what they saw of the rest.
    """

    ring: int = 2
    every: int = 4

    def __post_init__(self) -> None:
        check_count("EncoderPruning", "ring", self.ring, 0)
        check_count("EncoderPruning", "every", self.every, 1)

    def encode(self, layout: VisionLayout, region: Region, pieces: Pieces) -> Tensor:
        """The pieces of region and ring, and those that stand for the rest."""
        taken = pieces.needed(layout.levels(region, self.ring) < 2) | pieces.overview
        return taken if pieces.overview.any() else taken | (pieces.place % self.every == 0).all(1)


@dataclass(frozen=True)
class OverviewOnly(Method):
    """Encode nothing but the view of the whole image, where the picture comes with one; else everything."""

    def encode(self, layout: VisionLayout, region: Region, pieces: Pieces) -> Tensor | None:
        """That view."""
        return pieces.overview if pieces.overview.any() and pieces.copy is None else None
