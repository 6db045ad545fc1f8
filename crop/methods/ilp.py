"""Inner-LLM Pruning: vision tokens leave at the input of a decoder layer, by region and attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from crop.geometry.layout import PADDING, VisionLayout
from crop.geometry.region import Region
from crop.methods.base import Method, Selection, budget_of, check_choice, check_count, check_keep


@dataclass(frozen=True)
class InnerLLMPruning(Method):
    """ILP: drop vision tokens at the input of a decoder layer, guided by region and attention.

    ``budget`` keeps exactly ``keep`` tokens: those of the region, then of the ring, then the rest, by score within each
    tier; processor padding comes last. ``strict`` keeps exactly the tokens of the region, without scores.

    FastV (arXiv 2403.06764) is ``InnerLLMPruning(keep, layer=2, rows="last")`` with the whole image as region: one
    tier, ranked by the attention of the last row.

    Args:
        keep: float in (0, 1] = fraction of the image's original tokens, int >= 1 = token count; tokens already pooled
            away count as pruned. Not used by "strict".
        mode: "budget" or "strict".
        layer: decoder layer at whose input tokens leave, >= 1; "auto": the ``crop_layer`` of the
            language model's config, 2 where there is none, or the next layer that can score.
        rows: scoring queries, "text" (all after the image) or "last", see ``Method``.
        ring: width of the ring in tokens ("budget").
        rope: False scores without positions, which takes away the liking for the bottom of the image
            (arXiv 2412.13180); only for prompts that are not preceded by a cache.
    Raises:
        ValueError, TypeError: an argument out of its range.
    Source: CROP (arXiv 2505.21233) for "strict"; layer, budget rule and ring are our choice, since it publishes none.
    """

    keep: float | int = 0.11
    mode: Literal["budget", "strict"] = "budget"
    layer: int | Literal["auto"] = "auto"
    rows: Literal["text", "last"] = "text"
    ring: int = 1
    rope: bool = True

    def __new__(cls, *args: Any, **options: Any) -> InnerLLMPruning:
        for name in ("floor", "region_weight"):
            if name in options:
                raise TypeError(
                    f"InnerLLMPruning: {name} is gone since 0.2: leave it out; a region's tokens come first anyway"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        op = "InnerLLMPruning"
        check_keep(op, self.keep)
        if self.mode == "soft":
            raise ValueError(
                f"{op}: mode must be one of ('budget', 'strict'), got 'soft', which is gone since 0.2; use 'budget'"
            )
        check_choice(op, "mode", self.mode, ("budget", "strict"))
        if self.layer is None:
            raise ValueError(
                f"{op}: layer must be an int >= 1 or 'auto', got None; leave the method out to prune nothing"
            )
        if self.layer != "auto":
            check_count(op, "layer", self.layer, 1)
        if self.rows == "raters":
            raise ValueError(f"{op}: rows must be one of ('text', 'last'), got 'raters'; use crop.baselines.SparseVLM")
        check_choice(op, "rows", self.rows, ("text", "last"))
        check_count(op, "ring", self.ring, 0)
        if not isinstance(self.rope, bool):
            raise TypeError(f"{op}: rope must be True or False, got {self.rope!r}")

    def select(self, layout: VisionLayout, region: Region) -> Selection | None:
        """Tiers of the tokens of one image as they reach ``layer``; None if every token stays.

        Priorities in "budget" mode: 2 region, 1 ring, 0 rest, -1 padding; all one higher where even padding is needed
        to fill the budget. In "strict" mode: 1 region, -1 all others.

        Raises:
            ValueError: ``keep`` is a token count larger than the image had.
        """
        if self.mode == "strict":
            inside = layout.inside(region)
            num_keep = int(inside.sum())
            if num_keep == len(layout):
                return None
            return Selection(num_keep, inside.to(torch.int8) * 2 - 1, needs_scores=False)
        count, num_keep = len(layout), budget_of("InnerLLMPruning", self.keep, layout)
        if num_keep == count:
            return None
        priority = 2 - layout.levels(region, self.ring).numpy().view(np.int8)
        padding = layout.kind.numpy() == PADDING
        priority[padding] = -1
        if num_keep > count - np.count_nonzero(padding):
            priority += 1
        return Selection(num_keep, torch.from_numpy(priority))
