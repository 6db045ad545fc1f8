"""One encoding and one vision pass for the localizer and the answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crop.localizers.base import shared_encoding
from crop.models import family_of
from crop.patching.stats import elapsed, mark

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class VisionCache:
    """What ``cache_vision`` yields: start and stop of every run of tower and projector so far."""

    spans: list[tuple[Any, Any]] = field(default_factory=list, repr=False)

    @property
    def seconds(self) -> float:
        """Time that tower and projector have really run so far, whoever called them; waits for the device."""
        return sum(elapsed(start, stop) for start, stop in self.spans)


@contextmanager
def cache_vision(model: nn.Module) -> Iterator[VisionCache]:
    """Run the vision tower, and the projector behind it, once for equal images inside the block; encode once, too.

    A localizer that reads the model's own attention needs the inputs and image features that ``generate`` needs again::

        with crop.cache_vision(model) as vision:
            inputs = crop.encode(processor, image, question)
            region = localizer(image, question)
            with crop.patch(model, method, region, processor=processor, image_size=image.size):
                model.generate(**inputs)
        print(vision.seconds)

    The last output is kept and handed out again when every tensor argument is equal, bit for bit. Calls that record
    gradients are never shared. ``encode`` hands out its last result for the same image object and an equal question.

    Args:
        model: unmodified Hugging Face vision-language model of a supported family.
    Raises:
        TypeError, ValueError: as ``patch`` for an unknown model. RuntimeError: the block is nested for one model.
    """
    family = family_of(model)
    shared = family.vision_modules(family.base(model))
    if any(isinstance(module.forward, _Cached) for module in shared):
        raise RuntimeError(
            "cache_vision: a model must be in one block at a time, got a nested block; use the outer one"
        )
    vision = VisionCache()
    # What is placed on devices by accelerate has a forward of its own among its attributes already.
    own = [vars(module).get("forward") for module in shared]
    try:
        for module in shared:
            module.forward = _Cached(module.forward, vision.spans)
        with shared_encoding():
            yield vision
    finally:
        for module, forward in zip(shared, own, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


@dataclass
class _Cached:
    """A function with a memory of its last call; ``spans`` takes start and stop of the calls that it makes."""

    forward: Callable[..., Any]
    spans: list[tuple[Any, Any]]
    last: list[tuple[tuple[tuple, dict], Any]] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # Some families hand every keyword on to the tower, also the one that only the language model reads.
        given = {name: value for name, value in kwargs.items() if name != "use_cache"}
        device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), _CPU)
        cast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        last = self.last[0] if self.last else None  # another thread may put its own there meanwhile
        if last is None or not _same(last[0], (args, given, cast)):
            start = mark(device)
            last = _kept((args, given, cast)), self.forward(*args, **kwargs)
            self.last[:] = [last]
            self.spans.append((start, mark(device)))
        output = last[1]
        # Models write into the output object they get; the tensors in it stay as they are.
        return output if isinstance(output, Tensor) else copy.copy(output)


def _kept(value: Any) -> Any:
    """Arguments as they are now: whoever changes a tensor in place must not change what is known of it."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _kept(entry) for name, entry in value.items()}
    return tuple(map(_kept, value)) if isinstance(value, (tuple, list)) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return alike and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other
