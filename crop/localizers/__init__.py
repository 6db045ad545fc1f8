"""Localizers: question and image -> the region the question needs.

A localizer that is unsure returns the whole image with a low confidence, never a guess in silence.
"""

from crop.localizers.attention import Attention, AttentionLocalizer, score_tokens
from crop.localizers.base import BoxLocalizer, Localizer, WholeLocalizer, encode
from crop.localizers.boxes import find_region
from crop.localizers.cascade import CascadeLocalizer, UnionLocalizer
from crop.localizers.clip import ClipLocalizer
from crop.localizers.coarse import CoarseLocalizer, zoom
from crop.localizers.detector import DetectorLocalizer
from crop.localizers.head import Head, HeadLocalizer
from crop.localizers.ocr.localizer import OCRLocalizer
from crop.localizers.registry import LocalizerArguments, get_localizer, localizer_names, register_localizer
from crop.localizers.vision_cache import VisionCache, cache_vision
from crop.localizers.vlm import VLMLocalizer

__all__ = [
    "Attention",
    "AttentionLocalizer",
    "BoxLocalizer",
    "CascadeLocalizer",
    "ClipLocalizer",
    "CoarseLocalizer",
    "DetectorLocalizer",
    "Head",
    "HeadLocalizer",
    "Localizer",
    "LocalizerArguments",
    "OCRLocalizer",
    "UnionLocalizer",
    "VLMLocalizer",
    "VisionCache",
    "WholeLocalizer",
    "cache_vision",
    "encode",
    "find_region",
    "get_localizer",
    "localizer_names",
    "register_localizer",
    "score_tokens",
    "zoom",
]
