"""What a token sees in a layer, of the tokens at original positions; the reference for masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.batches import Sample


def visible(mask: str, sample: Sample, places: Tensor, kind: str, config: Any) -> Tensor | None:
    """(rows, rows) bool: which of the rows at `places` each sees; None where a layer is no attention.

    Args:
        mask: as in `Family`. kind: of the layer. config: of the language model.
    """
    if kind not in ("full_attention", "sliding_attention"):
        return None
    row, key = places[:, None], places[None]
    seen = key <= row
    if mask == "prefix":
        seen = seen | (key < sample.prompt_length)
    if mask == "image" or (mask == "image in windows" and kind == "sliding_attention"):
        seen = seen | same_image(sample, row, key)
    if kind == "sliding_attention":
        seen = seen & (row - key < config.sliding_window)
    return seen | same_image(sample, row, key) if mask == "image beyond windows" else seen


def same_image(sample: Sample, row: Tensor, key: Tensor) -> Tensor:
    """Which positions are of one image, or of one frame of a video: vision tokens without text between them."""
    vision = torch.zeros(len(sample.ids), dtype=torch.bool)
    vision[[position for span in sample.spans() for position in span]] = True
    block = torch.where(vision, (~vision).cumsum(0), -1)
    return (block[row] == block[key]) & vision[row]
