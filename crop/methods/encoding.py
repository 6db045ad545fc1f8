"""What a method does with one image of which the encoder may get a part, checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Encoding, Pieces
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods.base import Assignment, FeaturePooling, Features, Method


def encoding_of(method: Method, layout: VisionLayout, region: Region, pieces: Pieces, video: bool) -> Encoding:
    """What ``method.encode`` takes of one image.

    Raises:
        TypeError, ValueError: it returned something else than a mask of its pieces, or takes none.
    """
    taken = method.encode(layout, region, pieces)
    if taken is None:
        taken = torch.ones(len(pieces), dtype=torch.bool)
    if not isinstance(taken, Tensor) or taken.dtype != torch.bool:
        got = taken.dtype if isinstance(taken, Tensor) else type(taken).__name__
        raise TypeError(f"patch: encode() of a method must return a bool tensor or None, got {got}")
    if taken.shape != (len(pieces),) or not taken.any():
        raise ValueError(
            f"patch: encode() of a method must take some of the image's {len(pieces)} pieces, got a mask of shape "
            f"{tuple(taken.shape)} with {int(taken.sum())}"
        )
    return Encoding(layout, pieces, taken, video)


def _lifted(plan: PoolPlan | FeaturePooling | None, tokens: Tensor) -> PoolPlan | FeaturePooling:
    """A plan made for the tokens that are encoded, (N,) bool, as one for all N: the others are in no cell."""
    index, count = torch.nonzero(tokens).flatten(), len(tokens)
    if not isinstance(plan, FeaturePooling):
        return (plan or PoolPlan.identity(len(index))).among(index, count)

    def decide(features: Features, place: Tensor, *given: Tensor) -> Assignment:
        found = plan.decide(replace(features, tokens=features.tokens[place]), *given)
        cell = found.cell.new_full((count,), -1).scatter(0, place, found.cell)
        return Assignment(cell, place[found.leader])

    return FeaturePooling(plan.num_out, count, decide, (index, *plan.given))


def planned(
    method: Method, layout: VisionLayout, region: Region, encoding: Encoding | None
) -> PoolPlan | FeaturePooling | None:
    """``method.plan`` for the tokens of one image that are encoded; the others are in no cell.

    Raises:
        TypeError, ValueError: it returned something else than a plan of these tokens.
    """
    if encoding is None or encoding.whole:
        return _checked_plan(method.plan(layout, region), layout)
    return _lifted(_checked_plan(method.plan(encoding.left, region), encoding.left), encoding.tokens)


def _checked_plan(plan: Any, layout: VisionLayout) -> PoolPlan | FeaturePooling | None:
    if plan is None:
        return None
    if not isinstance(plan, (PoolPlan, FeaturePooling)):
        raise TypeError(
            f"patch: plan() of a method must return a PoolPlan, a FeaturePooling or None, got {type(plan).__name__}"
        )
    if isinstance(plan, FeaturePooling) and not 1 <= plan.num_out <= len(layout):
        raise ValueError(f"patch: num_out of a FeaturePooling must be in [1, {len(layout)}], got {plan.num_out}")
    if plan.num_tokens != len(layout):
        raise ValueError(f"patch: plan() must cover the image's {len(layout)} tokens, got {plan.num_tokens}")
    return plan
