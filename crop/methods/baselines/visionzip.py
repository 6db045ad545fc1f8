"""VisionZip: what the vision tower attends to stays, the rest is merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crop import ops
from crop.methods.base import Assignment, Features
from crop.methods.baselines.budget import ByFeatures, unit

TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class VisionZip(ByFeatures):
    """Keep the tokens that the vision tower attends to most, and merge the rest into a few contextual ones.

    Contextual tokens are spread evenly over the rest in reading order; every other token joins the most similar one.

    Source: VisionZip (arXiv 2412.04467), training-free. Departures: similarity of projected features, not of the
        tower's keys; the share is 10 of 64 at every budget; a tower without a class token ranks by the mean attention
        over all its tokens.
    """

    contextual: float = 10 / 64  # share of the kept tokens that are contextual, in [0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise ValueError(f"VisionZip: contextual must be in [0, 1), got {self.contextual}")

    def decide(self, features: Features, count: int) -> Assignment:
        size, device = len(features.tokens), features.tokens.device
        few = int(count * self.contextual)
        dominant = features.observed.argsort(descending=True, stable=True)[: count - few]
        if few == 0:
            return Assignment.of_kept(dominant, size)
        taken = torch.zeros(size, dtype=torch.uint8, device=device).index_fill_(0, dominant, 1)
        rest = taken.argsort(stable=True)[: size - len(dominant)]
        target = rest[torch.arange(few, device=device) * (len(rest) // few)]
        rows = unit(features.tokens)
        nearest = target[(rows[rest] @ rows[target].T).argmax(1)]
        leader_of = torch.arange(size, device=device).scatter(0, rest, nearest).scatter(0, target, target)
        return Assignment.of_leaders(leader_of, torch.cat([dominant, target]))

    def observe(self, tower: nn.Module, config: Any, watch: Callable[..., None]) -> None:
        """Attention that the tokens receive in the tower's layer whose output becomes the features, averaged over heads.

        From the class token where the tower has one, else the mean over all tokens.

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
        watch(layers[feature if feature < 0 else feature - 1].self_attn, read)
