"""CDPruner: tokens that are diverse and relevant to the question stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crop.methods.base import Assignment, Features
from crop.methods.baselines.budget import ByFeatures, unit


@dataclass(frozen=True)
class CDPruner(ByFeatures):
    """Keep tokens that are diverse and relevant to the question: a determinantal point process conditioned on the text.

    The kernel is ``diag(r) S diag(r)`` with cosine similarity S and relevance r; greedy MAP.

    Source: CDPruner (arXiv 2506.10967); greedy MAP by incremental Cholesky (arXiv 1709.05135). Departure: relevance is
        the cosine between a token and the mean embedding of the text after the image, scaled to [0, 1], where the paper
        has a CLIP text encoder.
    """

    def decide(self, features: Features, count: int) -> Assignment:
        rows = unit(features.tokens)
        relevance = rows @ unit(features.text.float().mean(0))
        low, high = relevance.aminmax()
        relevance = (relevance - low) / (high - low).clamp(min=1e-6)
        kernel = relevance[:, None] * (rows @ rows.T) * relevance
        gain = kernel.diagonal().clone()
        factor = rows.new_zeros(count, len(rows))
        chosen = torch.empty(count, dtype=torch.int64, device=rows.device)
        for step in range(count):
            best = gain.argmax().unsqueeze(0)
            chosen[step : step + 1] = best
            # Beyond the rank of the kernel nothing is gained any more; the floor keeps that finite.
            scale = gain.index_select(0, best).clamp(min=1e-9).sqrt()
            known = factor[:step].index_select(1, best).squeeze(1) @ factor[:step]
            factor[step] = (kernel.index_select(0, best).squeeze(0) - known) / scale
            gain = (gain - factor[step] ** 2).clamp(min=0).index_fill(0, chosen[: step + 1], -torch.inf)
        return Assignment.of_kept(chosen, len(rows))
