"""Methods: how many and which vision tokens stay. Pure policy, on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from crop.late import LatePlan
from crop.plan import MAX_STRIDE, OUTSIDE, PoolPlan, build_plan, check_strides, fit_strides
from crop.region import PADDING, Region, VisionLayout

PoolMode = Literal["mean", "max", "distinct"]
POOL_MODES = get_args(PoolMode)

# Of the way to the last token count, on a logarithmic scale, pooling goes this part. An early layer's attention chooses well for
# a question about a part of the image, less so for one about all of it: with half of the way the embedded model did worse.
POOL_SHARE = 0.75


@dataclass(frozen=True, eq=False)
class Selection:
    """What ``ops.select`` needs to know to prune one image.

    Args:
        num_keep: tokens to keep.
        priority: (N,) int8, higher first whatever the score; negative = never.
        weight: (N,) float32 factor of the score, or None for 1.
        needs_scores: False if the priorities alone decide.
    """

    num_keep: int
    priority: Tensor
    weight: Tensor | None = None
    needs_scores: bool = True


def check_keep(op: str, keep: float | int) -> None:
    """Refuse what is neither a fraction in (0, 1] nor a token count: TypeError or ValueError in the name of ``op``."""
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"{op}: keep must be a float in (0, 1] or an int >= 1, got {keep!r}")
    if isinstance(keep, Integral):
        if keep < 1:
            raise ValueError(f"{op}: keep as a token count must be >= 1, got {keep}")
    elif not 0.0 < keep <= 1.0:  # also False for NaN
        raise ValueError(f"{op}: keep as a fraction must be in (0, 1], got {keep}")


def budget_of(op: str, keep: float | int, layout: VisionLayout) -> int:
    """Tokens that ``keep`` allows for this image, in [1, len(layout)]; ValueError: a count above its original tokens."""
    if isinstance(keep, Integral):
        if keep > layout.num_original:
            raise ValueError(f"{op}: keep as a token count must be <= num_original={layout.num_original}, got {keep}")
        count = int(keep)
    else:
        count = round(keep * layout.num_original)
    return min(max(count, 1), len(layout))


def budget_alone(keep: float | int, tokens: int) -> int:
    """As ``budget_of`` where no more is known of an image than its number of tokens."""
    count = int(keep) if isinstance(keep, Integral) else round(keep * tokens)
    return min(max(count, 1), tokens)


def _check_count(op: str, name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{op}: {name} must be >= {low}, got {value}")


def _check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}")


class Method:
    """A pruning policy. The base keeps everything; a method overrides ``plan``, ``select`` or both.

    ``layer``: decoder layer at whose input ``select`` applies, None if it never does.
    ``rows``: queries whose attention scores the tokens: "text" (all after the image), "raters" (those of them that look
        at the image more than average) or "last".
    ``rope``: whether the scores know positions; False takes query and key before the rotary embedding.
    ``pool_mode``: reduction of a cell of ``plan``: "mean", "max", or "distinct", a mean in which a token weighs the more,
        the less it looks like the rest of its image (``crop.distinct``).
    ``cuts``: the methods whose ``select`` applies, one per layer where tokens leave, in ascending order; of itself a
        method is its only cut.
    ``salience``: whether late plans want the attention inside the vision tower.
    """

    layer: int | None = None
    rows: Literal["text", "last", "raters"] = "text"
    rope: bool = True
    pool_mode: PoolMode = "mean"
    salience: bool = False

    @property
    def cuts(self) -> tuple[Method, ...]:
        return () if self.layer is None else (self,)

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | LatePlan | None:
        """How to pool the tokens of one image before the language model; None: not at all.

        A ``LatePlan`` says how many tokens it will leave, and decides which when their features are there.
        """
        return None

    def select(self, layout: VisionLayout, region: Region) -> Selection | None:
        """What to keep of one image at ``layer``; None: all that came so far.

        ``layout`` is the one after pooling, at every cut. Of what an earlier cut left, a later one keeps ``num_keep``
        (all, if there are no more), by the order of its own ``Selection``; there a negative priority means last.
        """
        return None

    def least(self, tokens: int) -> dict[int, int]:
        """The fewest of an image's ``tokens`` that can be left, by the first decoder layer that sees no more, from 0 on.

        Known before the image's geometry is: what cannot pay need not be planned.
        """
        return {0: 0}

    def recycle(self, num_keep: int, num_candidates: int) -> tuple[int, int]:
        """Of one image at ``layer``: how many of the kept tokens take others in, and how many they take in."""
        return 0, 0


@lru_cache(maxsize=64)
def plan_by_strides(layout: VisionLayout, region: Region, ring: int, strides: tuple[int, int, int]) -> PoolPlan:
    """``build_plan`` for the levels of a region; cached by value, hence shared: do not modify.

    Args:
        layout: the tokens of one image.
        region: what the question needs.
        ring: width of the ring in tokens.
        strides: (inside, context, outside).
    Returns:
        PoolPlan over all tokens of ``layout``.
    """
    return build_plan(layout, layout.levels(region, ring), strides)


@lru_cache(maxsize=64)
def plan_by_budget(layout: VisionLayout, region: Region, ring: int, budget: int) -> PoolPlan:
    """Plan with exactly ``budget`` cells; cached by value, hence shared: do not modify.

    The mildest strides that fit (``fit_strides``; 16 everywhere if none do) make a first plan. Its
    cells are ranked by group (inside, ring, outside, newline, padding), then by the signed distance
    of the leader to the region, then by reading order. Spare tokens split the first cells into
    single tokens; the last cell touched gives up only as many members as are paid for, the nearest
    first. If even stride 16 gives too many cells, the last ones are dropped.

    Args:
        layout: the tokens of one image.
        region: what the question needs.
        ring: width of the ring in tokens.
        budget: cells to end with, in [1, len(layout)].
    Returns:
        PoolPlan with ``budget`` cells.
    Source: own choice; splitting to single tokens widens the part seen at full resolution.
    """
    level = layout.levels(region, ring)
    plan = build_plan(layout, level, fit_strides(layout, level, budget) or (MAX_STRIDE,) * 3)
    if plan.num_out == budget:
        return plan
    leader, counts, label = plan.leader.numpy(), plan.counts.numpy(), plan.inverse.numpy()
    distance = region.distance(layout.center).numpy()
    group = layout.group(level).numpy()
    rank = np.lexsort((distance[leader], group[leader]))  # stable: ties in reading order
    chosen = np.zeros(plan.num_out, dtype=bool)
    if plan.num_out > budget:
        chosen[rank[budget:]] = True
        label = np.where(chosen[label], -1, label)
    else:
        spare = budget - plan.num_out
        gain = (counts[rank] - 1).cumsum()
        whole = int(np.searchsorted(gain, spare, side="right"))
        chosen[rank[:whole]] = True
        single = chosen[label]
        left = spare - (int(gain[whole - 1]) if whole else 0)
        if left:
            begin, end = plan.offsets[rank[whole] :][:2].tolist()
            members = plan.members[begin:end].numpy()
            single[members[distance[members].argsort(kind="stable")[:left]]] = True
        label = np.where(single, plan.num_out + np.arange(len(label)), label)
    label = torch.from_numpy(label.astype(np.int64))
    return PoolPlan.from_labels(label, layout.row, layout.col, level)


@dataclass(frozen=True)
class PreLLMCompression(Method):
    """PLC: variable-ratio adaptive pooling before the language model, training-free.

    The region is pooled at stride ``inside``, a ring around it at ``context``, the rest at
    ``outside``. With ``keep`` the strides are picked instead, and the number of tokens is met
    exactly (``plan_by_budget``).

    Args:
        inside, context, outside: tokens per side of a cell, ascending in 1..16; to be left alone
            when ``keep`` is given.
        ring: width of the ring in tokens.
        mode: "distinct", "mean" or "max" of the members, see ``Method``.
        keep: None, a float in (0, 1] (fraction of the image's tokens) or an int >= 1 (tokens).
    Raises:
        ValueError, TypeError: an argument out of its range, or strides together with ``keep``.
    Source: own choice; it stands where CROP (arXiv 2505.21233) has *learned* queries and must not
        be credited with that paper's PLC figures.
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
        _check_count(op, "ring", self.ring, 0)
        _check_choice(op, "mode", self.mode, POOL_MODES)
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

    def least(self, tokens: int) -> dict[int, int]:
        """The budget, or as if all were outside the region."""
        return {0: tokens // self.outside**2 if self.keep is None else budget_alone(self.keep, tokens)}

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | None:
        """Cells of one image.

        Args:
            layout: its tokens, none pruned yet.
            region: what the question needs.
        Returns:
            PoolPlan, or None if every token would stay as it is.
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
        _check_choice(op, "mode", self.mode, ("budget", "soft", "strict"))
        _check_count(op, "layer", self.layer, 1)
        _check_choice(op, "rows", self.rows, ("text", "last", "raters"))
        _check_count(op, "ring", self.ring, 0)
        _check_count(op, "floor", self.floor, 0)
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


@dataclass(frozen=True)
class Pyramid(Method):
    """Several cuts: fewer tokens the deeper the layer.

    Args:
        stages: methods that prune inside the decoder, their layers ascending; every ``keep`` refers to the original
            tokens.
    Raises:
        TypeError: not methods of one cut. ValueError: none, or layers that do not ascend.
    Source: PyramidDrop (arXiv 2410.17247), which halves the tokens at three layers by the attention of the last row:
        ``Pyramid.steps((8, 16, 24), keep=0.5, rows="last", floor=0)`` without a region. That cuts can be led by a
        region is our addition.
    """

    stages: tuple[Method, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            if not isinstance(stage, Method) or stage.cuts != (stage,):
                raise TypeError(f"Pyramid: stages must be methods of one cut each, got {stage!r}")
        layers = [stage.layer for stage in self.stages]
        if not layers or layers != sorted(set(layers)):
            raise ValueError(f"Pyramid: stages must have one or more layers that ascend, got {layers}")

    @property
    def cuts(self) -> tuple[Method, ...]:
        return self.stages

    def least(self, tokens: int) -> dict[int, int]:
        """That of every stage."""
        return {layer: count for stage in self.stages for layer, count in stage.least(tokens).items()}

    @classmethod
    def steps(cls, layers: Sequence[int], keep: float = 0.5, **more: Any) -> Pyramid:
        """``InnerLLMPruning`` at every one of ``layers``, each to the fraction ``keep`` of what came before.

        Args:
            layers: decoder layers, ascending. keep: in (0, 1]. more: of ``InnerLLMPruning``.
        """
        return cls(tuple(InnerLLMPruning(keep**n, layer=layer, **more) for n, layer in enumerate(layers, start=1)))


@dataclass(frozen=True)
class Compose(Method):
    """Both stages: one method pools before the language model, another prunes inside it.

    Args:
        plc: gives ``plan`` and ``pool_mode``.
        ilp: gives ``cuts`` (or ``select``, ``layer`` and ``rows``); its fractions refer to the original tokens.
    Raises:
        TypeError: not methods.
    Source: CROP (arXiv 2505.21233) names the two; joining them training-free is our choice.
    """

    plc: Method
    ilp: Method

    def __post_init__(self) -> None:
        for name in ("plc", "ilp"):
            if not isinstance(getattr(self, name), Method):
                raise TypeError(f"Compose: {name} must be a Method, got {getattr(self, name)!r}")

    @property
    def cuts(self) -> tuple[Method, ...]:
        return self.ilp.cuts

    @property
    def layer(self) -> int | None:
        return self.ilp.layer

    @property
    def rows(self) -> Literal["text", "last"]:
        return self.ilp.rows

    @property
    def rope(self) -> bool:
        return self.ilp.rope

    @property
    def pool_mode(self) -> PoolMode:
        return self.plc.pool_mode

    @property
    def salience(self) -> bool:
        return self.plc.salience

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | None:
        """As ``plc.plan``."""
        return self.plc.plan(layout, region)

    def least(self, tokens: int) -> dict[int, int]:
        """That of ``ilp``, of what ``plc`` leaves."""
        start = self.plc.least(tokens)[0]
        return {layer: min(start, count) for layer, count in self.ilp.least(tokens).items()}

    def select(self, layout: VisionLayout, region: Region) -> Selection | None:
        """As ``ilp.select``."""
        return self.ilp.select(layout, region)


def by_name(name: Literal["crop", "plc", "ilp", "none"], keep: float) -> Method | None:
    """Method with default settings that ends with a fraction ``keep`` of the vision tokens.

    Args:
        name: "plc" pools to ``keep``; "ilp" prunes to ``keep`` at layer 2; "crop" does both: pooling to
            ``keep ** POOL_SHARE``, then pruning to ``keep``; "none" is the unpruned model.
        keep: fraction in (0, 1]; 1.0 keeps everything (``plan`` and ``select`` return None).
    Returns:
        Method, or None for "none".
    Raises:
        ValueError: unknown name, ``keep`` out of range. TypeError: ``keep`` is not a float.
    Source: own choice; the paper does not publish how it splits a budget between the stages.
    """
    _check_choice("by_name", "name", name, ("crop", "plc", "ilp", "none"))
    if not isinstance(keep, float):
        raise TypeError(f"by_name: keep must be a float in (0, 1], got {keep!r}")
    check_keep("by_name", keep)
    if name == "none":
        return None
    if name == "plc":
        return PreLLMCompression(keep=keep)
    if name == "ilp":
        return InnerLLMPruning(keep)
    return Compose(PreLLMCompression(keep=keep**POOL_SHARE), InnerLLMPruning(keep))
