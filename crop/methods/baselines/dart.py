"""DART: tokens that duplicate no pivot stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crop.methods.base import ScoreView
from crop.methods.baselines.budget import unit
from crop.methods.ilp import InnerLLMPruning


@dataclass(frozen=True)
class Dart(InnerLLMPruning):
    """At an early decoder layer the tokens stay that are least like a few pivots.

    Pivots are the vision tokens, and the text tokens behind the image, with the longest keys (sum of absolute values). Pivots
    of the image stay; then each pivot, in turns, keeps the token that is least like it.

    Args:
        keep, layer: as in ``InnerLLMPruning``. pivots: of the image, and as many of the text.
    Source: DART (arXiv 2502.11494). Departures: likeness by keys, not by hidden states; pivots take turns, so that the
        budget is met exactly.
    """

    ring: int = 0
    pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pivots < 1:
            raise ValueError(f"Dart: pivots must be >= 1, got {self.pivots}")

    def score(self, query: Tensor, key: Tensor, view: ScoreView) -> Tensor:
        """Minus the best place that a token has in the order of a pivot, the least alike first; 1 for a pivot."""
        keys = key.transpose(1, 2).flatten(2).float()  # (batch, keys, heads * head_dim)
        filler = view.candidates < 0
        vision = keys[view.sample.unsqueeze(1), view.candidates.clamp(min=0)]
        row_key = view.visible_len - 1 if view.row_key is None else view.row_key
        text = _rows(keys, row_key.clamp(min=0))
        of_image = _longest(vision, ~filler, self.pivots)
        of_text = _longest(text, row_key >= 0, self.pivots)
        own = of_image.indices
        pivots = torch.cat([_rows(vision, own), _rows(text, of_text.indices)[view.sample]], 1)
        absent = torch.cat([of_image.values, of_text.values[view.sample]], 1) < 0
        alike = unit(pivots) @ unit(vision).transpose(1, 2)
        taken = filler.scatter(1, own, True)
        order = alike.masked_fill(taken.unsqueeze(1), torch.inf).argsort(dim=2, stable=True)
        turn = order.argsort(dim=2).masked_fill(absent.unsqueeze(2), alike.shape[2]).amin(1)
        return (-turn.float()).scatter(1, own, 1.0)


def _rows(of: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, n) of ``of`` (B, m, dim)."""
    return of.gather(1, index.unsqueeze(2).expand(-1, -1, of.shape[2]))


def _longest(keys: Tensor, real: Tensor, count: int) -> torch.return_types.topk:
    """The ``count`` longest of the keys (B, n, dim) that are ``real``, or fewer; where those are missing, of length -1."""
    length = keys.abs().sum(2).masked_fill(~real, -1)
    return length.topk(min(count, length.shape[1]), dim=1)
