"""crop: region-guided pruning of vision tokens for Hugging Face vision-language models, training-free."""

from .build import build_info
from .estimate import Estimate, estimate
from .localizers import AttentionLocalizer, BoxLocalizer, Localizer, WholeLocalizer, encode, get_localizer
from .methods import Compose, InnerLLMPruning, Method, PreLLMCompression, Pyramid, Selection, by_name
from .ops import adaptive_pool, attention_mass, compact, region_topk, select, use_backend
from .patch import patch
from .plan import PoolPlan
from .region import Region, VisionLayout
from .share import share_vision
from .stats import PruneStats

__version__ = "0.1.0"

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
    "compact",
    "encode",
    "estimate",
    "get_localizer",
    "patch",
    "region_topk",
    "select",
    "share_vision",
    "use_backend",
]
