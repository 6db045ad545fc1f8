"""What the methods share that choose or merge tokens before the language model by what the tokens hold.

All compare projected features by cosine in float32. Greedy choices take one step per kept token, each a few operations
on whole vectors; nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods.base import Assignment, FeaturePooling, Features, Method, budget_of, check_keep


@dataclass(frozen=True)
class ByFeatures(Method):
    """A budget met by choosing or merging tokens for what they hold: a subclass says which (``decide``)."""

    keep: float | int = 0.11

    def __post_init__(self) -> None:
        check_keep(type(self).__name__, self.keep)

    def plan(self, layout: VisionLayout, region: Region) -> FeaturePooling | None:
        """Promise of the count; None if all tokens stay. Raises ValueError for a count beyond the image's."""
        count = budget_of(type(self).__name__, self.keep, layout)
        if count == len(layout):
            return None
        return FeaturePooling(count, len(layout), lambda features: self.decide(features, count))

    def decide(self, features: Features, count: int) -> Assignment:
        """``count`` cells of one image."""
        raise NotImplementedError


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, float32."""
    return torch.nn.functional.normalize(rows.float(), dim=-1)
