"""What every method is made of: the policy, what it selects, what it may look at."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from crop import ops
from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Pieces
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region

PoolMode = Literal["mean", "max", "distinct"]
POOL_MODES = get_args(PoolMode)


@dataclass(frozen=True, eq=False)
class Selection:
    """What ``ops.select`` needs to know to prune one image.

    Args:
        num_keep: tokens to keep.
        priority: (N,) int8 of at most 126, higher first whatever the score; negative = never.
        weight: (N,) float32 factor of the score; None: 1.
        needs_scores: False if the priorities alone decide.
    """

    num_keep: int
    priority: Tensor
    weight: Tensor | None = None
    needs_scores: bool = True

    def check(self, layout: VisionLayout) -> None:
        """Refuse what does not fit an image of these tokens: ValueError."""
        if isinstance(self.num_keep, bool) or not isinstance(self.num_keep, Integral):
            raise TypeError(f"patch: num_keep of a Selection must be an int, got {self.num_keep!r}")
        shape = (len(layout),)
        for name, value in (("priority", self.priority), ("weight", self.weight)):
            if value is not None and value.shape != shape:
                raise ValueError(f"patch: {name} of a Selection must have shape {shape}, got {tuple(value.shape)}")
        priority = self.priority.numpy()
        kind, highest = self.priority.dtype, int(priority.max(initial=0))
        if kind != torch.int8 or highest == 127:  # a place above is left for what an earlier cut kept
            raise ValueError(f"patch: priority of a Selection must be int8 and at most 126, got {kind} up to {highest}")
        candidates = np.count_nonzero(priority >= 0)
        if not 0 <= self.num_keep <= candidates:
            raise ValueError(
                f"patch: num_keep of a Selection must be in [0, {candidates}] (tokens of priority >= 0), got {self.num_keep}"
            )


@dataclass(frozen=True, eq=False)
class ScoreView:
    """What a score is to be given for, beside query and key; tensors on their device.

    Args:
        candidates: (num_images, N) int64 keys of each image's tokens, -1 = filler.
        sample: (num_images,) int64 batch row of each image.
        visible_len: (batch, M) int64, each query row sees the keys from ``visible_start`` to here; 0 = filler row.
        visible_start: (batch,) int64 first real key; None: 0.
        scale: of the product of query and key; None: ``head_dim ** -0.5``.
        lse: (batch, num_heads, M) float32 log-sum-exp of what each row sees; None: not known.
        row_key: (batch, M) int64 each query row's own key, -1 = filler row; None: the last one that it sees. Where a prompt
            sees itself (PaliGemma) that is another one.
    """

    candidates: Tensor
    sample: Tensor
    visible_len: Tensor
    visible_start: Tensor | None = None
    scale: float | None = None
    lse: Tensor | None = None
    row_key: Tensor | None = None


@dataclass(frozen=True, eq=False)
class MergeView:
    """One cut, for methods that merge tokens before they leave; one entry per pruned image.

    Args:
        sample: batch row of each image.
        num_keep, num_candidates: tokens that stay, and those that they are taken from.
        best: numbers of tokens per image -> (num_images, most) int64 their places in the hidden states, the best ones by
            priority and score, ascending, -1 = filler at the end.
    """

    sample: Sequence[int]
    num_keep: Sequence[int]
    num_candidates: Sequence[int]
    best: Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Features:
    """What pooling by features may look at, on the model's device.

    Args:
        tokens: (N, dim) of one image, as the language model would get them.
        text: (M, dim) embeddings of the text after the sample's last image.
        observed: (N, ...) what ``Method.observe`` read of this image, of several watches (N, watches); None: it reads nothing.
    """

    tokens: Tensor
    text: Tensor
    observed: Tensor | None = None


@dataclass(frozen=True)
class Assignment:
    """Which cell each token joins: ``num_out`` cells in ascending order of their leaders.

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
        return Assignment(torch.searchsorted(leader, leader_of, right=True) - 1, leader)


@dataclass(frozen=True, eq=False)
class FeaturePooling:
    """Pooling by what the tokens hold: the count is promised on the host, the cells are decided on the device.

    Args:
        num_out: tokens it will leave, in [1, num_tokens].
        num_tokens: tokens of the image.
        decide: (Features, *given) -> Assignment of ``num_out`` cells; must not wait for the device.
        given: tensors that ``decide`` needs beside features, made on the host; they go to the device in one copy with the plan.
    """

    num_out: int
    num_tokens: int
    decide: Callable[..., Assignment]
    given: tuple[Tensor, ...] = ()

    def stand_in(self) -> PoolPlan:
        """A plan of the promised size: the first tokens."""
        first = torch.arange(self.num_out, dtype=torch.int32)
        edges = torch.arange(self.num_out + 1, dtype=torch.int32)
        return PoolPlan(first, edges, first, torch.zeros(self.num_out, dtype=torch.uint8), self.num_tokens, check=False)


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


def check_count(op: str, name: str, value: int, low: int) -> None:
    """Refuse what is no integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{op}: {name} must be >= {low}, got {value}")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}")


class Method:
    """A pruning policy. The base keeps everything; a method overrides ``encode``, ``plan``, ``select`` or several of them.

    ``layer``: decoder layer at whose input ``select`` applies, "auto" for the family's default, None if it never does.
    ``rows``: queries that score the tokens: "text" (all after the sample's last image) or "last".
    ``rope``: whether the scores know positions; False takes query and key before the rotary embedding.
    ``pool_mode``: reduction of a cell of ``plan``: "mean", "max", or "distinct", a mean in which a token weighs the more,
        the less it looks like the rest of its image (``methods.saliency``).
    ``cuts``: the methods whose ``select`` applies, one per layer where tokens leave, in ascending order; of itself a
        method is its only cut.
    """

    layer: int | Literal["auto"] | None = None
    rows: Literal["text", "last"] = "text"
    rope: bool = True
    pool_mode: PoolMode = "mean"

    @property
    def cuts(self) -> tuple[Method, ...]:
        return () if self.layer is None else (self,)

    @property
    def encodes(self) -> bool:
        """Whether it can leave parts of a picture out of the encoder."""
        return type(self).encode is not Method.encode

    @property
    def observes(self) -> bool:
        """Whether it reads attention in the vision tower."""
        return type(self).observe is not Method.observe

    def with_layer(self, default: int) -> Method:
        """This method with ``default`` in the place of ``layer="auto"``."""
        if self.layer != "auto":
            return self
        resolved = copy.copy(self)
        object.__setattr__(resolved, "layer", default)
        return resolved

    def encode(self, layout: VisionLayout, region: Region, pieces: Pieces) -> Tensor | None:
        """Which pieces of one image the vision encoder gets: (num_pieces,) bool, at least one; None: all of them.

        Tokens that lack a piece are dropped: ``plan`` and ``select`` see the others only.
        """
        return None

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | FeaturePooling | None:
        """How to pool the tokens of one image before the language model; None: not at all."""
        return None

    def select(self, layout: VisionLayout, region: Region) -> Selection | None:
        """What to keep of one image at ``layer``; None: all that came so far.

        ``layout`` is the one after pooling, at every cut (before it, where features decide the pooling). Of what an earlier
        cut left, a later one keeps ``num_keep`` (all, if there are no more), by the order of its own ``Selection``; there a
        negative priority means last.
        """
        return None

    def score(self, query: Tensor, key: Tensor, view: ScoreView) -> Tensor:
        """How much each token matters: (num_images, N) float32, higher is better. Default: attention mass.

        Args:
            query: (batch, num_heads, M, head_dim) of the scoring rows, key: (batch, num_kv_heads, keys, head_dim), of the
                layer before the cut, rotated unless ``rope`` is False.
            view: where the tokens are, and what each row sees. Nothing may wait for the device.
        """
        return ops.attention_mass(
            query,
            key,
            view.candidates,
            sample=view.sample,
            lse=view.lse,
            scale=view.scale,
            visible_start=view.visible_start,
            visible_len=view.visible_len,
        )

    def merge(self, hidden: Tensor, view: MergeView) -> Tensor:
        """Hidden states (batch, entries, dim) at the cut before tokens leave; what is to survive of them is written in."""
        return hidden

    def observe(self, tower: nn.Module, config: Any, watch: Callable[..., None]) -> None:
        """Ask for attention inside the vision tower, which ``FeaturePooling.decide`` finds as ``Features.observed``.

        Args:
            tower: the vision tower. config: of the whole model.
            watch: (attention module, read): ``read(query, key, scale) -> (rows, N, ...)`` is called at every call of that
                module; the rows are the images in prompt order.
        """


def check_method(method: Method, num_layers: int) -> None:
    """Refuse what a method, one of the user's own perhaps, says of itself: TypeError, ValueError."""
    last = 0
    for cut in method.cuts:
        layer = cut.layer
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise TypeError(f"patch: layer of a method must be an int, 'auto' or None, got {layer!r}")
        if not last < layer < num_layers:
            raise ValueError(f"patch: layer must be in [{last + 1}, num_layers={num_layers} - 1], got {layer}")
        if cut.rows not in ("text", "last"):
            raise ValueError(f"patch: rows of a method must be one of ('text', 'last'), got {cut.rows!r}")
        last = layer
    if method.pool_mode not in POOL_MODES:
        raise ValueError(f"patch: pool_mode of a method must be one of {POOL_MODES}, got {method.pool_mode!r}")


def prunes(method: Method) -> bool:
    """Whether a method can drop or pool anything at all."""
    return bool(method.cuts) or method.encodes or type(method).plan is not Method.plan
