"""What the hooks of one block share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, cached_property, partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn

from crop.patching.current import CALL, GENERATION
from crop.patching.planner import Planner
from crop.patching.state import ForwardState, GenerationState, VisionRun
from crop.patching.stats import PruneStats


class PatchContext:
    """One ``patch`` block: what was asked for, what callers get to see, and the call that runs now."""

    def __init__(self, planner: Planner) -> None:
        self.planner, self.watches = planner, 0  # watches: modules of the vision tower that the method reads
        self.stats = PruneStats(lambda: None if self.call is None else self.call.stats)

    @property
    def call(self) -> ForwardState | None:
        """The innermost call of this thread and task, None: it is of another model, or there is none."""
        call = CALL.get()
        return call if call is not None and call.owner is self else None

    @property
    def generation(self) -> GenerationState | None:
        """The innermost ``generate()``, likewise."""
        generation = GENERATION.get()
        return generation if generation is not None and generation.owner is self else None

    @property
    def vision(self) -> VisionRun | None:
        """Where what the vision tower does now is noted; None: it runs for somebody else."""
        call, generation = self.call, self.generation
        return call.vision if call is not None else generation.vision if generation is not None else None


class ModelHook:
    """Hooks of one place of the model; the names that all of them need."""

    def __init__(self, context: PatchContext) -> None:
        self.context, self.planner = context, context.planner
        self.family, self.method, self.model = self.planner.family, self.planner.method, self.planner.model
        self.language_model = self.planner.language_model

    @cached_property
    def layers(self) -> list[nn.Module]:
        """Of the decoder."""
        return list(self.language_model.layers)


def hook(undo: ExitStack, register: Callable[..., Any], method: MethodType, *first: Any, **options: Any) -> None:
    """Register a method, called with ``first`` and what hooks get, as a forward hook, and its removal with ``undo``.

    A compiled model calls it as it is; what was compiled before the block knows nothing of it.
    """
    undo.callback(register(partial(_uncompiled(method.__func__), method.__self__, *first), **options).remove)


@cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrapping takes longer than a hook's work, so each function is wrapped once."""
    return torch.compiler.disable(function)


def replace_method(owner: Any, name: str, around: Callable[..., Any], undo: ExitStack, *first: Any) -> None:
    """Let ``around(original, *first, *args, **kwargs)`` stand for a method of one object, which may lack it, until ``undo``."""
    own = vars(owner)  # past a module's own way of setting attributes, which is slow and for parameters
    had, original = name in own, getattr(owner, name, None)

    @wraps(original or around)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(original, *first, *args, **kwargs)

    def restore() -> None:
        if had:
            own[name] = original
        else:
            del own[name]

    own[name] = replacement
    undo.callback(restore)
