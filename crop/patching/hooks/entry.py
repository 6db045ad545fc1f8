"""Where a call begins: ``generate()``, the vision tower, the multimodal model. Plans the call from its token ids."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from crop.cost.estimate import Estimate, compare, glance, is_short
from crop.patching.batch_plan import BatchPlan
from crop.patching.cache import is_pruned
from crop.patching.context import Block, Door, device_of, hook
from crop.patching.planner import light
from crop.patching.state import Run
from crop.patching.stats import mark
from crop.patching.validation import brings_images, cache_of, refuse_generation, replace_method


class Calls(Door):
    """Begins and ends every call of the model.

    Args:
        behind: the doors that a call meets next.
        auto: leave a prefill alone where pruning is predicted not to pay. Until a call needs them, the doors behind stay
            out of the model, and all that runs of this one is ``_enter``, which every other call passes at once.
    """

    def __init__(self, block: Block, behind: Sequence[type[Door]], auto: bool) -> None:
        super().__init__(block)
        self.behind, self.auto, self.closed, self.generates = behind, auto, True, False

    def install(self, undo: ExitStack) -> None:
        """Register the hooks, and their removal with ``undo``."""
        self.undo, self.base = undo, self.adapter.base(self.model)
        if hasattr(self.model, "generate"):
            replace_method(self.model, "generate", self._generate, undo)
        hook(undo, self.base.register_forward_pre_hook, self._enter, with_kwargs=True)
        if not self.auto or self.block.salience is not None:  # that must see the vision tower
            self._open()

    def _open(self) -> None:
        if not self.closed:
            return
        self.closed = False
        self._prepare_generation()
        tower = self.adapter.vision_tower(self.base)
        hook(self.undo, tower.register_forward_pre_hook, self._enter_vision_tower, with_kwargs=True)
        hook(self.undo, tower.register_forward_hook, self._leave_vision_tower)
        hook(self.undo, self.base.register_forward_hook, self._leave, always_call=True)
        for door in self.behind:
            door(self.block).install(self.undo)

    # generate(): refuse what cannot be right, note how often every sample is repeated

    def _prepare_generation(self) -> None:
        """What a step of generation needs, also in a loop of the caller's own; not before there is one."""
        if self.generates or not hasattr(self.model, "generate"):
            return
        self.generates = True
        replace_method(self.model, "_expand_inputs_for_generation", self._expand, self.undo)
        # For static caches generate() would make masks of the unpruned length; the language model makes its own.
        replace_method(self.model, "create_masks_for_generate", lambda _, **given: given["attention_mask"], self.undo)

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        refuse_generation(config or self.model.generation_config, kwargs, self.planner.uniform)
        self._prepare_generation()
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
        other = self.block.run
        if other is not None and other.thread is not threading.current_thread() and other.thread.is_alive():
            raise RuntimeError(
                "patch: one call at a time must run on a patched model, got a second one from another thread; "
                "use a lock, or a copy of the model per thread"
            )
        brings, input_ids = brings_images(arguments, self.adapter.videos), arguments.get("input_ids")
        if brings and input_ids is None:
            raise ValueError("patch: input_ids must be given with pixel_values, got inputs_embeds alone")
        alone = self.closed and not is_pruned(cache_of(arguments))  # an earlier block may have pruned it
        worth = input_ids is not None and (not self.auto or (brings and self._may_pay(arguments)))
        if alone and not worth:
            return
        run = Run()
        chunk = self._plan(arguments, run) if worth else None
        if alone and chunk is None:
            return
        self._open()
        self.block.run = run
        if self.adapter.makes_masks and input_ids is not None:
            run.given_mask = arguments.get("attention_mask")
            run.two_way = self.adapter.two_way and arguments.get("token_type_ids") is not None
        run.timed = chunk is not None
        if chunk is not None and (chunk.pool is not None or chunk.steps or run.recalled is not None):
            run.chunk = chunk

    def _may_pay(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call with images is worth planning; notes why not."""
        self.planner.refuse_number(arguments)
        if not is_short(*arguments["input_ids"].shape, self.language_model):
            counts = self.planner.counts(arguments)
            if counts is None or glance(self.method, *counts, self.language_model).prune:
                return counts is not None
        self._leave_alone(arguments)
        return False

    def _plan(self, arguments: Mapping[str, Any], run: Run) -> BatchPlan | None:
        """The plan of a call, noted; None: it is to be left alone."""
        device = arguments["input_ids"].device
        start, estimate = mark(device), None
        chunk = self.planner.plan(arguments, run)
        if chunk is None:
            return None
        if self.auto:
            estimate = compare(chunk, self.language_model)
            if not estimate.prune:
                self._leave_alone(arguments, estimate)
                return None
        self.stats._begin(lambda: chunk, len(self.layers), lambda: estimate)
        self.stats._add("plan", start, mark(device))
        return chunk

    def _leave_alone(self, arguments: Mapping[str, Any], estimate: Estimate | None = None) -> None:
        """Note a call that is not pruned: what it would have been is found out when somebody asks."""
        seen = light(arguments)

        def estimated() -> Estimate:
            return estimate or glance(self.method, *self.planner.counts(seen), self.language_model)

        self.stats._begin(self.planner.unpruned(seen), len(self.language_model.layers), estimated)

    def _leave(self, *_: Any) -> None:
        if self.run is not None:  # a call that was there before the doors opened leaves another one's alone
            self.block.run = None
