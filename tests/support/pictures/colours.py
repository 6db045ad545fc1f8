"""The pictures, and what is left of their colours."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

MARK = -7.0  # the colour of a newline


def coordinates(width: int, height: int) -> Image.Image:
    x = (np.arange(width) + 0.5) / width * 255
    y = (np.arange(height) + 0.5) / height * 255
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = x[None, :].round(), y[:, None].round(), 255
    return Image.fromarray(pixels)


def patch_colours(pictures: Tensor, processor: Any, patch: int) -> Tensor:
    """(pictures, rows, columns, 3): mean colour under each patch, undone from normalisation."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    cells = (torch.as_tensor(pictures) * std + mean).unfold(-2, patch, patch).unfold(-2, patch, patch)
    return cells.mean((-2, -1)).movedim(-3, -1).contiguous()


def tower(name: str, side: int, patch: int) -> Any:
    return getattr(transformers, name)(image_size=side, patch_size=patch)


def needs_torchvision(family: str, name: str, **settings: Any) -> Any:
    pytest.importorskip("torchvision", reason=f"transformers has no other image processor for {family}")
    module = importlib.import_module(f"transformers.models.{family}.image_processing_{family}")
    return getattr(module, name)(**settings)
