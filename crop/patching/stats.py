"""What a patch did: token counts, kept indices, time per stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.methods.base import Assignment
from crop.patching.batch_plan import BatchPlan, ImagePlan


def mark(device: torch.device) -> float | torch.cuda.Event:
    """A point in time: host clock on CPU, event on CUDA (read only when asked for, so nothing waits in the run)."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    """Seconds between two marks; waits for the second on CUDA."""
    if isinstance(start, float):
        return stop - start
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


class PrefillStats:
    """One prefill that held an image; every list has one entry per image, in prompt order.

    ``spans``, ``selected``, ``decisions`` and ``positions`` are what the hooks note: marks of each stage, pooled positions
    kept at each cut, what features decided by image, where the pooled tokens of every image came to stand.
    """

    def __init__(self, num_layers: int = 0) -> None:
        self.plan: BatchPlan | None = None
        self.num_layers = num_layers
        self.spans: list[tuple[str, Any, Any]] = []
        self.selected: dict[int, Tensor] = {}
        self.decisions: dict[int, Assignment] = {}
        self.positions: list[Tensor] = []

    def add_span(self, stage: str, start: Any, stop: Any) -> None:
        """Note the two marks of a stage."""
        self.spans.append((stage, start, stop))

    @property
    def images(self) -> list[ImagePlan]:
        """What was planned for each."""
        return [] if self.plan is None else self.plan.images

    @property
    def layouts(self) -> list[VisionLayout]:
        """Geometry of each image's tokens before pruning."""
        return [image.layout for image in self.images]

    @property
    def tokens_before(self) -> list[int]:
        """Vision tokens per image."""
        return [image.layout.num_original for image in self.images]

    @property
    def tokens_encoded(self) -> list[int]:
        """Vision tokens per image that the encoder made, those of a copy included that stand for others, and newlines."""
        return [len(image.encoded) for image in self.images]

    @property
    def tokens_after_plc(self) -> list[int]:
        """Vision tokens per image that enter the language model."""
        return [len(image.pooled) for image in self.images]

    @property
    def tokens_after_ilp(self) -> list[int]:
        """Vision tokens per image after every cut."""
        return [image.tokens_at(self.num_layers - 1) for image in self.images]

    @property
    def tokens_from(self) -> dict[int, list[int]]:
        """First decoder layer -> vision tokens per image that it and the following layers see."""
        if self.plan is None:
            return {}
        return {layer: [image.tokens_at(layer) for image in self.images] for layer in (0, *self.plan.prunes)}

    @property
    def layer_average(self) -> list[float]:
        """Vision tokens per image, averaged over the decoder layers."""
        layers = range(self.num_layers)
        return [sum(image.tokens_at(layer) for layer in layers) / len(layers) for image in self.images]

    @cached_property
    def plans(self) -> list[PoolPlan | None]:
        """Pooling plan per image, None where it was left whole."""
        return [
            image.plan
            if number not in self.decisions
            else PoolPlan.from_cells(self.decisions[number].cell.cpu(), self.decisions[number].leader.cpu())
            for number, image in enumerate(self.images)
        ]

    @cached_property
    def pooled(self) -> list[VisionLayout]:
        """Geometry of each image's tokens after pooling, pooled positions."""
        if not self.decisions:
            return [image.pooled for image in self.images]
        return [
            image.layout.pool(plan or PoolPlan.identity(len(image.layout)), position.cpu())
            for image, plan, position in zip(self.images, self.plans, self.positions, strict=True)
        ]

    @property
    def kept(self) -> list[Tensor]:
        """Original vision tokens that reach the last layer, per image: int64 indices, ascending; pooled: leaders."""
        return self.kept_at(self.num_layers - 1)

    def kept_at(self, layer: int) -> list[Tensor]:
        """Original vision tokens that decoder layer ``layer`` sees, as in ``kept``."""
        found = []
        for number, (image, plan, pooled) in enumerate(zip(self.images, self.plans, self.pooled, strict=True)):
            original = torch.arange(len(image.layout)) if plan is None else plan.leader.long()
            cuts = [cut for cut in image.selections if cut <= layer and cut in self.selected]
            if cuts:
                row = self.plan.prunes[cuts[-1]].images.index(number)
                kept = self.selected[cuts[-1]][row].cpu()
                original = original[torch.searchsorted(pooled.position, kept[kept >= 0])]
            found.append(original)
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """Time per stage of the prefill, of which "plc" and "ilp" are parts of "language_model"; waits for the device."""
        total: dict[str, float] = {}
        for stage, start, stop in self.spans:
            total[stage] = total.get(stage, 0.0) + elapsed(start, stop)
        return total


class PruneStats:
    """What a ``patch`` block did.

    Every attribute of :class:`PrefillStats` is here, too, and tells of the last prefill (inside a call of the model: of
    that call's): ``layouts``, ``tokens_before``, ``tokens_encoded``, ``tokens_after_plc``, ``tokens_after_ilp``, ``tokens_from``,
    ``layer_average``, ``plans``, ``pooled``, ``kept``, ``kept_at(layer)``, ``seconds``.

    Attributes:
        prefills: one entry per prefill that held an image, in the order of their ends.
    """

    def __init__(self, running: Callable[[], PrefillStats | None] = lambda: None) -> None:
        self.prefills: list[PrefillStats] = []
        self._running = running

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("prefills", "estimate"):  # not made yet, when copied; gone
            raise AttributeError(f"PruneStats has no {name}" + "; call crop.estimate before" * (name == "estimate"))
        last = self._running() or (self.prefills[-1] if self.prefills else PrefillStats())
        return getattr(last, name)
