"""Pre-LLM Compression: vision tokens are pooled before the language model, mildly in the region, strongly outside."""

from __future__ import annotations

from dataclasses import dataclass

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.geometry.strides import check_strides, plan_by_budget, plan_by_strides
from crop.methods.base import POOL_MODES, Method, PoolMode, budget_of, check_choice, check_count, check_keep


@dataclass(frozen=True)
class PreLLMCompression(Method):
    """PLC: variable-ratio adaptive pooling before the language model, training-free.

    The region is pooled at stride ``inside``, a ring around it at ``context``, the rest at ``outside``. With ``keep``
    the strides are picked instead, and the number of tokens is met exactly (``plan_by_budget``).

    Args:
        inside, context, outside: tokens per side of a cell, ascending in 1..16; left alone when ``keep`` is given.
        ring: width of the ring in tokens.
        mode: "distinct", "mean" or "max" of the members, see ``Method``.
        keep: None, a float in (0, 1] (fraction of the image's tokens) or an int >= 1 (tokens).
    Raises:
        ValueError, TypeError: an argument out of its range, or strides together with ``keep``.
    Source: own choice; it stands where CROP (arXiv 2505.21233) has *learned* queries and must not be credited with that
        paper's PLC figures.
    """

    inside: int = 1
    context: int = 2
    outside: int = 4
    ring: int = 2
    mode: PoolMode = "distinct"
    keep: float | int | None = None

    def __post_init__(self) -> None:
        op = "PreLLMCompression"
        check_strides(op, self._strides)
        check_count(op, "ring", self.ring, 0)
        check_choice(op, "mode", self.mode, POOL_MODES)
        if self.keep is not None:
            check_keep(op, self.keep)
            if self._strides != (1, 2, 4):
                raise ValueError(
                    f"{op}: strides must be left at their defaults when keep is given, got {self._strides}"
                )

    @property
    def _strides(self) -> tuple[int, int, int]:
        return self.inside, self.context, self.outside

    @property
    def pool_mode(self) -> PoolMode:
        return self.mode

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | None:
        """Cells of one image, none of whose tokens is pruned yet; None if every token would stay as it is.

        Raises:
            ValueError: ``keep`` is a token count larger than the image has.
        """
        if len(layout) == 0:
            return None
        if self.keep is None:
            plan = plan_by_strides(layout, region, self.ring, self._strides)
        else:
            budget = budget_of("PreLLMCompression", self.keep, layout)
            if budget == len(layout):
                return None
            plan = plan_by_budget(layout, region, self.ring, budget)
        return None if plan.is_identity else plan
