"""Run a model on one image and one question just far enough to read what a localizer needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crop.geometry.layout import VisionLayout
from crop.localizers.base import encode
from crop.models import family_of
from crop.patching.patch import refuse_patched
from crop.patching.planner import Planner

if TYPE_CHECKING:
    from PIL.Image import Image


class Stop(Exception):
    """Ends a forward pass whose later layers nobody needs."""


@torch.no_grad()
def run_until_stop(base: nn.Module, inputs: Mapping[str, Any]) -> None:
    """One prefill of the model below the language-model head up to a hook that raises ``Stop``.

    Raises:
        RuntimeError: nothing raised ``Stop``.
    """
    # Position offsets and the like that a forward pass leaves on the module.
    before = dict(vars(base))
    try:
        base(**inputs, use_cache=False)
    except Stop:
        return
    finally:
        vars(base).update(before)
    raise RuntimeError("run_until_stop: the model must reach what the localizer reads, got to its end without")


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What enters the language model.

    Args:
        layout: where the N vision tokens are.
        vision: (N, dim) projected image features.
        text: (T, dim) embeddings of the prompt's tokens after the image.
    """

    layout: VisionLayout
    vision: Tensor
    text: Tensor

    @staticmethod
    def of(layout: VisionLayout, embeds: Tensor) -> Embeddings:
        """The parts of one sample: the layout of its only image, (seq_len, dim) of all tokens.

        Raises:
            ValueError: no text after the image.
        """
        text = embeds[int(layout.position[-1]) + 1 :]
        if len(text) == 0:
            raise ValueError("embeddings: prompt must have text after the image, got 0 tokens")
        return Embeddings(layout, embeds[layout.position.to(embeds.device)], text)


def entering(planner: Planner, inputs: Mapping[str, Any]) -> tuple[list[VisionLayout], Tensor]:
    """The images of a prompt, and what enters the language model: one pass that ends before the first decoder layer.

    Args:
        planner: of the model, for no method. inputs: as for the model.
    Returns:
        The layouts in prompt order; (batch, seq_len, dim), on the model's device and in its dtype.
    Raises:
        RuntimeError: the model is patched.
    """
    refuse_patched(planner.language_model)
    plan, found = planner.plan(inputs), []

    def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(kwargs["inputs_embeds"])
        raise Stop

    handle = planner.language_model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        run_until_stop(family_of(planner.model).base(planner.model), inputs)
    finally:
        handle.remove()
    return [] if plan is None else [image.layout for image in plan.images], found[0]


def embeddings(
    model: nn.Module, processor: Any, image: Image, question: str, prompt: Callable[[str], str] | None = None
) -> Embeddings:
    """The projected image features and the embedded text of one image and one question.

    Raises:
        ValueError: the prompt holds more or fewer images than one, or no text after it. RuntimeError: as ``entering``.
    """
    inputs = encode(processor, image, question, prompt).to(model.device, dtype=model.dtype)
    layouts, embeds = entering(Planner(model, None, None, processor, image.size), inputs)
    return Embeddings.of(only_image(layouts, "embeddings"), embeds[0])


def only_image(layouts: list[VisionLayout], op: str) -> VisionLayout:
    """The layout of the one image of a pass; ValueError where there are more, or none."""
    if len(layouts) != 1:
        raise ValueError(f"{op}: prompt must hold one image, got {len(layouts)}")
    return layouts[0]
