"""Weights of pooling: a token counts the more, the less it looks like the rest of its image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crop import ops
from crop.geometry.layout import PATCH, VisionLayout


def patches_of(images: Sequence[tuple[int, VisionLayout]], seq_len: int) -> Tensor:
    """(num_images, most) int64 places of each image's patches among the (batch * seq_len) tokens, -1 = filler."""
    places = [layout.position.numpy()[layout.kind.numpy() == PATCH] + sample * seq_len for sample, layout in images]
    found = np.full((len(places), max(map(len, places))), -1, dtype=np.int64)
    for row, own in zip(found, places, strict=True):
        row[: len(own)] = own
    return torch.from_numpy(found)


@torch.no_grad()
def saliency_weights(alone: Tensor, patches: Tensor, embeds: Tensor) -> Tensor:
    """Weights for ``ops.adaptive_pool``, by ``ops.saliency``; constants for the gradient.

    Args:
        alone: (batch * seq_len,) bool, what is alone in its cell, on the device of ``embeds``.
        patches: as by ``patches_of``, of the images that are pooled; each is judged by itself.
        embeds: (batch, seq_len, D).
    Returns:
        (batch * seq_len,) float32; 1 for text, newlines, padding and what is alone in its cell, which keeps its bits.
    """
    return ops.saliency(embeds.flatten(0, 1), patches, alone=alone)
