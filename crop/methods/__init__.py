"""Methods: how many and which vision tokens stay. Pure policy, on the host."""

from crop.methods.base import Assignment, FeaturePooling, Features, Method, Selection
from crop.methods.compose import Compose, Pyramid
from crop.methods.ilp import InnerLLMPruning
from crop.methods.plc import PreLLMCompression
from crop.methods.registry import by_name

__all__ = [
    "Assignment",
    "Compose",
    "FeaturePooling",
    "Features",
    "InnerLLMPruning",
    "Method",
    "PreLLMCompression",
    "Pyramid",
    "Selection",
    "by_name",
]
