"""From a checked request to plans: which tokens of each image stay, by the layouts of ``crop.models``."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crop.geometry.region import Region
from crop.integrations.vllm.plans import PlaceholderPlan
from crop.integrations.vllm.request import ImageRequest
from crop.localizers.base import Localizer
from crop.localizers.registry import get_localizer
from crop.models import Prompt, families
from crop.patching.positions import Policy

_one_at_a_time = threading.Lock()


def plan_image(
    request: ImageRequest,
    config: Any,
    ids: Tensor,
    is_embed: Tensor,
    arguments: Mapping[str, Any],
    image_processor: Any,
    size: tuple[int, int],
    positions: Policy,
    picture: tuple[int, ...],
) -> PlaceholderPlan:
    """The plan of one image, located.

    Args:
        config: of the model. ids: (full,) of the unpruned placeholder. is_embed: (full,) bool, see ``PlaceholderPlan``.
        arguments: what the model's processor made, of this image alone.
        size: (width, height) of the original.
    Raises:
        ValueError: the budget is more than the image has, or the family cannot do it.
    """
    prompt = Prompt(config, ids[None], arguments, image_processor, [size])
    ((_, layout),) = families()[config.model_type].images(prompt)
    if positions == "compact" and int(layout.position[-1] - layout.position[0]) != len(layout) - 1:
        raise ValueError(
            "crop: positions must be 'original' for images with text among their tokens, got a server with 'compact'"
        )
    plan = request.method.plan(layout, request.region)
    if plan is None:
        return PlaceholderPlan.whole(is_embed, picture)
    return PlaceholderPlan.of(plan, layout, request.method.mode, is_embed, picture)


def locate(name: str, image: Any, question: str) -> Region:
    """Where a localizer that needs no model looks: an RGB picture, a question. ValueError: it is not installed here."""
    with _one_at_a_time:  # what it has read of pictures is shared by all threads
        return _localizer(name)(image, question)


@functools.cache
def _localizer(name: str) -> Localizer:
    try:
        return get_localizer(name)
    except ImportError as error:
        raise ValueError(f"crop: crop_localizer {name!r} must be installed where the server runs: {error}") from error


def check_localizer(name: str) -> None:
    """Refuse at start what no request could use: ValueError."""
    _localizer(name)


def whole_placeholder(full: list[int], is_embed: Any) -> tuple[Tensor, Tensor]:
    """Ids (n,) and which of them take a row of the encoder's (n,) bool; ``is_embed``: ids -> mask, None: all do."""
    ids = torch.tensor(full)
    return ids, torch.ones(len(full), dtype=torch.bool) if is_embed is None else is_embed(full)
