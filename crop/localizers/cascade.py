"""Localizers made of localizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crop.geometry.region import Region
from crop.localizers.base import Localizer

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class _Several:
    members: Sequence[Localizer]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError(f"{type(self).__name__}: members must hold at least one localizer, got none")

    def reasons(self, asked: list[Region]) -> str:
        """What every member said, in words."""
        names = (type(member).__name__.removesuffix("Localizer").lower() for member in self.members)
        said = (region.reason or f"confidence {region.confidence:.2f}" for region in asked)
        return "; ".join(f"{name}: {reason}" for name, reason in zip(names, said, strict=True))

    def nobody(self, asked: list[Region]) -> Region:
        """The whole image, because no member found a region."""
        return Region.whole(max(region.confidence for region in asked), self.reasons(asked))


@dataclass(frozen=True)
class CascadeLocalizer(_Several):
    """One after the other until one is sure ("cascade"): put the cheapest first.

    Args:
        members: asked in this order; one that returns the whole image is not sure.
        min_confidence: a member's region counts from here on.
    Returns, when called:
        Region of the first sure member, else the whole image with the best confidence and every member's reason.
    Raises:
        ValueError: no member, or min_confidence out of [0, 1].
    """

    min_confidence: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"CascadeLocalizer: min_confidence must be in [0, 1], got {self.min_confidence}")

    def __call__(self, image: Image, question: str) -> Region:
        asked = []
        for member in self.members:
            asked.append(member(image, question))
            if not asked[-1].is_whole and asked[-1].confidence >= self.min_confidence:
                return asked[-1]
        return self.nobody(asked)


@dataclass(frozen=True)
class UnionLocalizer(_Several):
    """What any of several finds ("union"): a wrong one costs tokens, not the answer.

    Args:
        members: all are asked; those that return the whole image abstain.
    Returns, when called:
        Region of all their boxes with the best confidence, else the whole image with every member's reason.
    Raises:
        ValueError: no member.
    """

    def __call__(self, image: Image, question: str) -> Region:
        asked = [member(image, question) for member in self.members]
        found = [region for region in asked if not region.is_whole]
        if not found:
            return self.nobody(asked)
        boxes = tuple(box for region in found for box in region.boxes)
        return Region(boxes, max(region.confidence for region in found), self.reasons(asked))
