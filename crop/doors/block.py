"""What the doors of one block share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..planner import Planner
from ..run import Run
from ..salience import VisionSalience
from ..stats import PruneStats


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
        self.layers = list(self.language_model.layers)

    @property
    def run(self) -> Run | None:
        """The call that runs now."""
        return self.block.run


def hook(undo: ExitStack, register: Callable[..., Any], call: MethodType, *first: Any, **options: Any) -> None:
    """Register a door's method, called with ``first`` before what the module gives, as a forward hook; ``undo`` removes it.

    A compiled model calls it as it is; what was compiled before the block knows nothing of it.
    """
    call = MethodType(_uncompiled(call.__func__), call.__self__)
    undo.callback(register(partial(call, *first) if first else call, **options).remove)


_uncompiled = cache(torch.compiler.disable)  # once per method: it takes longer than registering the hook


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter is."""
    return next(module.parameters()).device
