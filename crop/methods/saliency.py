"""Weights of pooling: a token counts the more, the less it looks like the rest of its image."""

from __future__ import annotations

import torch
from torch import Tensor

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


def saliency_weights(tokens: Tensor) -> Tensor:
    """What each token of one image weighs in its cell.

    Args:
        tokens: (N, D), N >= 1.
    Returns:
        (N,) float32, ``exp(4 * distinctness)``.
    """
    return (SHARPNESS * distinctness(tokens).clamp(-FARTHEST, FARTHEST)).exp()
