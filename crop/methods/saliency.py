"""Weights of pooling: a token counts the more, the less it looks like the rest of its image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crop.geometry.layout import PATCH, VisionLayout

SHARPNESS = 4.0  # a standard deviation more weighs exp(4) = 55 times; on the embedded model 3 to 6 answered alike
FARTHEST = 8.0  # standard deviations that still make a difference: float32 holds the weights
FLAT = 1e-3  # spread of cosine distances below which an image has nothing that stands out


def distinctness(tokens: Tensor) -> Tensor:
    """How unlike the mean of its image each of the tokens (N, D) is, N >= 1.

    Returns:
        (N,) float32 cosine distance to the mean, in standard deviations from the average distance.
    Source: own choice.
    """
    tokens = tokens.float()
    mean = tokens.mean(0)
    norm = torch.linalg.vector_norm(tokens, dim=1) * torch.linalg.vector_norm(mean)
    distance = 1 - tokens @ mean / norm.clamp(min=1e-12)  # a matrix product: the tokens are read, not copied
    spread, middle = torch.var_mean(distance, correction=0)
    return (distance - middle) / (spread.sqrt() + FLAT)


def patch_weights(tokens: Tensor) -> Tensor:
    """What the patches of an image (N, D), N >= 1, weigh in pooling: (N,) float32, ``exp(4 * distinctness)``."""
    return (SHARPNESS * distinctness(tokens).clamp(-FARTHEST, FARTHEST)).exp()


@torch.no_grad()
def saliency_weights(alone: Tensor, images: Sequence[tuple[int, VisionLayout]], embeds: Tensor) -> Tensor:
    """Weights for ``ops.adaptive_pool``, ``exp(4 * distinctness)``; constants for the gradient.

    Args:
        alone: (batch * seq_len,) bool, what is alone in its cell, on the device of ``embeds``.
        images: (sample, layout) of those that are pooled; each is judged by itself.
        embeds: (batch, seq_len, D).
    Returns:
        (batch * seq_len,) float32; 1 for text, newlines, padding and what is alone in its cell, which keeps its bits.
    """
    weight = torch.ones(embeds.shape[:2], dtype=torch.float32, device=embeds.device)
    for sample, layout in images:
        position = layout.position[layout.kind == PATCH]
        if len(position):
            first, last = int(position[0]), int(position[-1])
            # Positions that follow each other are a view.
            place = slice(first, last + 1) if last - first == len(position) - 1 else position.to(embeds.device)
            weight[sample, place] = patch_weights(embeds[sample, place])
    return weight.flatten().masked_fill(alone, 1.0)
