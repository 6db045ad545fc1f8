"""Methods: how many and which vision tokens stay. Policy on the host; scores and merging on the device."""

from crop.methods.base import Assignment, FeaturePooling, Features, MergeView, Method, ScoreView, Selection
from crop.methods.compose import Compose, Pyramid
from crop.methods.diverse import DiverseCompression
from crop.methods.encoder import EncoderPruning
from crop.methods.ilp import InnerLLMPruning
from crop.methods.plc import PreLLMCompression
from crop.methods.registry import by_name, method_names, register_method

__all__ = [
    "Assignment",
    "Compose",
    "DiverseCompression",
    "EncoderPruning",
    "FeaturePooling",
    "Features",
    "InnerLLMPruning",
    "MergeView",
    "Method",
    "PreLLMCompression",
    "Pyramid",
    "ScoreView",
    "Selection",
    "by_name",
    "method_names",
    "register_method",
]
