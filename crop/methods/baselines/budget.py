"""What the methods share that meet a budget before the language model.

Those that choose or merge tokens by what they hold compare projected features by cosine in float32. Greedy choices take
one step per kept token, each a few operations on whole vectors; nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods.base import Assignment, FeaturePooling, Features, Method, budget_of, check_keep


@dataclass(frozen=True)
class Budgeted(Method):
    """Pooling to a budget; a subclass says how (``pool``)."""

    keep: float | int = 0.11  # fraction in (0, 1] or count

    def __post_init__(self) -> None:
        check_keep(type(self).__name__, self.keep)

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | FeaturePooling | None:
        """Pooling of one image; None if all tokens stay. Raises ValueError for a count beyond the image's."""
        count = budget_of(type(self).__name__, self.keep, layout)
        return None if count == len(layout) else self.pool(layout, count)

    def pool(self, layout: VisionLayout, count: int) -> PoolPlan | FeaturePooling:
        """Pooling of one image to ``count`` cells, fewer than its tokens."""
        raise NotImplementedError


@dataclass(frozen=True)
class ByFeatures(Budgeted):
    """A budget met by choosing or merging tokens for what they hold: a subclass says which (``decide``)."""

    def pool(self, layout: VisionLayout, count: int) -> FeaturePooling:
        return FeaturePooling(count, len(layout), lambda features: self.decide(features, count))

    def decide(self, features: Features, count: int) -> Assignment:
        """``count`` cells of one image."""
        raise NotImplementedError


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, float32."""
    return torch.nn.functional.normalize(rows.float(), dim=-1)
