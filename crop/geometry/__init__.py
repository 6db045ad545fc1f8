"""Where the question looks (Region), where every vision token lies (VisionLayout), which tokens share a cell (PoolPlan).

Host code: numpy on the memory of CPU tensors, nothing of models; plans of cells can be moved to and made on a device.
"""

from crop.geometry.layout import NEWLINE, PADDING, PATCH, VisionLayout
from crop.geometry.pieces import Encoding, Pieces
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Box, Region

__all__ = ["NEWLINE", "PADDING", "PATCH", "Box", "Encoding", "Pieces", "PoolPlan", "Region", "VisionLayout"]
