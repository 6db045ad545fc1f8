"""Where a call begins: ``generate()``, the vision tower, the multimodal model. Plans the call from its token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crop.models.attention_hook import attention_hook
from crop.patching import hf
from crop.patching.context import ModelHook, PatchContext, hook, replace_method
from crop.patching.current import CALL, GENERATION
from crop.patching.planner import Look
from crop.patching.state import ForwardState, GenerationState, VisionRun, by_tower_call
from crop.patching.stats import PrefillStats, mark

HOST = torch.device("cpu")  # planning waits for nothing


class EntryHook(ModelHook):
    """Begins and ends every call of the model."""

    def __init__(self, context: PatchContext) -> None:
        super().__init__(context)
        self.base = self.family.base(self.model)
        self.tower = self.family.vision_tower(self.base)

    def install(self, undo: ExitStack) -> None:
        """Register the hooks, and their removal with ``undo``."""

        def watch(module: nn.Module, read: Callable[..., Tensor]) -> None:
            if self.family.tiles:
                raise ValueError(
                    "patch: a method that observes the vision tower needs a row of it for every image, got "
                    f"{self.family.model_type!r}, whose images are cut into tiles; use another method"
                )
            number = self.context.watches
            self.context.watches += 1

            @torch.no_grad()
            def note(query: Tensor, key: Tensor, scale: float | None) -> None:
                self.context.vision.observed[number] = read(query, key, scale)

            undo.enter_context(attention_hook(module, note, when=lambda: self.context.vision is not None))

        self.method.observe(self.tower, self.model.config, watch)
        if hasattr(self.model, hf.GENERATE):
            replace_method(self.model, hf.GENERATE, self._generate, undo)
            replace_method(self.model, hf.EXPAND, self._expand, undo)
            if hasattr(self.model, hf.ENCODE):  # 5.17 encodes in the model's forward
                replace_method(self.model, hf.ENCODE, self._encode, undo)
            replace_method(self.model, hf.PREPARE, self._prepare, undo)
            # For static caches generate() would make masks of the unpruned length; the language model makes its own.
            replace_method(self.model, hf.MAKE_MASKS, lambda _, **given: hf.caller_mask(given), undo)
            replace_method(self.model, hf.CONTINUOUS, self._refuse, undo, "run continuous batching; use generate()")
        for name in ("__deepcopy__", "__reduce_ex__"):
            replace_method(self.model, name, self._refuse, undo, "be copied or saved; leave the block first")
        hook(undo, self.tower.register_forward_pre_hook, self._enter_tower, with_kwargs=True)
        for number, layer in enumerate(self.planner.encoder.layers(self.tower) if self.method.encodes else ()):
            hook(undo, layer.register_forward_pre_hook, self._enter_tower_layer, number, with_kwargs=True)
        hook(undo, self.tower.register_forward_hook, self._leave_tower)
        for name in ("_call_impl", "_compiled_call_impl"):
            if getattr(self.base, name) is not None:
                replace_method(self.base, name, self._call, undo)
        hook(undo, self.base.register_forward_pre_hook, self._enter, with_kwargs=True)

    @staticmethod
    def _refuse(_: Any, what: str, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"patch: the model must not be inside a patch block to {what}")

    # generate(): refuse what cannot be right, note how often every sample is repeated and which call of the model comes next

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.planner.prunes:
            hf.refuse_generation(self.model, args, kwargs, self.planner.uniform)
        call, outer = CALL.get(), GENERATION.get()
        GENERATION.set(GenerationState(self.context, kwargs))
        try:
            return generate(*args, **kwargs)
        finally:
            GENERATION.set(outer)
            CALL.set(call)  # an interrupt may have left an inner one

    def _expand(self, expand: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.context.generation is not None:
            self.context.generation.copies = args[0] if args else kwargs.get("expand_size", 1)
        return expand(*args, **kwargs)

    def _encode(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.context.generation is not None:
            self.context.generation.encodes = hf.encoded_by_generate(encode, args, kwargs)
        return encode(*args, **kwargs)

    def _prepare(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(*args, **kwargs)
        if self.context.generation is not None:
            self.context.generation.input_ids = hf.token_ids(inputs)
        return inputs

    def _made_by_generate(self, arguments: Mapping[str, Any]) -> GenerationState | None:
        """The generation that makes this call: others may be made meanwhile, by hooks and logits processors."""
        generation, ids = self.context.generation, hf.token_ids(arguments)
        if generation is None or generation.input_ids is None or ids is None:
            return None
        prepared = generation.input_ids
        if ids is not prepared and (ids.shape != prepared.shape or ids.device == prepared.device):
            return None  # accelerate's hooks may have moved them to another device
        generation.input_ids = None
        return generation

    # The vision tower, which generate() may run before the multimodal model

    def _enter_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        vision = self.context.vision
        if vision is None:
            return None
        generation = self.context.generation
        if self.context.call is None and generation.encodes is not None:
            start = mark(HOST)
            generation.look = self.planner.look(generation.encodes)
            generation.coming = ForwardState(self.context, vision=vision)
            self._begin(generation.coming, generation.look, start)
            generation.encodes = None
        vision.marks = [mark(next(module.parameters()).device)]
        vision.running = vision.encodings.pop(0) if vision.encodings else None
        if vision.running is None:
            return None
        args, kwargs, vision.place = self.planner.encoder.take(module, args, kwargs, vision.running)
        return args, kwargs

    def _enter_tower_layer(
        self, number: int, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        vision = self.context.vision
        return None if vision is None or vision.running is None else self.planner.encoder.take_at(number, args, kwargs)

    def _leave_tower(self, module: nn.Module, args: tuple, output: Any) -> Any:
        vision = self.context.vision
        if vision is None:
            return None
        if vision.running is not None:
            output = self.planner.encoder.put(module, output, vision.place, vision.running)
        vision.marks.append(mark(next(module.parameters()).device))
        state = self.context.call or self.context.generation.coming
        if state is not None:
            state.plan_now()  # while the encoder runs, where a device works beside the host
        return output

    # The multimodal model

    @torch.compiler.disable(recursive=False)
    def _call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the call and its hooks: whatever ends it, an interrupt too, the call around it goes on as before."""
        outer = CALL.get()
        try:
            output, state = call(*args, **kwargs), self.context.call
            if state is not outer and state is not None and state.stats is not None:
                self.context.stats.prefills.append(state.stats)
            return output
        finally:
            CALL.set(outer)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = hf.named_arguments(module, args, kwargs)
        generation = self._made_by_generate(arguments)
        start, given, copies, look, state = mark(HOST), None, 1, None, None
        if generation is not None:
            given, copies, look = generation.arguments, generation.copies, generation.look
            state = generation.coming if copies == 1 else None
            generation.look = generation.coming = None  # of the first call alone
        begun = state is not None
        if not begun:
            state = ForwardState(self.context, vision=VisionRun() if generation is None else generation.vision)
        CALL.set(state)  # until _call ends
        if self.planner.makes_masks:
            state.input_valid = hf.caller_mask(arguments)
            state.prefix = self.family.traits.mask == "prefix" and hf.sees_whole_prompt(arguments)
        if not begun:
            look = self.planner.look(arguments, given, copies) if look is None else look.repeated(copies)
            self._begin(state, look, start, tower=hf.brings_pixels(arguments))

    def _begin(self, state: ForwardState, look: Look | None, start: Any, tower: bool = True) -> None:
        """Note the images of a call, seen since ``start``; ``tower``: the vision tower is going to run."""
        if look is None:
            return
        state.stats = PrefillStats(len(self.layers))
        state.stats.add_span("plan", start, mark(HOST))
        state.later = partial(self._plan, state, look)
        if tower:
            state.vision.encodings = by_tower_call(look.encoded)

    def _plan(self, state: ForwardState, look: Look) -> None:
        start = mark(HOST)
        plan = state.stats.plan = self.planner.plan_look(look)
        state.stats.add_span("plan", start, mark(HOST))
        if plan.pool is not None or plan.prunes:
            state.plan = plan
