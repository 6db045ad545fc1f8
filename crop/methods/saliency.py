"""Weights of pooling: a token counts the more, the less it looks like the rest of its image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crop.geometry.layout import PATCH
from crop.geometry.pooling import PoolPlan

if TYPE_CHECKING:
    from crop.patching.batch_plan import ImagePlan

SHARPNESS = 4.0  # a standard deviation more weighs exp(4) = 55 times; on the embedded model 3 to 6 answered alike
FARTHEST = 8.0  # standard deviations that still make a difference: float32 holds the weights
FLAT = 1e-3  # spread of cosine distances below which an image has nothing that stands out


def distinctness(tokens: Tensor) -> Tensor:
    """How unlike the mean of its image each token is.

    Args:
        tokens: (N, D) of one image, N >= 1.
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


@torch.no_grad()
def distinct_weights(plan: PoolPlan, images: Sequence[ImagePlan], embeds: Tensor) -> Tensor:
    """Weights for ``ops.adaptive_pool``, each image judged by itself; constants for the gradient.

    Args:
        plan: cells over the flattened tokens of the batch.
        images: of the chunk; those that are pooled get weights.
        embeds: (batch, seq_len, D) input of the language model.
    Returns:
        (batch * seq_len,) float32; 1 for text, newlines, padding and what is alone in its cell, which keeps its bits.
    """
    weight = torch.ones(embeds.shape[:2], dtype=torch.float32, device=embeds.device)
    for image in images:
        patch = image.layout.kind == PATCH
        if image.plan is not None and patch.any():
            place = _place(image.layout.position[patch], embeds.device)
            apart = distinctness(embeds[image.sample, place]).clamp(-FARTHEST, FARTHEST)
            weight[image.sample, place] = (SHARPNESS * apart).exp()
    alone = plan.counts[plan.inverse.long()] == 1
    return weight.flatten().masked_fill(alone.to(embeds.device), 1.0)


def _place(position: Tensor, device: torch.device) -> slice | Tensor:
    """Index of ascending positions: a view where they follow each other."""
    first, last = int(position[0]), int(position[-1])
    return slice(first, last + 1) if last - first == len(position) - 1 else position.to(device)
