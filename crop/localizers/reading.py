"""Run a model on one image and one question just far enough to read what a localizer needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crop.methods import Method
from crop.models import adapter_for
from crop.patch import patch
from crop.region import VisionLayout
from crop.stats import PruneStats

from .base import encode

if TYPE_CHECKING:
    from PIL.Image import Image


class Stop(Exception):
    """Ends a forward pass whose later layers nobody needs."""


def run_until_stop(
    model: nn.Module,
    processor: Any,
    image: Image,
    question: str,
    prompt: Callable[[str], str] | None,
    door: Callable[[PruneStats], AbstractContextManager[Any]],
    method: Method | None = None,
) -> PruneStats:
    """One prefill that ends where something inside ``door`` raises ``Stop``; the model is left as it was.

    Args:
        model: of a supported family. processor: its processor.
        image, question, prompt: as in ``encode``.
        door: called with the statistics (filled by the time the language model runs); its context is open during the
            pass, and whatever it hooks must raise ``Stop``.
        method: vision tokens are pooled or pruned by it on the way.
    Returns:
        PruneStats of the pass, with one layout.
    Raises:
        ValueError: the prompt holds more or fewer images than one. RuntimeError: nothing raised ``Stop``.
    """
    inputs = encode(processor, image, question, prompt).to(model.device, dtype=model.dtype)
    base = adapter_for(model).base(model)
    # Position offsets and the like that a forward pass leaves on the module.
    before = dict(vars(base))
    try:
        with patch(model, method, processor=processor, image_size=image.size) as stats, door(stats), torch.no_grad():
            base(**inputs, use_cache=False)
    except Stop:
        return stats
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


class _Entrance:
    """Context that reads the input of the language model and stops there."""

    def __init__(self, language_model: nn.Module, stats: PruneStats) -> None:
        self.language_model, self.stats = language_model, stats
        self.found: Embeddings | None = None

    def __enter__(self) -> None:
        self.handle = self.language_model.register_forward_pre_hook(self._read, with_kwargs=True)

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def _read(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        layout = only_image(self.stats, "embeddings")
        embeds = kwargs["inputs_embeds"][0]
        text = embeds[int(layout.position[-1]) + 1 :]
        if len(text) == 0:
            raise ValueError("embeddings: prompt must have text after the image, got 0 tokens")
        self.found = Embeddings(layout, embeds[layout.position.to(embeds.device)], text)
        raise Stop


def embeddings(
    model: nn.Module, processor: Any, image: Image, question: str, prompt: Callable[[str], str] | None = None
) -> Embeddings:
    """The projected image features and the embedded text, from one pass that ends before the first decoder layer.

    Args:
        model, processor, image, question, prompt: as in ``run_until_stop``.
    Returns:
        Embeddings, on the model's device and in its dtype.
    Raises:
        ValueError: the prompt holds more than one image, or no text after it.
    """
    entrances: list[_Entrance] = []

    def door(stats: PruneStats) -> _Entrance:
        entrances.append(_Entrance(adapter_for(model).language_model(model), stats))
        return entrances[0]

    run_until_stop(model, processor, image, question, prompt, door)
    return entrances[0].found


def only_image(stats: PruneStats, op: str) -> VisionLayout:
    """The layout of the one image of a pass.

    Raises:
        ValueError: there are more.
    """
    if len(stats.layouts) != 1:
        raise ValueError(f"{op}: prompt must hold one image, got {len(stats.layouts)}")
    return stats.layouts[0]
