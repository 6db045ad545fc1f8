"""Apply a pruning method to an unmodified Hugging Face model for the length of a ``with`` block.

Two doors, both forward hooks, no model code copied and attention left as it is:

* door 1, at the input of the language model: Pre-LLM Compression pools the image tokens' embeddings; position ids,
  mask and cache follow;
* door 2, at the input of decoder layer L: Inner-LLM Pruning drops tokens by scores read from the query and key of
  layer L - 1's attention call.

Tokens keep their original position ids. Outputs come back at the unpruned length.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import ops
from .cache import Slots, cache_state, make_uniform, store_state
from .chunk import ChunkPlan, PoolStep, SelectStep, plan_chunk
from .estimate import compare
from .inputs import (
    as_regions,
    as_sizes,
    brings_images,
    cache_name,
    cache_of,
    check_method,
    one_of,
    one_per_image,
    past_length,
    real_tokens,
    refuse_attention,
    refuse_generation,
    refuse_past,
    refuse_sliding_window,
    refuse_transformers,
    refuse_unsupported,
    replace_method,
    unwrapped,
    wants_cache,
)
from .late import settle
from .methods import Method
from .models import Adapter, Prompt, adapter_for
from .positions import POLICIES, close_gaps, given_ids, num_axes, own_ids
from .prepared import fit_mask, held, refuse_prepared, refuse_short_sight, windows
from .readmit import Images, Memory, all_real, empty_layers, recall, refuse_readmission, shift
from .recycle import recycle
from .region import Region
from .run import Run, Stage, choose, gather_positions, look_up, pruned_mask, score, slot_mask, spread
from .salience import VisionSalience
from .stats import PruneStats, mark
from .tap import tap, unrotated

_patched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def patch(
    model: nn.Module,
    method: Method | None,
    region: Region | Sequence[Region] | None = None,
    *,
    processor: Any = None,
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    positions: Literal["original", "centroid", "compact"] = "original",
    cache: Literal["ragged", "uniform"] = "ragged",
    auto: bool = False,
    readmit: bool = False,
) -> Iterator[PruneStats]:
    """Prune vision tokens in every prefill inside the block; decode and later turns follow.

    Args:
        model: unmodified Hugging Face vision-language model of a supported family.
        method: what to prune, e.g. ``Compose(PreLLMCompression(), InnerLLMPruning())``. None prunes nothing, and lets a
            cache that was pruned earlier be used.
        region: where the question looks: one Region per image or video, in prompt order over the whole batch; one alone
            serves a single image. None: every image whole.
        processor: the model's processor (or image processor). Needed by families whose token geometry it decides
            unless every region is whole.
        image_size: (width, height) of the original image, pixels, or one per image. Needed where the processor crops,
            pads or cuts into tiles.
        positions: "original": every token keeps its position ids, a pooled one takes those of its cell's leader;
            "centroid": a pooled token takes the mean of its cell; "compact": what is left is renumbered without gaps,
            from the layer on where tokens leave, and text follows.
        cache: "ragged": layers before a cut keep the keys and values of all tokens; "uniform": after a prefill they keep
            those of the tokens that are left at the end, so that all layers are equally long and static caches work.
        auto: leave a prefill unpruned where pruning is predicted not to pay (``estimate``; ``stats.estimate`` tells).
        readmit: remember the conversation as it was before the first cut (``crop.readmit`` states the cost). The first
            call of another such block on the same cache then cuts all of it anew, as a fresh run would: ``region`` is one
            per image of the whole conversation, and tokens that were pruned earlier may come back.
    Yields:
        PruneStats, filled by each prefill.
    Raises:
        TypeError: not a Hugging Face model; method or region of a wrong type.
        ValueError: unknown family, no vision, layer out of range, number of regions other than of images, missing
            processor or image size, unsupported attention mask or cache. Raised before anything runs on the model.
        RuntimeError: the model is patched already; transformers is too old.
    """
    active = _Patch(model, method, region, processor, image_size, positions, cache, auto, readmit)
    if active.language_model in _patched:
        raise RuntimeError("patch: model must not be patched already, got a nested patch of the same model")
    with ExitStack() as undo:
        _patched.add(active.language_model)
        undo.callback(_patched.discard, active.language_model)
        active.install(undo)
        yield active.stats


def plan_prompt(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: Method,
    region: Region | Sequence[Region] | None = None,
    *,
    processor: Any = None,
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
) -> ChunkPlan | None:
    """What a prefill inside ``patch`` would do with these inputs; None: they hold no image. Nothing runs on the model.

    Args and Raises: as ``patch``; inputs: what the model would be called with.
    """
    active = _Patch(model, method, region, processor, image_size, "original", "ragged")
    return active._plan(active.method, inputs["input_ids"], inputs)


class _Patch:
    def __init__(
        self,
        model: nn.Module,
        method: Method | None,
        region: Region | Sequence[Region] | None,
        processor: Any,
        image_size: tuple[int, int] | Sequence[tuple[int, int]] | None,
        positions: str,
        cache: str,
        auto: bool = False,
        readmit: bool = False,
    ) -> None:
        refuse_transformers()
        model = unwrapped(model)
        self.adapter: Adapter = adapter_for(model)
        if method is not None and not isinstance(method, Method):
            raise TypeError(f"patch: method must be a crop Method or None, got {type(method).__name__}")
        self.method = method or Method()
        self.regions = as_regions(region)
        self.image_processor = getattr(processor, "image_processor", processor)
        self.image_sizes = as_sizes(image_size)
        self.positions = one_of("positions", positions, POLICIES)
        self.uniform = one_of("cache", cache, ("ragged", "uniform")) == "uniform"
        self.auto = auto
        self.config = model.config
        self.base = self.adapter.base(model)
        self.language_model = self.adapter.language_model(model)
        self.layers = list(self.language_model.layers)
        self.model = model
        if self.adapter.makes_masks:
            refuse_prepared(model.config.model_type, self.language_model.config, self.positions, self.uniform)
            self.windows = windows(self.language_model.config)
        else:
            refuse_sliding_window(self.language_model.config)
        refuse_attention(self.language_model.config)
        check_method(self.method, len(self.layers))
        whole = self.regions is None or all(entry.is_whole for entry in self.regions)
        if self.adapter.check is not None:
            if self.image_processor is not None and not hasattr(self.image_processor, "do_resize"):
                raise TypeError(
                    "patch: processor must be the model's processor or image processor, got "
                    f"{type(self.image_processor).__name__} without do_resize"
                )
            self.adapter.check(self.config, self.image_processor, self.image_sizes, whole)
        self.readmit = readmit
        if readmit and auto:
            raise ValueError("patch: auto must be False with readmit, got True: the first prefill must make the cut")
        if readmit:
            refuse_readmission(self.method, self.adapter, positions, self.uniform)
        self.remembers = False  # the memory of the conversation is this block's own
        self.stats = PruneStats()
        self.salience = (
            VisionSalience(self.adapter.vision_tower(self.base), self.config) if self.method.salience else None
        )
        self.run: Run | None = None
        self.given: dict[str, Any] | None = None  # to generate()
        self.vision_span: list[Any] = []
        self.copies = 1

    def install(self, undo: ExitStack) -> None:
        """Register every hook, and its removal with ``undo``."""

        def door(handle: RemovableHandle) -> None:
            undo.callback(handle.remove)

        if hasattr(self.model, "generate"):
            replace_method(self.model, "generate", self._generate, undo)
            replace_method(self.model, "_expand_inputs_for_generation", self._expand, undo)
            # For static caches generate() would make masks of the unpruned length; the language model makes its own.
            replace_method(self.model, "create_masks_for_generate", lambda _, **given: given["attention_mask"], undo)
        tower, language_model = self.adapter.vision_tower(self.base), self.language_model
        if self.adapter.adds_again is not None:
            replace_method(language_model, self.adapter.adds_again, self._add_again, undo)
        # A compiled model calls the hooks as they are; what it compiled before the block knows nothing of them.
        plain = torch.compiler.disable
        door(tower.register_forward_pre_hook(plain(self._enter_vision_tower), with_kwargs=True))
        door(tower.register_forward_hook(plain(self._leave_vision_tower)))
        door(self.base.register_forward_pre_hook(plain(self._enter_base), with_kwargs=True))
        door(self.base.register_forward_hook(plain(self._leave_base), always_call=True))
        door(language_model.register_forward_pre_hook(plain(self._enter_language_model), with_kwargs=True))
        door(language_model.register_forward_hook(plain(self._leave_language_model)))
        for index, layer in enumerate(self.layers):
            door(layer.register_forward_pre_hook(plain(self._layer_hook(index)), with_kwargs=True))
        door(language_model.norm.register_forward_pre_hook(plain(self._enter_norm)))
        if self.salience is not None:
            undo.enter_context(self.salience)
        for cut in self.method.cuts:
            undo.enter_context(self._tap(cut.layer))

    # generate(): refuse what cannot be right, note how often every sample is repeated

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        refuse_generation(config or self.model.generation_config, kwargs, self.uniform)
        self.given = kwargs
        try:
            return generate(*args, **kwargs)
        finally:
            self.copies, self.given = 1, None

    def _expand(self, expand: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.copies = args[0] if args else kwargs.get("expand_size", 1)
        return expand(*args, **kwargs)

    # The vision tower, which generate() may run before the multimodal model: note its time

    def _enter_vision_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.vision_span = [mark(next(module.parameters()).device)]

    def _leave_vision_tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.vision_span.append(mark(next(module.parameters()).device))

    # The multimodal model: plan the chunk from token ids

    def _enter_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = kwargs
        if args:
            arguments = inspect.signature(module.forward).bind_partial(*args).arguments | kwargs
        if self.run is not None and self.run.thread is not threading.current_thread() and self.run.thread.is_alive():
            raise RuntimeError(
                "patch: one call at a time must run on a patched model, got a second one from another thread; "
                "use a lock, or a copy of the model per thread"
            )
        self.run = Run()
        input_ids = arguments.get("input_ids")
        if input_ids is None:
            if brings_images(arguments, self.adapter.videos):
                raise ValueError("patch: input_ids must be given with pixel_values, got inputs_embeds alone")
            return
        if self.adapter.makes_masks:
            self.run.given_mask = arguments.get("attention_mask")
            self.run.two_way = self.adapter.two_way and arguments.get("token_type_ids") is not None
        start = mark(input_ids.device)
        chunk = self._plan(self.method, input_ids, arguments)
        if chunk is None:
            return
        if self.auto and (chunk.pool is not None or chunk.steps):
            self.stats.estimate = compare(chunk, self.language_model)
            if not self.stats.estimate.prune:
                chunk = self._plan(Method(), input_ids, arguments)
        self.stats._begin(chunk, len(self.layers))
        self.stats._add("plan", start, mark(input_ids.device))
        self.run.timed = True
        if chunk.pool is not None or chunk.steps or self.run.recalled is not None:
            self.run.chunk = chunk

    def _leave_base(self, *_: Any) -> None:
        self.run = None

    def _plan(self, method: Method, input_ids: Tensor, arguments: Mapping[str, Any]) -> ChunkPlan | None:
        brings = brings_images(arguments, self.adapter.videos)
        ids = input_ids.cpu() if brings or self.readmit else None
        found = []
        if brings and self.adapter.is_vision(self.config, ids).any():
            found = self._images(ids, arguments)
        if self.readmit:
            return self._plan_with_memory(ids, found, arguments)
        return self._plan_images(method, ids, found, real_tokens(arguments, ids), arguments) if found else None

    def _plan_with_memory(self, ids: Tensor, found: Images, arguments: Mapping[str, Any]) -> ChunkPlan | None:
        """Plan the chunk, or the whole conversation when a new block goes on with it."""
        cache, layer = cache_of(arguments), self.method.cuts[0].layer
        past, real = 0 if cache is None else cache.get_seq_length(), real_tokens(arguments, ids)
        memory = recall(arguments, layer, cache_state(cache)) if past else Memory(layer, [])
        self.run.noted = {"images": shift(found, past)}
        anew, self.remembers = past > 0 and not self.remembers, True
        if anew and (memory.images or found):
            self.run.recalled = memory
            found, real = memory.images + self.run.noted["images"], all_real(arguments, len(ids), past + ids.shape[1])
        chunk = self._plan_images(self.method, ids, found, real, arguments) if found else None
        if chunk is not None and chunk.pool is not None:
            raise ValueError(
                "patch: readmit must be False with Pre-LLM Compression, whose cells cannot be taken apart again, got True; "
                "else give the whole conversation to a fresh cache"
            )
        return chunk

    def _images(self, ids: Tensor, arguments: Mapping[str, Any]) -> Images:
        # generate() repeats every sample for beams, but its caller gave each image once.
        given = arguments if self.given is None else self.given
        prompt = Prompt(self.config, ids[:: self.copies], given, self.image_processor, self.image_sizes)
        found = self.adapter.images(prompt)
        return [
            (sample * self.copies + copy, layout)
            for sample, layouts in itertools.groupby(found, key=lambda entry: entry[0])
            for copy, layout in itertools.product(range(self.copies), [layout for _, layout in layouts])
        ]

    def _plan_images(
        self, method: Method, ids: Tensor, found: Images, real: Tensor, arguments: Mapping[str, Any]
    ) -> ChunkPlan:
        regions = [Region.whole()] if self.regions is None else self.regions
        regions = one_per_image("region", regions, [sample for sample, _ in found], self.copies)
        refuse_unsupported(arguments, ids, self.language_model, self.uniform)
        refuse_past(method, arguments)
        chunk = plan_chunk(method, found, regions, real)
        if self.adapter.makes_masks:
            cache = cache_of(arguments)
            total = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
            scored = [layer for layer, step in chunk.steps.items() if step.rows is not None]
            refuse_short_sight(scored, self.language_model.config, total)
        return chunk

    # Door 1: the language model

    def _enter_language_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        run = self.run = self.run or Run()
        pool = run.chunk.pool if run.chunk is not None else None
        cache = cache_of(kwargs)
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return None
        if run.timed:
            run.started = mark(embeds.device)
            if len(self.vision_span) == 2:
                self.stats._add("vision", *self.vision_span)
        if (run.chunk is not None or run.noted is not None) and cache is None and wants_cache(module, kwargs):
            # The model would make it inside, where the thinnings could not be attached.
            from transformers import DynamicCache

            cache = kwargs[cache_name(module)] = DynamicCache(config=module.config)
        state = cache_state(cache)
        run.cache, run.state, run.pooled, run.device = cache, state, state.pooled, embeds.device
        run.capacity = getattr(cache.layers[0], "max_cache_len", None) if getattr(cache, "layers", None) else None
        if run.recalled is not None:
            run.state = state = replace(state, cuts={})
        elif state.memory is not None and run.noted is None:
            store_state(cache, memory=None)  # it would miss what this call adds
        run.stages |= {layer: Stage(state.cuts.get(layer)) for layer in (state.cuts | state.moved) if layer}
        logical_mask = run.given_mask if self.adapter.makes_masks else kwargs.get("attention_mask")
        run.added = run.slots = embeds.shape[1]
        run.past = past_length(cache, logical_mask, run.added)
        run.past_slots = run.past - (0 if state.pooled is None else state.pooled.dropped)
        self._note_positions(run, kwargs, embeds)
        if pool is None and (state.pooled is None or (logical_mask is None and state.pooled.dense)):
            if run.chunk is not None and logical_mask is not None:
                run.mask = logical_mask.to(torch.bool)
            return args, kwargs
        if pool is not None:
            start = mark(embeds.device)
            pool = self._settle(run, embeds)
            kwargs["inputs_embeds"] = self._pool(pool, embeds, self.method.pool_mode)
            if kwargs.get("visual_pos_masks") is not None:
                kwargs |= self._pool_levels(pool, kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"])
            leader = pool.leader.to(embeds.device)
            run.slots = leader.shape[1]
            run.pooled = Slots.extended(state.pooled, run.past, leader, run.added, dense=pool.filled is None)
            self._pool_positions(run, kwargs, leader)
        run.mask = slot_mask(logical_mask, state.pooled, run, pool)
        if not self.adapter.makes_masks:
            kwargs["attention_mask"] = run.mask
        if not self.adapter.makes_masks and run.mask is None and cache is None:
            # Without a mask and a cache, transformers would read gaps in the position ids as packed sequences.
            shape = (embeds.shape[0], run.slots)
            kwargs["attention_mask"] = torch.ones(shape, dtype=torch.bool, device=embeds.device)
        if pool is not None:
            self.stats._add("plc", start, mark(embeds.device))
        return args, kwargs

    def _settle(self, run: Run, embeds: Tensor) -> PoolStep:
        """The pooling of the chunk, late plans decided."""
        if run.chunk.text is not None:
            salience = None
            if self.salience is not None:
                salience = self.salience.of([image.sample for image in run.chunk.images], self.copies)
            with torch.no_grad():
                pool = settle(run.chunk.pool, run.chunk.images, run.chunk.text, embeds, salience)
            run.chunk = replace(run.chunk, pool=pool)
        return run.chunk.pool

    def _note_positions(self, run: Run, kwargs: dict, embeds: Tensor) -> None:
        """Where ids are or were changed, work on ours from here on: ``run.ids`` and what the model gets."""
        changes = run.chunk is not None and self.positions != "original"
        axes = num_axes(self.language_model.config)
        if run.noted is not None:
            run.noted["ids"] = own_ids(kwargs.get("position_ids"), axes, *embeds.shape[:2], run.past, embeds.device)
        if run.recalled is not None:
            run.ids = torch.cat([*run.recalled.ids, run.noted["ids"]], -1)
        elif changes or run.state.moved:
            run.ids = own_ids(kwargs.get("position_ids"), axes, *embeds.shape[:2], run.past, embeds.device)
            if 0 in run.state.moved:
                run.ids = run.ids - run.state.moved[0].unsqueeze(1)
            kwargs["position_ids"] = given_ids(run.ids)
        if changes and self.positions == "compact":
            run.images = [(image.sample, image.pooled.position) for image in run.chunk.images]

    def _pool_positions(self, run: Run, kwargs: dict, leader: Tensor) -> None:
        """Position ids of pooled tokens."""
        if self.positions == "original":
            kwargs["position_ids"] = gather_positions(kwargs.get("position_ids"), leader, run.past)
            run.ids = None if run.ids is None else gather_positions(run.ids, leader, 0)
            return
        if self.positions == "compact":
            alive = run.chunk.pool.slot.to(leader.device).new_zeros(leader.shape[0], run.added + 1, dtype=torch.bool)
            alive = alive.scatter(1, torch.where(leader >= 0, leader, run.added), True)[:, :-1]
            images = [(image.sample, image.layout.position) for image in run.chunk.images]
            run.ids, moved = close_gaps(run.ids, alive, images)
            run.moved[0] = moved + run.state.moved.get(0, 0)
            run.ids = gather_positions(run.ids, leader, 0)
        else:
            run.ids = self._pool(run.chunk.pool, run.ids.movedim(0, 2).float().contiguous(), "mean").movedim(2, 0)
        kwargs["position_ids"] = given_ids(run.ids)

    @staticmethod
    def _pool(pool: PoolStep, embeds: Tensor, mode: str) -> Tensor:
        batch, seq_len, dim = embeds.shape
        pooled = ops.adaptive_pool(embeds.reshape(batch * seq_len, dim), pool.plan, mode)
        if pool.filled is not None:
            packed = pooled.new_zeros(pool.leader.numel(), dim)
            pooled = packed.index_copy(0, pool.filled.to(embeds.device), pooled)
        return pooled.view(batch, -1, dim)

    def _pool_levels(self, pool: PoolStep, is_vision: Tensor, levels: Sequence[Tensor]) -> dict[str, Any]:
        """Pool the further levels of vision features like the first."""
        chosen = is_vision.gather(1, pool.leader.to(is_vision.device).clamp(min=0))
        chosen &= pool.leader.to(is_vision.device) >= 0
        pooled = [self._pool(pool, spread(level, is_vision), self.method.pool_mode)[chosen] for level in levels]
        return {"visual_pos_masks": chosen, "deepstack_visual_embeds": pooled}

    def _add_again(self, add: Callable[..., Tensor], hidden: Tensor, is_vision: Tensor, level: Tensor) -> Tensor:
        """After a layer behind a cut, a level of vision features goes to the tokens that are left."""
        stage = None if self.run is None else self.run.stage(self.run.at)
        if stage is None or stage.keep is None:
            return add(hidden, is_vision, level)
        is_vision, level = is_vision.to(hidden.device), level.to(hidden.device, hidden.dtype)
        return hidden + ops.compact([spread(level, is_vision)], stage.keep.to(hidden.device))[0]

    def _leave_language_model(self, module: nn.Module, args: tuple, output: Any) -> Any:
        run = self.run
        hidden = output[0]
        if run is not None and run.timed:
            self.stats._add("language_model", run.started, mark(hidden.device))
        if run is not None and run.noted is not None and run.cache is not None:
            old = cache_state(run.cache).memory or Memory(self.method.cuts[0].layer, [])
            store_state(run.cache, memory=old.with_chunk(**run.noted))
        if run is None or run.chunk is None:
            return None
        if run.cache is not None:
            cuts = {layer: stage.slots for layer, stage in run.stages.items() if stage.slots is not None}
            if self.uniform and cuts:
                last = run.stage(len(self.layers) - 1)
                make_uniform(run.cache, run.late_slots(len(self.layers)), run.past_slots)
                run.pooled, cuts = last.slots.after(run.pooled), {}
            moved = run.state.moved | run.moved
            store_state(run.cache, pooled=run.pooled, cuts=cuts, moved=moved, whole_masks=self.adapter.makes_masks)
        pool = run.chunk.pool
        if pool is None:
            return None
        # Members of a cell share its output; padding takes whatever stands in slot 0 (masked everywhere).
        slot = pool.slot.to(hidden.device).clamp(min=0).unsqueeze(-1)
        full = hidden.gather(1, slot.expand(-1, -1, hidden.shape[-1]))
        if isinstance(output, tuple):
            return (full, *output[1:])
        output.last_hidden_state = full
        return output

    # Door 2: the decoder layers

    def _tap(self, layer: int) -> AbstractContextManager[None]:
        """Read the scores for the cut at ``layer`` where it needs any."""

        def step() -> SelectStep | None:
            return self.run.chunk.steps.get(layer) if self.run is not None and self.run.chunk is not None else None

        def read(query: Tensor, key: Tensor, scale: float | None) -> None:
            if notes():
                self.run.noted["query"] = query
            if not needs_scores():
                return
            start = mark(query.device)
            with torch.no_grad():
                if not step().rope:
                    tables = tuple(table.to(query.device) for table in self.run.tables)
                    query, key = unrotated(scoring, query, key, tables)
                mass = score(self.run, self.run.stage(layer - 1), step(), query, key, scale)
                self._cut(layer, step(), mass.to(self.run.device))
            self.stats._add("ilp", start, mark(query.device))

        def needs_scores() -> bool:
            return step() is not None and step().rows is not None

        def notes() -> bool:
            return self.run is not None and self.run.noted is not None and layer == self.method.cuts[0].layer

        scoring = self.layers[layer - 1].self_attn
        return tap(scoring, read, when=lambda: needs_scores() or notes())

    def _cut(self, layer: int, step: SelectStep, score: Tensor) -> None:
        run = self.run
        self.stats._selected[layer], run.stages[layer] = choose(run, layer, step, score)

    def _layer_hook(self, index: int) -> Callable[[nn.Module, tuple, dict], tuple | None]:
        def enter_layer(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
            run = self.run
            if run is None:
                return None
            run.at = index
            if run.chunk is not None:
                # Only flash attention asks for them, and gaps would send it down its packed-sequence path.
                kwargs = kwargs | {"position_ids": None}
            hidden = args[0] if args else kwargs["hidden_states"]
            if run.noted is not None and index == self.method.cuts[0].layer:
                run.noted["hidden"] = hidden
                if run.recalled is not None:
                    hidden = self._recall(index, hidden)
            step = run.chunk.steps.get(index) if run.chunk is not None else None
            if step is not None:
                hidden = self._thin(index, step, hidden)
            elif index and index in run.stages:
                run.carry_on(index)
            if index and index in run.stages and run.ids is not None:
                run.renumber(index)
            stage = run.stage(index)
            if self.adapter.makes_masks and run.thinned:
                kwargs = self._fit_mask(stage, hidden, kwargs, self.windows[index])
            if stage.slots is not None or stage.ids is not None:
                kwargs = self._adapt(stage, hidden, kwargs)
            if run.chunk is not None and index + 1 in run.chunk.steps:
                run.tables = kwargs.get("position_embeddings")
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        return enter_layer

    def _thin(self, layer: int, step: SelectStep, hidden: Tensor) -> Tensor:
        """Hidden states of the tokens that stay at a cut."""
        run = self.run
        if step.rows is None:
            self._cut(layer, step, torch.zeros(step.vision_index.shape, device=run.device))
        stage = run.stages.get(layer)
        if stage is None or stage.keep is None:
            raise RuntimeError(f"patch: layer {layer - 1} must call transformers' attention interface, got no call")
        start = mark(hidden.device)
        stage.before = hidden
        before = run.stage(layer - 1)
        if stage.recycling is not None:
            hidden = recycle(hidden, step.sample.tolist(), stage.recycling)
        take = stage.keep if before.keep is None else look_up(before.place, stage.keep)
        hidden = ops.compact([hidden], take.to(hidden.device))[0]
        self.stats._add("ilp", start, mark(hidden.device))
        return hidden

    def _recall(self, layer: int, hidden: Tensor) -> Tensor:
        """From here on the call is about the whole conversation."""
        run = self.run
        empty_layers(run.cache, layer)
        hidden = torch.cat([*(piece.to(hidden.device) for piece in run.recalled.hidden), hidden], 1)
        if layer not in run.chunk.steps:
            every = torch.arange(run.width, device=run.device).expand(hidden.shape[0], -1)
            run.stages[layer] = Stage(Slots(every, run.width, True), every, every, before=hidden, back=every)
        return hidden

    def _is_flash(self) -> bool:
        return "flash" in (self.language_model.config._attn_implementation or "")

    def _fit_mask(self, stage: Stage, hidden: Tensor, kwargs: dict, window: int | None) -> dict:
        """Fit a mask over all tokens to those that a layer holds."""
        run, (batch, queries) = self.run, hidden.shape[:2]

        def fitted(mask: Tensor | None) -> Tensor | None:
            keys, dense = held([run.pooled, stage.slots], batch, run.past, run.added, queries, window)
            return fit_mask(mask, keys, dense, queries, run.past, run.past + run.added)

        kwargs = dict(kwargs)
        stage.adapt(kwargs, "attention_mask", fitted, kind=window)
        return kwargs

    def _adapt(self, stage: Stage, hidden: Tensor, kwargs: dict) -> dict:
        """Fit mask and positions, made for all slots, to the slots of a stage."""
        kwargs = dict(kwargs)
        flash = self._is_flash()
        if stage.slots is not None and not self.adapter.makes_masks:
            stage.adapt(kwargs, "attention_mask", lambda mask: pruned_mask(mask, self.run, stage, hidden, flash))
        batch = hidden.shape[0]

        def tables(old: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            if stage.ids is not None:
                return self.language_model.rotary_emb(hidden, given_ids(stage.ids))
            return tuple(ops.compact([table.expand(batch, -1, -1) for table in old], stage.keep))

        if stage.keep is not None or stage.ids is not None:
            stage.adapt(kwargs, "position_embeddings", tables)
        return kwargs

    def _enter_norm(self, module: nn.Module, args: tuple) -> tuple | None:
        if self.run is None:
            return None
        # Dropped tokens come out as they went into their cut; callers see the length they put in.
        hidden = args[0]
        for _, stage in sorted(self.run.stages.items(), reverse=True):
            if stage.before is not None:
                back = stage.back.to(hidden.device)
                kept = ops.compact([hidden], back)[0]
                hidden = torch.where((back >= 0).unsqueeze(-1), kept, stage.before.to(hidden.device))
        if self.run.recalled is not None:
            hidden = hidden[:, -self.run.added :]
        return (hidden, *args[1:])
