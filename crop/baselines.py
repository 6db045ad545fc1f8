"""Peers to compare with, see ``crop.methods.baselines``."""

from crop.methods.baselines import *  # noqa: F403
from crop.methods.baselines import __all__  # noqa: F401
