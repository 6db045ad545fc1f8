"""What a patch did: token counts, kept indices, time per stage."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .chunk import ChunkPlan
from .plan import PoolPlan
from .region import VisionLayout


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
        tokens_before, tokens_after_plc, tokens_after_ilp: vision tokens per image.
        layer_average: vision tokens per image, averaged over the decoder layers:
            ``(layer * after_plc + (num_layers - layer) * after_ilp) / num_layers``.
        layouts: geometry of each image's tokens before pruning.
        pooled: geometry after pooling, in the shortened sequence.
        plans: pooling plan per image, None where it was left whole.
    """

    tokens_before: list[int] = field(default_factory=list)
    tokens_after_plc: list[int] = field(default_factory=list)
    tokens_after_ilp: list[int] = field(default_factory=list)
    layer_average: list[float] = field(default_factory=list)
    layouts: list[VisionLayout] = field(default_factory=list)
    pooled: list[VisionLayout] = field(default_factory=list)
    plans: list[PoolPlan | None] = field(default_factory=list)
    _chunk: ChunkPlan | None = field(default=None, repr=False)
    _selected: Tensor | None = field(default=None, repr=False)
    _spans: list[tuple[str, object, object]] = field(default_factory=list, repr=False)

    @property
    def kept(self) -> list[Tensor]:
        """Original vision tokens that reach the last layer, per image: int64 indices, ascending; pooled: leaders."""
        if self._chunk is None:
            return []
        rows = iter([] if self._selected is None else self._selected.cpu())
        kept = []
        for image in self._chunk.images:
            index = torch.arange(len(image.pooled))
            if image.selection is not None:
                position = next(rows)[: image.num_keep]
                index = torch.searchsorted(image.pooled.position, position)
            kept.append(index if image.plan is None else image.plan.leader.long()[index])
        return kept

    @property
    def seconds(self) -> dict[str, float]:
        """Time per stage of the last prefill: plan, vision, plc, ilp, language_model (includes plc and ilp)."""
        total: dict[str, float] = {}
        for stage, start, stop in self._spans:
            total[stage] = total.get(stage, 0.0) + elapsed(start, stop)
        return total

    def _begin(self, chunk: ChunkPlan, layer: int | None, num_layers: int) -> None:
        self._chunk, self._selected, self._spans = chunk, None, []
        self.tokens_before = [image.layout.num_original for image in chunk.images]
        self.tokens_after_plc = [len(image.pooled) for image in chunk.images]
        self.tokens_after_ilp = [image.num_keep for image in chunk.images]
        self.layouts = [image.layout for image in chunk.images]
        self.pooled = [image.pooled for image in chunk.images]
        self.plans = [image.plan for image in chunk.images]
        early = num_layers if layer is None else layer
        self.layer_average = [
            (early * before + (num_layers - early) * after) / num_layers
            for before, after in zip(self.tokens_after_plc, self.tokens_after_ilp, strict=True)
        ]

    def _add(self, stage: str, start: object, stop: object) -> None:
        self._spans.append((stage, start, stop))
