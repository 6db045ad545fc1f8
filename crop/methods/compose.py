"""Methods made of methods: both stages, several cuts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods.base import FeaturePooling, Method, Selection
from crop.methods.ilp import InnerLLMPruning


@dataclass(frozen=True)
class Pyramid(Method):
    """Several cuts: fewer tokens the deeper the layer.

    Args:
        stages: methods that prune inside the decoder, their layers ascending; every ``keep`` refers to the original
            tokens.
    Raises:
        TypeError: not methods of one cut. ValueError: none, or layers that do not ascend.
    Source: PyramidDrop (arXiv 2410.17247), which halves the tokens at three layers by the attention of the last row:
        ``Pyramid.steps((8, 16, 24), keep=0.5, rows="last")`` without a region. That cuts can be led by a
        region is our addition.
    """

    stages: tuple[Method, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            if not isinstance(stage, Method) or stage.cuts != (stage,):
                raise TypeError(f"Pyramid: stages must be methods of one cut each, got {stage!r}")
        layers = [stage.layer for stage in self.stages]
        if "auto" in layers:
            raise ValueError("Pyramid: stages must name their layers, got layer='auto'")
        if not layers or layers != sorted(set(layers)):
            raise ValueError(f"Pyramid: stages must have one or more layers that ascend, got {layers}")

    @property
    def cuts(self) -> tuple[Method, ...]:
        return self.stages

    @classmethod
    def steps(cls, layers: Sequence[int], keep: float = 0.5, **more: Any) -> Pyramid:
        """``InnerLLMPruning`` at every one of ``layers``, each to the fraction ``keep`` of what came before.

        Args:
            layers: decoder layers, ascending. keep: in (0, 1]. more: of ``InnerLLMPruning``.
        """
        return cls(tuple(InnerLLMPruning(keep**n, layer=layer, **more) for n, layer in enumerate(layers, start=1)))


@dataclass(frozen=True)
class Compose(Method):
    """Both stages: one method pools before the language model, another prunes inside it.

    Args:
        plc: gives ``plan`` and ``pool_mode``.
        ilp: gives ``cuts`` (or ``select``, ``layer`` and ``rows``); its fractions refer to the original tokens.
    Raises:
        TypeError: not methods.
    Source: CROP (arXiv 2505.21233) names the two; joining them training-free is our choice.
    """

    plc: Method
    ilp: Method

    def __post_init__(self) -> None:
        for name in ("plc", "ilp"):
            if not isinstance(getattr(self, name), Method):
                raise TypeError(f"Compose: {name} must be a Method, got {getattr(self, name)!r}")
        pools = [type(one).plan is not Method.plan for one in (self.plc, self.ilp)]
        if not self.ilp.cuts or self.plc.cuts or pools != [True, False]:
            raise TypeError(
                "Compose: plc must pool before the language model (override plan) alone and ilp prune inside it (have a layer) "
                "alone, "
                f"got {self.plc!r} and {self.ilp!r}"
            )

    cuts = property(attrgetter("ilp.cuts"))
    layer = property(attrgetter("ilp.layer"))
    rows = property(attrgetter("ilp.rows"))
    rope = property(attrgetter("ilp.rope"))
    pool_mode = property(attrgetter("plc.pool_mode"))

    def with_layer(self, default: int) -> Compose:
        """``ilp`` with ``default`` in the place of ``layer="auto"``."""
        resolved = copy.copy(self)
        object.__setattr__(resolved, "ilp", self.ilp.with_layer(default))
        return resolved

    def observe(self, tower: nn.Module, config: Any, watch: Callable[..., None]) -> None:
        """As ``plc.observe``."""
        self.plc.observe(tower, config, watch)

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | FeaturePooling | None:
        """As ``plc.plan``."""
        return self.plc.plan(layout, region)

    def select(self, layout: VisionLayout, region: Region) -> Selection | None:
        """As ``ilp.select``."""
        return self.ilp.select(layout, region)
