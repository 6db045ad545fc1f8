"""At the decoder layers: Inner-LLM Pruning.

Scores come from layer L - 1's attention call; from layer L on, mask, positions and hidden states are those of the kept
tokens, until the last norm puts the sequence back to its length.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from crop import ops
from crop.models.attention_hook import attention_hook, undo_rope
from crop.patching import hf
from crop.patching.batch_plan import PruneStep
from crop.patching.context import ModelHook, PatchContext, hook, replace_method
from crop.patching.hooks.pooling import at_places, feature_rows
from crop.patching.masks import causal, gather, gather_own, key_positions, pad_columns
from crop.patching.positions import given_ids
from crop.patching.scoring import cut, restore, score
from crop.patching.state import ForwardState, LayerState, gather_positions
from crop.patching.stats import mark
from crop.patching.token_map import look_up


class PruningHook(ModelHook):
    """Cuts the sequence at the layers of the method, and keeps later calls on the same cache right."""

    def __init__(self, context: PatchContext) -> None:
        super().__init__(context)
        config = self.language_model.config
        self.windows = self.family.windows(config)
        self.recurrent = set(self.family.recurrent_layers(config))
        kinds = self.family.layer_kinds(config)
        asked = {one.layer - 1 for one in self.method.cuts if not one.rope}
        self.unrotated = {layer for layer in asked if kinds[layer] not in self.family.traits.unrotated}

    def install(self, undo: ExitStack) -> None:
        """Register the hooks, and their removal with ``undo``."""
        for index, layer in enumerate(self.layers):
            hook(undo, layer.register_forward_pre_hook, self._enter_layer, index, with_kwargs=True)
        norm = getattr(self.language_model, self.family.traits.norm)
        hook(undo, norm.register_forward_pre_hook, self._enter_norm)
        if self.family.traits.deepstack_method is not None:
            replace_method(self.language_model, self.family.traits.deepstack_method, self._add_level, undo)
        for one in self.method.cuts:
            if one.layer - 1 in self.recurrent:
                continue  # cannot score; refused where it would have to
            undo.enter_context(self._scoring(one.layer))

    def _step(self, layer: int) -> PruneStep | None:
        """What is to happen at the input of ``layer`` in the call that runs now."""
        state = self.context.call
        return state.plan.prunes.get(layer) if state is not None and state.plan is not None else None

    def _scoring(self, layer: int) -> AbstractContextManager[None]:
        """Read the scores for the cut at ``layer`` where it needs any."""

        def read(query: Tensor, key: Tensor, scale: float | None, lse: Tensor | None = None) -> None:
            state, step = self.context.call, self._step(layer)
            here, start = state.at(layer - 1), mark(query.device)
            with torch.no_grad():
                if layer - 1 in self.unrotated:
                    tables = tuple(table.to(query.device) for table in here.rotary)
                    # A static cache has more keys than tokens; there are no earlier ones.
                    query, key = undo_rope(attention, query, key[:, :, : query.shape[2]], tables)
                scores = score(state, here, step, query, key, scale, lse)
                self._cut(state, layer, step, scores.to(state.plan.device))
            state.stats.add_span("ilp", start, mark(query.device))

        def needed() -> bool:
            step = self._step(layer)
            return step is not None and step.rows is not None

        attention = self.layers[layer - 1].self_attn
        # The attention's own log-sum-exp is of the same rows and keys.
        return attention_hook(attention, read, when=needed, with_lse=lambda: layer - 1 not in self.unrotated)

    def _cut(self, state: ForwardState, layer: int, step: PruneStep, scores: Tensor) -> None:
        state.stats.selected[layer], state.layers[layer] = cut(state, layer, step, scores)

    def _enter_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        state = self.context.call
        if state is None:
            return None
        state.layer, call = index, hf.LayerCall(module, args, kwargs)
        step = self._step(index)
        if step is not None:
            call.hidden = self._prune(state, index, step, call.hidden)
        elif index and index in state.layers:
            state.continue_cut(index)
        if index and index in state.layers and state.layers[0].position_ids is not None:
            state.renumber(index, close=state.plan is not None and self.planner.positions == "compact")
        here, queries = state.at(index), call.hidden.shape[1]
        whole = queries == state.entries(index)  # else the model goes on with the last tokens alone, all of them text
        # Masks over input tokens do not fit a cache that was pruned anywhere: a sliding layer holds the last tokens only.
        pruned = state.pooled is not None or any(one.tokens is not None for one in state.layers.values())
        if pruned if self.planner.makes_masks else here.tokens is not None:
            call.mask = here.fitted(
                call.mask,
                ("mask", index in self.recurrent, self.windows[index], queries),
                lambda mask: self._fit_mask(state, here, index, call.hidden, mask),
            )
        moved = here.kept_index is not None or here.position_ids is not None and index
        rotated = whole and call.rotary is not None and moved
        if rotated:
            call.rotary, ids = here.fitted(
                call.rotary, "rotary", lambda old: self._fit_rotary(here, call.hidden, old, call.position_ids)
            )
        if whole and here.kept_index is not None and call.per_layer is not None:
            call.per_layer = ops.compact([call.per_layer], here.kept_index.to(call.per_layer.device))[0]
        if state.plan is not None and (call.position_ids is None or hf.is_flash(self.language_model.config)):
            call.position_ids = None  # gaps would send flash attention down its packed-sequence path
        elif rotated:
            call.position_ids = ids
        elif here.kept_index is not None:
            call.position_ids = here.fitted(
                call.position_ids, "ids", lambda ids: gather_positions(ids, here.kept_index, 0)
            )
        if state.plan is not None and index in self.unrotated:
            here.rotary = call.rotary
        return call.args, call.kwargs

    def _prune(self, state: ForwardState, layer: int, step: PruneStep, hidden: Tensor) -> Tensor:
        """Hidden states of the tokens that stay at a cut."""
        if step.rows is None:
            self._cut(
                state, layer, step, torch.zeros(step.candidates.shape, dtype=torch.float32, device=state.plan.device)
            )
        here = state.layers.get(layer)
        if here is None or here.kept_index is None:
            raise RuntimeError(f"patch: layer {layer - 1} must call transformers' attention interface, got no call")
        start, here.hidden_before = mark(hidden.device), hidden
        if here.merge is not None:
            hidden = here.merge(hidden.clone())
            if not isinstance(hidden, Tensor) or (hidden.shape, hidden.dtype) != (
                here.hidden_before.shape,
                here.hidden_before.dtype,
            ):
                raise TypeError(
                    "patch: merge() of a method must return hidden states of the shape and dtype it was given"
                )
        hidden = ops.compact([hidden], here.taken.to(hidden.device))[0]
        state.stats.add_span("ilp", start, mark(hidden.device))
        return hidden

    def _add_level(self, add: Callable[..., Tensor], hidden: Tensor, is_vision: Tensor, level: Tensor) -> Tensor:
        """After a layer behind a cut, a level of vision features goes to the tokens that are left."""
        state = self.context.call
        here = None if state is None else state.at(state.layer)
        if here is None or here.kept_index is None:
            return add(hidden, is_vision, level)
        rows = look_up(feature_rows(is_vision), here.kept_index.to(is_vision.device)).to(hidden.device)
        return hidden + at_places([level.to(hidden.device, hidden.dtype)], rows)[0]

    def _fit_mask(
        self, state: ForwardState, here: LayerState, index: int, hidden: Tensor, mask: Tensor | None
    ) -> Tensor | None:
        """A mask for what a layer holds: made over input tokens by the multimodal model, else over pooled ones."""
        batch, queries = hidden.shape[:2]
        flash = hf.is_flash(self.language_model.config)
        if (
            here.seen_from is not None
            and queries == here.seen_from.shape[1]
            and not (flash or self.planner.makes_masks or index in self.recurrent)
            and (mask is None or mask.dtype == torch.bool)
        ):
            return pad_columns(causal(here.seen_from.to(hidden.device)), hf.capacity_of(state.cache))
        maps = [state.pooled, here.tokens] if self.planner.makes_masks else [here.tokens]
        total = state.past + state.added if self.planner.makes_masks else state.pooled_total
        keys = key_positions(maps, batch, total, state.entries(index), self.windows[index])
        full = all(tokens is None or tokens.full for tokens in maps)
        if index in self.recurrent:
            pooled = self.planner.makes_masks and state.plan is not None and state.plan.pool is not None
            moved = pooled or here.kept_index is not None
            return gather_own(mask, keys[:, -queries:], total) if moved and not (mask is None and full) else mask
        mask = gather(mask, keys, full, queries, total, flash)
        return pad_columns(mask, hf.capacity_of(state.cache))

    def _fit_rotary(
        self, here: LayerState, hidden: Tensor, old: tuple[Tensor, Tensor], ids: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Rotary tables and position ids of the tokens that a layer holds, in one call where both are gathered."""
        if here.position_ids is not None:
            tables = self.language_model.rotary_emb(hidden, given_ids(here.position_ids))
            return tables, ids if ids is None or here.kept_index is None else gather_positions(ids, here.kept_index, 0)
        rows, dims = [table.expand(hidden.shape[0], -1, -1) for table in old], [1] * len(old)
        if ids is None:
            return tuple(ops.compact(rows, here.kept_index)), None
        ids = ids.expand(*ids.shape[:-2], hidden.shape[0], -1).movedim(-2, 0)
        *tables, ids = ops.compact([*rows, ids], here.kept_index, token_dim=[*dims, -1])
        return tuple(tables), ids.movedim(0, -2)

    def _enter_norm(self, module: nn.Module, args: tuple) -> tuple | None:
        state = self.context.call
        if state is None:
            return None
        return (restore(state, args[0], len(self.layers) - 1), *args[1:])
