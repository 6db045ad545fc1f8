"""What differs between model families: where the vision tokens are, and where in the image each one looks."""

from crop.models.family import ModelFamily, Placed, Prompt
from crop.models.registry import ADAPTERS, family_of

__all__ = ["ADAPTERS", "ModelFamily", "Placed", "Prompt", "family_of"]
