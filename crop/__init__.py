"""crop: region-guided pruning of vision tokens for Hugging Face vision-language models, training-free."""

import importlib
from typing import Any

from crop import baselines, reference
from crop.cost.estimate import Estimate, estimate
from crop.geometry import Pieces, PoolPlan, Region, VisionLayout
from crop.localizers.attention import AttentionLocalizer
from crop.localizers.base import BoxLocalizer, Localizer, WholeLocalizer, encode
from crop.localizers.coarse import CoarseLocalizer, zoom
from crop.localizers.registry import get_localizer, register_localizer
from crop.localizers.vision_cache import cache_vision
from crop.methods import (
    Assignment,
    Compose,
    DiverseCompression,
    EncoderPruning,
    FeaturePooling,
    Features,
    InnerLLMPruning,
    MergeView,
    Method,
    PreLLMCompression,
    Pyramid,
    ScoreView,
    Selection,
    by_name,
    register_method,
)
from crop.models import DecoderTraits, ModelFamily, register_family
from crop.ops import adaptive_pool, attention_mass, compact, region_topk, select, use_backend
from crop.ops.build_info import build_info
from crop.patching.patch import patch
from crop.patching.stats import PrefillStats, PruneStats

__version__ = "0.2.0"

share_vision = cache_vision  # its name until 0.2


def __getattr__(name: str) -> Any:
    if name == "embedded":  # needs Pillow, which `import crop` does not
        return importlib.import_module("crop.embedded")
    raise AttributeError(f"module 'crop' has no attribute {name!r}")


__all__ = [
    "Assignment",
    "AttentionLocalizer",
    "BoxLocalizer",
    "CoarseLocalizer",
    "Compose",
    "DecoderTraits",
    "DiverseCompression",
    "EncoderPruning",
    "Estimate",
    "FeaturePooling",
    "Features",
    "InnerLLMPruning",
    "Localizer",
    "MergeView",
    "Method",
    "ModelFamily",
    "Pieces",
    "PoolPlan",
    "PreLLMCompression",
    "PrefillStats",
    "PruneStats",
    "Pyramid",
    "Region",
    "ScoreView",
    "Selection",
    "VisionLayout",
    "WholeLocalizer",
    "adaptive_pool",
    "attention_mass",
    "baselines",
    "build_info",
    "by_name",
    "cache_vision",
    "compact",
    "encode",
    "estimate",
    "get_localizer",
    "patch",
    "reference",
    "region_topk",
    "register_family",
    "register_localizer",
    "register_method",
    "select",
    "share_vision",
    "use_backend",
    "zoom",
]
