"""Marks along one forward pass, and the split of its time that follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from bench.latency.e2e.workload import Model
from crop.patching.stats import elapsed, mark

PARTS = ("localizer", "plan", "vision", "projector", "PLC", "before", "after", "head")


class Clock:
    """First mark of each point in each phase; events on CUDA, so that nothing waits inside the run."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.phase = device, ""
        self.marks: dict[tuple[str, str], Any] = {}

    def enter(self, phase: str) -> None:
        self.phase = phase

    def note(self, point: str) -> None:
        if self.phase:
            self.marks.setdefault((self.phase, point), mark(self.device))

    def split(self) -> dict[str, float]:
        """Seconds per part of ``PARTS``.

        plan: the patch's planning and the embedding of the text. projector: what joins image features and text. PLC: until
        the first layer, pooling, masks and rotary tables. before, after: the layers up to the cut and behind it, with
        the scoring and the compaction in them. head: last norm excluded. The vision tower counts as such, whoever runs it.
        """

        def between(start: str, stop: str, phase: str = "prefill") -> float:
            if (phase, start) not in self.marks:
                return 0.0
            return elapsed(self.marks[phase, start], self.marks[phase, stop])

        seen = between("tower", "features", "localizer")
        return {
            "localizer": between("start", "stop", "localizer") - seen,
            "plan": between("base", "tower"),
            "vision": seen + between("tower", "features"),
            "projector": between("features", "decoder"),
            "PLC": between("decoder", "layers"),
            "before": between("layers", "cut"),
            "after": between("cut", "norm"),
            "head": between("norm", "stop"),
        }


@contextmanager
def clocked(model: Model, cut: int) -> Iterator[Clock]:
    """A clock whose hooks stay for the block; to be entered before any patch, so that its marks come first."""
    clock, decoder = Clock(model.model.device), model.decoder
    points = {
        "base": model.base, "tower": model.tower, "decoder": decoder, "layers": decoder.layers[0],
        "cut": decoder.layers[cut], "norm": decoder.norm,
    }  # fmt: skip
    with ExitStack() as undo:
        for point, module in points.items():
            note = torch.compiler.disable(lambda *_, point=point: clock.note(point))
            undo.callback(module.register_forward_pre_hook(note).remove)
        undo.callback(model.tower.register_forward_hook(lambda *_: clock.note("features")).remove)
        yield clock
