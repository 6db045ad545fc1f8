"""Inner-LLM Pruning: vision tokens leave at the input of a decoder layer, by region and attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from crop.geometry.layout import PADDING, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.geometry.strides import OUTSIDE
from crop.methods.base import (
    Method,
    Selection,
    budget_alone,
    budget_of,
    check_choice,
    check_count,
    check_keep,
)


@dataclass(frozen=True)
class InnerLLMPruning(Method):
    """ILP: drop vision tokens at the input of a decoder layer, guided by region and attention.

    ``budget`` keeps exactly ``keep`` tokens: those of the region, then of the ring, then, where
    asked for, a thin uniform floor (one token per ``floor`` x ``floor`` cell outside, for models whose
    attention is no guard against a wrong box), then the rest, by attention score within each tier;
    processor padding comes last.
    ``soft`` keeps exactly ``keep`` tokens by score alone, multiplied inside the region: a prior, not
    a promise. ``strict`` keeps exactly the tokens of the region, without scores.

    FastV (arXiv 2403.06764) is ``InnerLLMPruning(keep, layer=2, rows="last")`` with the whole image
    as region: one tier, ranked by the attention of the last row.

    Args:
        keep: float in (0, 1] = fraction of the image's original tokens, int >= 1 = token count;
            tokens already pooled away count as pruned. Not used by "strict".
        mode: "budget", "soft" or "strict".
        layer: decoder layer at whose input tokens leave, >= 1.
        rows: scoring queries, "text" (all after the image), "raters" or "last", see ``Method``.
        ring: width of the ring in tokens ("budget").
        floor: side of a floor cell in tokens, 0 for no floor ("budget"); ``bench/bench_regions.py`` tells why 0.
        region_weight: factor of the scores inside the region ("soft").
        rope: False scores without positions, which takes away the liking for the bottom of the image
            (arXiv 2412.13180); only for prompts that are not preceded by a cache.
    Raises:
        ValueError, TypeError: an argument out of its range.
    Source: CROP (arXiv 2505.21233) for "strict"; layer, budget rule, ring and floor are our choice,
        since it publishes none.
    """

    keep: float | int = 0.11
    mode: Literal["budget", "soft", "strict"] = "budget"
    layer: int = 2
    rows: Literal["text", "last", "raters"] = "text"
    ring: int = 1
    floor: int = 0
    region_weight: float = 4.0
    rope: bool = True

    def __post_init__(self) -> None:
        op = "InnerLLMPruning"
        check_keep(op, self.keep)
        check_choice(op, "mode", self.mode, ("budget", "soft", "strict"))
        check_count(op, "layer", self.layer, 1)
        check_choice(op, "rows", self.rows, ("text", "last", "raters"))
        check_count(op, "ring", self.ring, 0)
        check_count(op, "floor", self.floor, 0)
        if not (math.isfinite(self.region_weight) and self.region_weight > 0):
            raise ValueError(f"{op}: region_weight must be finite and > 0, got {self.region_weight}")
        if not isinstance(self.rope, bool):
            raise TypeError(f"{op}: rope must be True or False, got {self.rope!r}")

    def select(self, layout: VisionLayout, region: Region) -> Selection | None:
        """Tiers of the tokens of one image.

        Args:
            layout: its tokens as they reach ``layer``.
            region: what the question needs.
        Returns:
            Selection, or None if every token stays. Priorities in "budget" mode: 3 region, 2 ring,
            1 floor, 0 rest, -1 padding; all one higher where even padding is needed to fill the
            budget; "soft" has one tier for all but padding. In "strict" mode: 1 region, -1 all others.
        Raises:
            ValueError: ``keep`` is a token count larger than the image had.
        """
        if self.mode == "strict":
            inside = layout.inside(region)
            num_keep = int(inside.sum())
            if num_keep == len(layout):
                return None
            return Selection(num_keep, inside.to(torch.int8) * 2 - 1, needs_scores=False)
        num_keep = budget_of("InnerLLMPruning", self.keep, layout)
        if num_keep == len(layout):
            return None
        weight = None
        if self.mode == "soft":
            priority = np.zeros(len(layout), dtype=np.int8)
            weight = torch.where(layout.inside(region), self.region_weight, 1.0).float()
        else:
            level = layout.levels(region, self.ring)
            priority = np.array((3, 2, 0), dtype=np.int8)[level.numpy()]
            if self.floor:
                priority[self._floor(layout, level)] = 1
        kind = layout.kind.numpy()
        priority[kind == PADDING] = -1
        if num_keep > np.count_nonzero(kind != PADDING):
            priority += 1
        return Selection(num_keep, torch.from_numpy(priority), weight)

    def least(self, tokens: int) -> dict[int, int]:
        """The budget; "strict" may find an empty region."""
        return {0: tokens, self.layer: 0 if self.mode == "strict" else budget_alone(self.keep, tokens)}

    def _floor(self, layout: VisionLayout, level: Tensor) -> np.ndarray:
        """Indices of the patches nearest to the middle of each floor cell outside the ring."""
        label = layout.block(self.floor).masked_fill(layout.group(level) != OUTSIDE, -1)
        return PoolPlan.from_labels(label, layout.row, layout.col, level).leader.numpy()
