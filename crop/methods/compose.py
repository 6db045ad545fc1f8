"""Methods made of methods: several stages, several cuts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Pieces
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
    """Several stages: one method says what is encoded, one pools before the language model, one prunes inside it.

    Args:
        plc: gives ``plan``, ``pool_mode`` and ``observe``.
        ilp: gives ``cuts`` (or ``select``, ``layer`` and ``rows``); its fractions refer to the original tokens.
        encoder: gives ``encode``.
    Raises:
        TypeError: not methods of one stage each, fewer than two, or one that observes an encoder which another prunes.
    Source: CROP (arXiv 2505.21233) names the two in the language model; joining them training-free, and the encoder, are
        our choice.
    """

    plc: Method | None = None
    ilp: Method | None = None
    encoder: Method | None = None

    def __post_init__(self) -> None:
        given = {name: stage for name in ("plc", "ilp", "encoder") if (stage := getattr(self, name)) is not None}
        for name, stage in given.items():
            if not isinstance(stage, Method):
                raise TypeError(f"Compose: {name} must be a Method, got {stage!r}")
        does = {
            name: {"plc": type(stage).plan is not Method.plan, "ilp": bool(stage.cuts), "encoder": stage.encodes}
            for name, stage in given.items()
        }
        if len(given) < 2 or any(here != (name == stage) for name in does for stage, here in does[name].items()):
            raise TypeError(
                "Compose: plc must pool before the language model (override plan) alone, ilp prune inside it (have a "
                "layer) alone, and encoder leave out parts of a picture (override encode) alone, two of them at least, got "
                + ", ".join(f"{name}={stage!r}" for name, stage in given.items())
            )
        if self.encoder is not None and self.plc is not None and self.plc.observes:
            raise TypeError(f"Compose: plc must not observe the encoder that another stage prunes, got {self.plc!r}")

    cuts = property(lambda self: () if self.ilp is None else self.ilp.cuts)
    layer = property(lambda self: None if self.ilp is None else self.ilp.layer)
    rows = property(lambda self: (self.ilp or Method).rows)
    rope = property(lambda self: (self.ilp or Method).rope)
    pool_mode = property(lambda self: (self.plc or Method).pool_mode)
    encodes = property(lambda self: self.encoder is not None)
    observes = property(lambda self: self.plc is not None and self.plc.observes)

    def with_layer(self, default: int) -> Compose:
        """``ilp`` with ``default`` in the place of ``layer="auto"``."""
        resolved = copy.copy(self)
        object.__setattr__(resolved, "ilp", None if self.ilp is None else self.ilp.with_layer(default))
        return resolved

    def observe(self, tower: nn.Module, config: Any, watch: Callable[..., None]) -> None:
        """As ``plc.observe``."""
        if self.plc is not None:
            self.plc.observe(tower, config, watch)

    def encode(self, layout: VisionLayout, region: Region, pieces: Pieces) -> Tensor | None:
        """As ``encoder.encode``."""
        return None if self.encoder is None else self.encoder.encode(layout, region, pieces)

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | FeaturePooling | None:
        """As ``plc.plan``."""
        return None if self.plc is None else self.plc.plan(layout, region)

    def select(self, layout: VisionLayout, region: Region) -> Selection | None:
        """As ``ilp.select``."""
        return None if self.ilp is None else self.ilp.select(layout, region)
