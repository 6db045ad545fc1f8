"""What differs between model families: where the vision tokens are, and where in the image each one looks."""

from crop.models.family import DecoderTraits, ModelFamily, Placed, Prompt
from crop.models.registry import families, family_of, register_family

__all__ = ["DecoderTraits", "ModelFamily", "Placed", "Prompt", "families", "family_of", "register_family"]
