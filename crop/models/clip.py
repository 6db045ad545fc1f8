"""The towers of CLIP and SigLIP, whose tokens stand for patches one for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

TOWERS = ("clip_vision_model", "siglip_vision_model")  # model types


def class_tokens(vision_config: Any) -> int:
    """Tokens at the begin of a tower of this configuration that stand for no part of the picture: 1 or 0."""
    return int(vision_config.model_type == "clip_vision_model")


def tower_layers(tower: nn.Module) -> Sequence[nn.Module]:
    """The layers of a tower, the first one first."""
    return next(part.layers for part in tower.modules() if isinstance(getattr(part, "layers", None), nn.ModuleList))
