"""Door 1, at the input of the language model: Pre-LLM Compression.

Also what every call needs there, pooled or not: what the cache holds, position ids, and at the way out the unpruned
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from crop import ops
from crop.methods.saliency import distinct_weights
from crop.patching.batch_plan import ImagePlan, PoolStep
from crop.patching.cache import TokenMap, cache_state, make_uniform, store_state
from crop.patching.context import Door, hook
from crop.patching.feature_pooling import settle
from crop.patching.positions import close_gaps, given_ids, num_axes, own_ids
from crop.patching.readmit import Memory
from crop.patching.state import Run, Stage, gather_positions, slot_mask, spread
from crop.patching.stats import mark
from crop.patching.validation import cache_name, cache_of, past_length, wants_cache


class PoolingDoor(Door):
    """Pools the image tokens' embeddings and lets position ids, mask and cache follow."""

    def install(self, undo: ExitStack) -> None:
        """Register the hooks, and their removal with ``undo``."""
        hook(undo, self.language_model.register_forward_pre_hook, self._enter, with_kwargs=True)
        hook(undo, self.language_model.register_forward_hook, self._leave)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if self.block.run is not None and self.run is None:
            return None  # a call of another thread that was there before the doors opened
        run = self.block.run = self.run or Run()
        pool = run.chunk.pool if run.chunk is not None else None
        cache = cache_of(kwargs)
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return None
        if run.timed:
            run.started = mark(embeds.device)
            if len(self.block.vision_span) == 2:
                self.stats._add("vision", *self.block.vision_span)
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
        if run.noted is not None:
            self._note_levels(run, kwargs, embeds)
        if pool is None and (state.pooled is None or (logical_mask is None and state.pooled.dense)):
            if run.chunk is not None and logical_mask is not None:
                run.mask = logical_mask.to(torch.bool)
            return args, kwargs
        if pool is not None:
            start = mark(embeds.device)
            pool = self._settle(run, embeds)
            kwargs |= self._pool_features(pool, run.chunk.images, embeds, kwargs)
            leader = pool.leader.to(embeds.device)
            run.slots = leader.shape[1]
            run.pooled = TokenMap.extended(state.pooled, run.past, leader, run.added, dense=pool.filled is None)
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

    def _pool_features(
        self, pool: PoolStep, images: Sequence[ImagePlan], embeds: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The embeddings, pooled, and like them the further levels of vision features of DeepStack."""
        mode, weight = self.method.pool_mode, None
        if mode == "distinct":
            mode, weight = "weighted", distinct_weights(pool.plan, images, embeds)
        found = {"inputs_embeds": self._pool(pool, embeds, mode, weight)}
        is_vision = kwargs.get("visual_pos_masks")
        if is_vision is not None:
            leader = pool.leader.to(is_vision.device)
            chosen = is_vision.gather(1, leader.clamp(min=0)) & (leader >= 0)
            levels = (spread(level, is_vision) for level in kwargs["deepstack_visual_embeds"])
            found["visual_pos_masks"] = chosen
            found["deepstack_visual_embeds"] = [self._pool(pool, level, mode, weight)[chosen] for level in levels]
        return found

    def _settle(self, run: Run, embeds: Tensor) -> PoolStep:
        """The pooling of the chunk, late plans decided."""
        if run.chunk.text is not None:
            salience = None
            if self.block.salience is not None:
                salience = self.block.salience.of([image.sample for image in run.chunk.images], self.planner.copies)
            with torch.no_grad():
                pool = settle(run.chunk.pool, run.chunk.images, run.chunk.text, embeds, salience)
            run.chunk = replace(run.chunk, pool=pool)
        return run.chunk.pool

    def _note_positions(self, run: Run, kwargs: dict, embeds: Tensor) -> None:
        """Where ids are or were changed, work on ours from here on: ``run.ids`` and what the model gets."""
        changes = run.chunk is not None and self.planner.positions != "original"
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
        if changes and self.planner.positions == "compact":
            run.images = [(image.sample, image.pooled.position) for image in run.chunk.images]

    def _note_levels(self, run: Run, kwargs: dict, embeds: Tensor) -> None:
        """What DeepStack adds behind the first cut. A call without images is to add it to those before, all the same."""
        first, given = self.method.cuts[0].layer, kwargs.get("deepstack_visual_embeds") or []
        late = [spread(level, kwargs["visual_pos_masks"])[None].to(embeds.device) for level in given[first:]]
        run.noted["levels"] = torch.cat([embeds.new_zeros(0, *embeds.shape), *late])
        earlier = 0 if run.recalled is None else run.recalled.num_levels
        if earlier and not given:
            kwargs["visual_pos_masks"] = embeds.new_zeros(embeds.shape[:2], dtype=torch.bool)
            kwargs["deepstack_visual_embeds"] = [embeds.new_zeros(0, embeds.shape[2])] * (first + earlier)

    def _pool_positions(self, run: Run, kwargs: dict, leader: Tensor) -> None:
        """Position ids of pooled tokens."""
        if self.planner.positions == "original":
            kwargs["position_ids"] = gather_positions(kwargs.get("position_ids"), leader, run.past)
            run.ids = None if run.ids is None else gather_positions(run.ids, leader, 0)
            return
        if self.planner.positions == "compact":
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
    def _pool(pool: PoolStep, embeds: Tensor, mode: str, weight: Tensor | None = None) -> Tensor:
        batch, seq_len, dim = embeds.shape
        pooled = ops.adaptive_pool(embeds.reshape(batch * seq_len, dim), pool.plan, mode, weight)
        if pool.filled is not None:
            packed = pooled.new_zeros(pool.leader.numel(), dim)
            pooled = packed.index_copy(0, pool.filled.to(embeds.device), pooled)
        return pooled.view(batch, -1, dim)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
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
            if self.planner.uniform and cuts:
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
