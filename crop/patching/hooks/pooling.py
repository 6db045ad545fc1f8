"""At the input of the language model: Pre-LLM Compression.

Also what every call needs there, pooled or not: what the cache holds, position ids, and at the way out the unpruned
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from crop import ops
from crop.methods.saliency import saliency_weights
from crop.patching import hf
from crop.patching.batch_plan import BatchPlan
from crop.patching.cache import make_uniform, store_state
from crop.patching.context import ModelHook, hook
from crop.patching.feature_pooling import settle
from crop.patching.masks import pooled_valid
from crop.patching.pool_step import PoolStep
from crop.patching.positions import close_gaps, given_ids, own_ids
from crop.patching.scoring import restore
from crop.patching.state import ForwardState, LayerState, gather_positions
from crop.patching.stats import mark
from crop.patching.token_map import TokenMap
from crop.patching.validation import one_per_image


class PoolingHook(ModelHook):
    """Pools the image tokens' embeddings and lets position ids, mask and cache follow."""

    def install(self, undo: ExitStack) -> None:
        """Register the hooks, and their removal with ``undo``."""
        hook(undo, self.language_model.register_forward_pre_hook, self._enter, with_kwargs=True)
        hook(undo, self.language_model.register_forward_hook, self._leave)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        state, call = self.context.call, hf.DecoderCall(module, kwargs)
        if state is None or call.embeds is None:
            return None
        state.plan_now()
        if state.stats is not None:
            if len(state.vision.marks) == 2:
                state.stats.add_span("vision", *state.vision.marks)
            state.vision.decoder_start = mark(call.embeds.device)
        if call.last and state.plan is not None and call.last > text_tail(state.plan):
            call.last = 0  # tokens of an image, or padding: the caller cuts off what it does not want
        valid = self._begin(state, call)
        self._note_positions(state, call)
        if state.plan is not None and state.plan.pool is not None:
            start = mark(call.embeds.device)
            self._pool_call(state, call)
            state.stats.add_span("plc", start, mark(call.embeds.device))
        self._fit_mask(state, call, valid)
        return args, kwargs

    def _begin(self, state: ForwardState, call: hf.DecoderCall) -> Tensor | None:
        """Note what the cache holds and how long everything is; returns the caller's mask over input tokens."""
        state.cache = call.cache
        if state.plan is not None:
            state.plan = state.plan.to(call.embeds.device)
            if state.cache is None:
                state.cache = call.make_cache()
        valid = state.input_valid if self.planner.makes_masks else call.mask
        if self.planner.slides and (state.plan is not None or state.before.whole_masks):
            call.make_masks()
        state.added = call.embeds.shape[1]
        state.past = hf.past_length(state.cache, valid, state.added)
        before = state.before
        state.pooled = before.pooled
        state.layers |= {layer: LayerState(before.cuts.get(layer)) for layer in (before.cuts | before.shifts) if layer}
        return valid

    def _note_positions(self, state: ForwardState, call: hf.DecoderCall) -> None:
        """Where ids are or were changed, work on ours from here on."""
        shifts = state.before.shifts
        if (state.plan is None or self.planner.positions == "original") and not shifts:
            return
        axes, (batch, added) = self.family.position_axes(self.language_model.config), call.embeds.shape[:2]
        ids = own_ids(call.position_ids, axes, batch, added, state.past, call.embeds.device)
        if 0 in shifts:
            ids = ids - shifts[0].unsqueeze(1)
        state.layers[0].position_ids = ids
        call.position_ids = given_ids(ids)

    def _pool_call(self, state: ForwardState, call: hf.DecoderCall) -> None:
        """Embeddings, further levels of vision features and position ids of the cells."""
        if state.plan.features:
            self._settle(state, call.embeds)
        pool = state.plan.pool
        mode, weight = self.method.pool_mode, None
        if mode == "distinct":
            mode, weight = "weighted", saliency_weights(pool.alone, state.plan.patches, call.embeds)
        if call.deepstack is not None:
            is_vision, levels = call.deepstack
            kept = pool.kept_index.to(is_vision.device)
            chosen = is_vision.gather(1, kept.clamp(min=0)) & (kept >= 0)
            levels = at_places(levels, feature_rows(is_vision))
            # A mask as index would wait for the device; how many tokens are left of each image is known.
            rows = zip(state.plan.images, state.plan.positions, strict=True)
            rows = torch.cat([image.sample * kept.shape[1] + place for image, place in rows]).sort().values
            rows = rows.to(is_vision.device)
            call.deepstack = chosen, [_pool(pool, level, mode, weight).flatten(0, 1)[rows] for level in levels]
        call.embeds = _pool(pool, call.embeds, mode, weight)
        if call.per_layer is not None:  # of token ids, of which an image's are alike
            rows, width = call.per_layer.flatten(2), call.per_layer.shape[2:]
            call.per_layer = ops.compact([rows], pool.kept_index.to(rows.device))[0].unflatten(2, width)
        state.pooled = TokenMap.extended(state.before.pooled, state.past, pool.kept_index, state.added, pool.full)
        self._pool_positions(state, call)

    def _settle(self, state: ForwardState, embeds: Tensor) -> None:
        """Let features decide."""
        observed = None
        seen = [state.vision.observed.get(number) for number in range(self.context.watches)]
        if any(one is None for one in seen):
            raise RuntimeError(
                "patch: the vision tower must run for a method that observes it, got cached features (crop.cache_vision) or "
                "features from elsewhere; ask without them"
            )
        if seen:
            seen = torch.stack(seen, 2) if len(seen) > 1 else seen[0]
            samples = [image.sample for image in state.plan.images]
            copies = self.context.generation.copies if self.context.generation is not None else 1
            rows = one_per_image("observation", list(range(len(seen))), samples, copies)
            observed = [seen[row] for row in rows]
        with torch.no_grad():
            state.plan, state.stats.decisions = settle(state.plan, embeds, observed)
        state.stats.positions = state.plan.positions

    def _pool_positions(self, state: ForwardState, call: hf.DecoderCall) -> None:
        kept, ids = state.plan.pool.kept_index, state.layers[0].position_ids
        if self.planner.positions == "compact":
            alive = kept.new_zeros(len(kept), state.added + 1, dtype=torch.bool)
            alive = alive.scatter(1, torch.where(kept >= 0, kept, state.added), True)[:, :-1]
            images = [(image.sample, image.layout.position) for image in state.plan.images]
            ids, shift = close_gaps(ids, alive, images)
            state.layers[0].shift = shift + state.before.shifts.get(0, 0)
        if ids is None:
            call.position_ids = gather_positions(call.position_ids, kept, state.past)
        else:
            state.layers[0].position_ids = gather_positions(ids, kept, 0)
            call.position_ids = given_ids(state.layers[0].position_ids)

    def _fit_mask(self, state: ForwardState, call: hf.DecoderCall, valid: Tensor | None) -> None:
        """Give the model a mask over pooled tokens, where it makes its masks from one."""
        pool = None if state.plan is None else state.plan.pool
        before = state.before.pooled
        if pool is None and before is None:
            if state.plan is not None and valid is not None:
                state.valid = valid.to(torch.bool) if state.past else state.plan.valid
            return
        if pool is None and valid is None and before.full:
            return
        if pool is None:
            later = None if valid is None else valid[:, state.past :].bool()
        else:
            later = None if pool.full else pool.real
        state.valid = pooled_valid(valid, before, later, state.past, state.pooled_past, state.pooled_length)
        if self.planner.makes_masks:
            return
        call.mask = state.valid
        if state.valid is None and state.cache is None:
            # Without a mask and a cache, transformers would read gaps in the position ids as packed sequences.
            call.mask = torch.ones(call.embeds.shape[:2], dtype=torch.bool, device=call.embeds.device)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        state = self.context.call
        if state is None:
            return None
        if state.stats is not None:
            state.stats.add_span("language_model", state.vision.decoder_start, mark(output[0].device))
        if state.plan is None:
            return None
        if state.cache is not None:
            self._store(state)
        pool = state.plan.pool

        def at_input_length(hidden: Tensor, behind: int | None) -> Tensor:
            hidden = hidden if behind is None else restore(state, hidden, behind)
            if pool is None or hidden.shape[1] < state.pooled_length:
                return hidden
            # Members of a cell share its output; padding takes whatever stands first (masked everywhere).
            return hidden.flatten(0, 1)[pool.source.to(hidden.device)].unflatten(0, pool.slot_of.shape)

        return hf.with_hidden(output, at_input_length)

    def _store(self, state: ForwardState) -> None:
        """Attach to the cache what was pruned."""
        cuts = {layer: here.tokens for layer, here in state.layers.items() if here.tokens is not None}
        shifts = {layer: here.shift for layer, here in state.layers.items() if here.shift is not None}
        pooled = state.pooled
        if self.planner.uniform and cuts:
            last = state.at(len(self.layers) - 1)
            make_uniform(state.cache, state.left_at_the_end(len(self.layers)), state.pooled_past)
            pooled, cuts = last.tokens.after(pooled), {}
        store_state(
            state.cache,
            pooled=pooled,
            cuts=cuts,
            shifts=state.before.shifts | shifts,
            whole_masks=self.planner.makes_masks,
        )


def text_tail(plan: BatchPlan) -> int:
    """So many tokens at the end of every sample are text; of a plan on the host."""
    text = plan.valid.clone()
    for image in plan.images:
        text[image.sample, image.layout.position] = False
    return int(text.flip(1).int().cumprod(1).sum(1).min())


def feature_rows(is_vision: Tensor) -> Tensor:
    """(batch, seq_len) int64: of features that stand at the places of a mask, the row of each place; -1 = none."""
    return is_vision.flatten().cumsum(0).view_as(is_vision) * is_vision - 1


def at_places(features: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Features (num_vision, dim) in their places, zeros elsewhere: (batch, seq_len, dim)."""
    moved = ops.compact([level.unsqueeze(0) for level in features], rows.view(1, -1))
    return [level.view(*rows.shape, -1) for level in moved]


def _pool(pool: PoolStep, embeds: Tensor, mode: str, weight: Tensor | None) -> Tensor:
    batch, seq_len, dim = embeds.shape
    return ops.adaptive_pool(embeds.reshape(batch * seq_len, dim), pool.plan, mode, weight).view(batch, -1, dim)
