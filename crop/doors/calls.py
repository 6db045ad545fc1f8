"""Where a call begins: ``generate()``, the vision tower, the multimodal model. Plans the call from its token ids."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..estimate import compare
from ..inputs import brings_images, refuse_generation, replace_method
from ..methods import Method
from ..run import Run
from ..stats import mark
from .block import Block, Door, device_of, hook


class Calls(Door):
    """Begins and ends every call of the model.

    Args:
        auto: leave a prefill alone where pruning is predicted not to pay.
    """

    def __init__(self, block: Block, auto: bool) -> None:
        super().__init__(block)
        self.auto = auto

    def install(self, undo: ExitStack) -> None:
        """Register the hooks, and their removal with ``undo``."""
        if hasattr(self.model, "generate"):
            replace_method(self.model, "generate", self._generate, undo)
            replace_method(self.model, "_expand_inputs_for_generation", self._expand, undo)
            # For static caches generate() would make masks of the unpruned length; the language model makes its own.
            replace_method(self.model, "create_masks_for_generate", lambda _, **given: given["attention_mask"], undo)
        base = self.adapter.base(self.model)
        tower = self.adapter.vision_tower(base)
        hook(undo, tower.register_forward_pre_hook, self._enter_vision_tower, with_kwargs=True)
        hook(undo, tower.register_forward_hook, self._leave_vision_tower)
        hook(undo, base.register_forward_pre_hook, self._enter, with_kwargs=True)
        hook(undo, base.register_forward_hook, self._leave, always_call=True)

    # generate(): refuse what cannot be right, note how often every sample is repeated

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        refuse_generation(config or self.model.generation_config, kwargs, self.planner.uniform)
        self.planner.given = kwargs
        try:
            return generate(*args, **kwargs)
        finally:
            self.planner.copies, self.planner.given = 1, None

    def _expand(self, expand: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.planner.copies = args[0] if args else kwargs.get("expand_size", 1)
        return expand(*args, **kwargs)

    # The vision tower, which generate() may run before the multimodal model: note its time

    def _enter_vision_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.block.vision_span = [mark(device_of(module))]

    def _leave_vision_tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.block.vision_span.append(mark(device_of(module)))

    # The multimodal model

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = kwargs
        if args:
            arguments = inspect.signature(module.forward).bind_partial(*args).arguments | kwargs
        if self.run is not None and self.run.thread is not threading.current_thread() and self.run.thread.is_alive():
            raise RuntimeError(
                "patch: one call at a time must run on a patched model, got a second one from another thread; "
                "use a lock, or a copy of the model per thread"
            )
        self.block.run = run = Run()
        input_ids = arguments.get("input_ids")
        if input_ids is None:
            if brings_images(arguments, self.adapter.videos):
                raise ValueError("patch: input_ids must be given with pixel_values, got inputs_embeds alone")
            return
        if self.adapter.makes_masks:
            run.given_mask = arguments.get("attention_mask")
            run.two_way = self.adapter.two_way and arguments.get("token_type_ids") is not None
        start = mark(input_ids.device)
        chunk = self.planner.plan(arguments, run)
        if chunk is None:
            return
        if self.auto and (chunk.pool is not None or chunk.steps):
            self.stats.estimate = compare(chunk, self.language_model)
            if not self.stats.estimate.prune:
                chunk = self.planner.plan(arguments, run, Method())
        self.stats._begin(chunk, len(self.layers))
        self.stats._add("plan", start, mark(input_ids.device))
        run.timed = True
        if chunk.pool is not None or chunk.steps or run.recalled is not None:
            run.chunk = chunk

    def _leave(self, *_: Any) -> None:
        self.block.run = None
