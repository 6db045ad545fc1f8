"""What a patch did: token counts, kept indices, time per stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from crop.cost.estimate import Estimate
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
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


@dataclass
class PruneStats:
    """Filled by each prefill inside a ``patch`` block; describes the last one that held an image.

    Attributes:
        tokens_before, tokens_after_plc, tokens_after_ilp: vision tokens per image, the last after every cut.
        tokens_from: first decoder layer -> vision tokens per image that it and the following layers see.
        layer_average: vision tokens per image, averaged over the decoder layers; with one cut
            ``(layer * after_plc + (num_layers - layer) * after_ilp) / num_layers``.
        layouts: geometry of each image's tokens before pruning.
        estimate: what ``patch(auto=True)`` predicted, None otherwise. Where it left a prefill alone, ``seconds`` is empty.
    """

    _estimated: Callable[[], Estimate | None] | None = field(default=None, repr=False)
    _planned: Callable[[], BatchPlan] | None = field(default=None, repr=False)
    _num_layers: int = field(default=0, repr=False)
    _selected: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _spans: list[tuple[str, object, object]] = field(default_factory=list, repr=False)

    @cached_property
    def estimate(self) -> Estimate | None:
        return None if self._estimated is None else self._estimated()

    @cached_property
    def _chunk(self) -> BatchPlan | None:
        return None if self._planned is None else self._planned()

    @property
    def _images(self) -> Sequence[ImagePlan]:
        return () if self._chunk is None else self._chunk.images

    @property
    def layouts(self) -> list[VisionLayout]:
        return [image.layout for image in self._images]

    @property
    def tokens_before(self) -> list[int]:
        return [image.layout.num_original for image in self._images]

    @property
    def tokens_after_plc(self) -> list[int]:
        return [len(image.pooled) for image in self._images]

    @property
    def tokens_after_ilp(self) -> list[int]:
        return [image.tokens_at(self._num_layers - 1) for image in self._images]

    @property
    def tokens_from(self) -> dict[int, list[int]]:
        if self._chunk is None:
            return {}
        return {layer: [image.tokens_at(layer) for image in self._images] for layer in (0, *self._chunk.steps)}

    @property
    def layer_average(self) -> list[float]:
        layers = range(self._num_layers)
        return [sum(image.tokens_at(layer) for layer in layers) / len(layers) for image in self._images]

    @property
    def plans(self) -> list[PoolPlan | None]:
        """Pooling plan per image, None where it was left whole."""
        return [image.plan if image.late is None else image.late.outcome() for image in self._images]

    @property
    def pooled(self) -> list[VisionLayout]:
        """Geometry of each image's tokens after pooling, in the shortened sequence."""
        return [image.pooled for image in self._images]

    @property
    def kept(self) -> list[Tensor]:
        """Original vision tokens that reach the last layer, per image: int64 indices, ascending; pooled: leaders."""
        return self.kept_at(self._num_layers - 1)

    def kept_at(self, layer: int) -> list[Tensor]:
        """Original vision tokens that decoder layer ``layer`` sees, as in ``kept``."""
        if self._chunk is None:
            return []
        kept = [torch.arange(len(image.pooled)) for image in self._chunk.images]
        for cut, step in self._chunk.steps.items():
            if cut <= layer:
                for number, row, count in zip(step.images, self._selected[cut].cpu(), step.num_keep, strict=True):
                    kept[number] = torch.searchsorted(self._chunk.images[number].pooled.position, row[:count])
        return [
            index if plan is None else plan.leader.long()[index] for plan, index in zip(self.plans, kept, strict=True)
        ]

    @property
    def seconds(self) -> dict[str, float]:
        """Time per stage of the last prefill: plan, vision, plc, ilp, language_model (includes plc and ilp)."""
        total: dict[str, float] = {}
        for stage, start, stop in self._spans:
            total[stage] = total.get(stage, 0.0) + elapsed(start, stop)
        return total

    def _begin(
        self, planned: Callable[[], BatchPlan], num_layers: int, estimated: Callable[[], Estimate | None]
    ) -> None:
        """A prefill begins; its plan and estimate are asked for when somebody looks."""
        self._planned, self._num_layers, self._estimated = planned, num_layers, estimated
        self._selected, self._spans = {}, []
        for known in ("_chunk", "estimate"):
            self.__dict__.pop(known, None)

    def _add(self, stage: str, start: object, stop: object) -> None:
        self._spans.append((stage, start, stop))
