"""What every method is made of: the policy, what it selects, what it may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region

if TYPE_CHECKING:
    pass


PoolMode = Literal["mean", "max", "distinct"]

POOL_MODES = get_args(PoolMode)


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


def check_count(op: str, name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{op}: {name} must be >= {low}, got {value}")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
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

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | FeaturePooling | None:
        """How to pool the tokens of one image before the language model; None: not at all.

        A ``FeaturePooling`` says how many tokens it will leave, and decides which when their features are there.
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


@dataclass(frozen=True)
class Features:
    """What a late decision may look at, on the model's device.

    Args:
        tokens: (N, dim) of one image, as the language model would get them.
        text: (M, dim) embeddings of the text after the sample's last image.
        salience: (N,) float32 attention that the tokens receive inside the vision tower, or None where the method did
            not ask for it.
    """

    tokens: Tensor
    text: Tensor
    salience: Tensor | None = None


@dataclass(frozen=True)
class Assignment:
    """A late decision: ``num_out`` cells in ascending order of their leaders.

    Args:
        cell: (N,) int64 cell of each token, -1 = dropped.
        leader: (num_out,) int64 token that lends its position; ascending, each in its own cell.
    """

    cell: Tensor
    leader: Tensor

    @staticmethod
    def of_kept(kept: Tensor, num_tokens: int) -> Assignment:
        """Tokens ``kept`` (n,), in any order, stay as they are; the others go."""
        leader = kept.sort().values
        cell = torch.full((num_tokens,), -1, dtype=torch.int64, device=kept.device)
        return Assignment(cell.scatter_(0, leader, torch.arange(len(leader), device=kept.device)), leader)

    @staticmethod
    def of_leaders(leader_of: Tensor, leader: Tensor) -> Assignment:
        """Every token joins the leader it names: ``leader_of`` (N,), -1 = dropped; ``leader`` (n,), in any order."""
        leader = leader.sort().values
        cell = torch.searchsorted(leader, leader_of.clamp(min=0))
        return Assignment(torch.where(leader_of < 0, -1, cell), leader)


@dataclass(frozen=True, eq=False)
class FeaturePooling:
    """Promise of a plan.

    Args:
        num_out: tokens it will leave, in [1, num_tokens].
        num_tokens: tokens of the image.
        decide: Features -> Assignment; must not wait for the device.
    """

    num_out: int
    num_tokens: int
    decide: Callable[[Features], Assignment]
    decided: list[Assignment] = field(default_factory=list, init=False)  # of the last prefill, for the statistics

    def stand_in(self) -> PoolPlan:
        """A plan of the promised size: the first tokens."""
        first = torch.arange(self.num_out, dtype=torch.int32)
        edges = torch.arange(self.num_out + 1, dtype=torch.int32)
        return PoolPlan(first, edges, first, torch.zeros(self.num_out, dtype=torch.uint8), self.num_tokens, check=False)

    def outcome(self) -> PoolPlan:
        """What was decided, on the CPU (waits for the device)."""
        cells = self.decided[-1]
        plan = PoolPlan.from_cells(cells.cell.cpu(), cells.leader.cpu())
        size = int(plan.offsets[-1])
        return replace(plan, members=plan.members[:size])
