"""Where the question looks (Region), where every vision token lies (VisionLayout), which tokens share a cell (PoolPlan).

Pure host code: numpy on the memory of CPU tensors, nothing of models, nothing of devices.
"""

from crop.geometry.layout import NEWLINE, PADDING, PATCH, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Box, Region

__all__ = ["NEWLINE", "PADDING", "PATCH", "Box", "PoolPlan", "Region", "VisionLayout"]
