"""Methods made of methods: both stages, several cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods.base import Method, PoolMode, Selection
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
        ``Pyramid.steps((8, 16, 24), keep=0.5, rows="last", floor=0)`` without a region. That cuts can be led by a
        region is our addition.
    """

    stages: tuple[Method, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            if not isinstance(stage, Method) or stage.cuts != (stage,):
                raise TypeError(f"Pyramid: stages must be methods of one cut each, got {stage!r}")
        layers = [stage.layer for stage in self.stages]
        if not layers or layers != sorted(set(layers)):
            raise ValueError(f"Pyramid: stages must have one or more layers that ascend, got {layers}")

    @property
    def cuts(self) -> tuple[Method, ...]:
        return self.stages

    def least(self, tokens: int) -> dict[int, int]:
        """That of every stage."""
        return {layer: count for stage in self.stages for layer, count in stage.least(tokens).items()}

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

    @property
    def cuts(self) -> tuple[Method, ...]:
        return self.ilp.cuts

    @property
    def layer(self) -> int | None:
        return self.ilp.layer

    @property
    def rows(self) -> Literal["text", "last"]:
        return self.ilp.rows

    @property
    def rope(self) -> bool:
        return self.ilp.rope

    @property
    def pool_mode(self) -> PoolMode:
        return self.plc.pool_mode

    @property
    def salience(self) -> bool:
        return self.plc.salience

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | None:
        """As ``plc.plan``."""
        return self.plc.plan(layout, region)

    def least(self, tokens: int) -> dict[int, int]:
        """That of ``ilp``, of what ``plc`` leaves."""
        start = self.plc.least(tokens)[0]
        return {layer: min(start, count) for layer, count in self.ilp.least(tokens).items()}

    def select(self, layout: VisionLayout, region: Region) -> Selection | None:
        """As ``ilp.select``."""
        return self.ilp.select(layout, region)
