"""Every supported family, tiny: unmodified transformers classes with random weights, and prompts as their processors
would write them. ``FAMILIES`` is what the contract of `test_families.py` runs over and what README's table lists.
"""

from tests.support.tiny_models import VIDEO

from .batches import Batch, Sample, make_batch, make_sample, standard_batch
from .entry import NUM_LAYERS, TEXT, Family, Image
from .families import FAMILIES, build_model, get_config

__all__ = [
    "FAMILIES",
    "NUM_LAYERS",
    "TEXT",
    "VIDEO",
    "Batch",
    "Family",
    "Image",
    "Sample",
    "build_model",
    "get_config",
    "make_batch",
    "make_sample",
    "standard_batch",
]
