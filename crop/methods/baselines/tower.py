"""Attention inside the vision tower, for methods that choose by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crop import ops
from crop.methods.baselines.budget import ByFeatures

TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class ByTowerAttention(ByFeatures):
    """A budget met by what the vision tower attends to; ``Features.observed`` is (N,) or, of several layers, (N, layers).

    Attention received from the class token where the tower has one, else the mean over all tokens; averaged over heads.
    """

    def depths(self, feature: int) -> tuple[int, ...]:
        """Tower layers to read, ascending, of those whose last one, number ``feature``, gives the features."""
        return (feature,)

    def observe(self, tower: nn.Module, config: Any, watch: Callable[..., None]) -> None:
        """Watch the layers of ``depths``.

        Raises:
            ValueError: a tower whose tokens do not stand one for one for the vision tokens of the language model.
        """
        kind = getattr(getattr(config, "vision_config", None), "model_type", None)
        if kind not in TOWERS:
            raise ValueError(
                f"patch: a method that reads the vision tower's attention needs a tower of {', '.join(TOWERS)}, "
                f"got {kind!r}"
            )
        layers = next(m.layers for m in tower.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList))
        feature = getattr(config, "vision_feature_layer", None)
        if not isinstance(feature, int):
            raise ValueError(f"patch: vision_feature_layer must be one layer for this method, got {feature!r}")
        first = int(kind == "clip_vision_model")  # the class token

        def read(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
            index = torch.arange(first, key.shape[2], device=query.device).expand(query.shape[0], -1)
            rows = query[:, :, :1] if first else query
            return ops.attention_mass(rows.contiguous(), key.contiguous(), index, scale=scale)

        # Hidden state 0 is the input of layer 0, hence -2 the output of the last layer but one.
        for depth in self.depths(len(layers) + feature if feature < 0 else feature - 1):
            watch(layers[depth].self_attn, read)
