"""What the doors of one block share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from crop.patching.planner import Planner
from crop.patching.salience import VisionSalience
from crop.patching.state import Run
from crop.patching.stats import PruneStats


@dataclass
class Block:
    """One ``with`` block.

    Args:
        planner: what was asked for. stats: what callers get to see.
        salience: reads the vision tower where the method wants that.
        run: the call that runs now, None between calls.
        vision_span: marks at the vision tower's last begin and end.
    """

    planner: Planner
    stats: PruneStats
    salience: VisionSalience | None
    run: Run | None = None
    vision_span: list[Any] = field(default_factory=list)

    @staticmethod
    def of(planner: Planner) -> Block:
        """A new one.

        Raises:
            ValueError: the method reads the vision tower's attention and the tower is of another kind.
        """
        salience = None
        if planner.method.salience:
            tower = planner.adapter.vision_tower(planner.adapter.base(planner.model))
            salience = VisionSalience(tower, planner.model.config)
        return Block(planner, PruneStats(), salience)


class Door:
    """Hooks that work on a block; the names that all of them need."""

    def __init__(self, block: Block) -> None:
        self.block, self.planner, self.stats = block, block.planner, block.stats
        self.adapter, self.method, self.model = self.planner.adapter, self.planner.method, self.planner.model
        self.language_model = self.planner.language_model

    @cached_property
    def layers(self) -> list[nn.Module]:
        """Of the decoder."""
        return list(self.language_model.layers)

    @property
    def run(self) -> Run | None:
        """The call that runs now in this thread; one that was there before the door is none."""
        run = self.block.run
        return run if run is not None and run.thread is threading.current_thread() else None


def hook(undo: ExitStack, register: Callable[..., Any], method: MethodType, *first: Any, **options: Any) -> None:
    """Register a method, called with ``first`` and what hooks get, as a forward hook, and its removal with ``undo``.

    A compiled model calls it as it is; what was compiled before the block knows nothing of it.
    """
    undo.callback(register(partial(_uncompiled(method.__func__), method.__self__, *first), **options).remove)


@cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrapping takes longer than a hook's work, so each function is wrapped once."""
    return torch.compiler.disable(function)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter is."""
    return next(module.parameters()).device
