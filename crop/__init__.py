"""crop: region-guided pruning of vision tokens for Hugging Face vision-language models, training-free."""

from crop.cost.estimate import Estimate, estimate
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.localizers.attention import AttentionLocalizer
from crop.localizers.base import BoxLocalizer, Localizer, WholeLocalizer, encode
from crop.localizers.registry import get_localizer, register_localizer
from crop.localizers.vision_cache import cache_vision
from crop.methods.base import Method, Selection
from crop.methods.compose import Compose, Pyramid
from crop.methods.ilp import InnerLLMPruning
from crop.methods.plc import PreLLMCompression
from crop.methods.registry import by_name
from crop.ops import adaptive_pool, attention_mass, compact, region_topk, select
from crop.ops.build_info import build_info
from crop.ops.dispatch import use_backend
from crop.patching.patch import patch
from crop.patching.stats import PruneStats

__version__ = "0.1.0"

share_vision = cache_vision  # its former name

__all__ = [
    "AttentionLocalizer",
    "BoxLocalizer",
    "Compose",
    "Estimate",
    "InnerLLMPruning",
    "Localizer",
    "Method",
    "PoolPlan",
    "PreLLMCompression",
    "PruneStats",
    "Pyramid",
    "Region",
    "Selection",
    "VisionLayout",
    "WholeLocalizer",
    "adaptive_pool",
    "attention_mass",
    "build_info",
    "by_name",
    "cache_vision",
    "compact",
    "encode",
    "estimate",
    "get_localizer",
    "patch",
    "region_topk",
    "register_localizer",
    "select",
    "share_vision",
    "use_backend",
]
