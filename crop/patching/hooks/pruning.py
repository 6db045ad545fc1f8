"""Door 2, at the input of decoder layer L: Inner-LLM Pruning.

Scores come from layer L - 1's attention call; from layer L on, mask, positions and hidden states are those of the kept
tokens, until the last norm puts the sequence back to its length.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from crop import ops
from crop.patching.attention_hook import tap, unrotated
from crop.patching.batch_plan import PruneStep
from crop.patching.cache import TokenMap
from crop.patching.context import Block, Door, hook
from crop.patching.masks import fit_mask, held, windows
from crop.patching.positions import given_ids
from crop.patching.readmit import empty_layers
from crop.patching.recycle import recycle
from crop.patching.state import Stage, choose, look_up, pruned_mask, score, spread
from crop.patching.stats import mark
from crop.patching.validation import replace_method


class PruningDoor(Door):
    """Cuts the sequence at the layers of the method, and keeps later calls on the same cache right."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.windows = windows(self.language_model.config) if self.adapter.makes_masks else None

    def install(self, undo: ExitStack) -> None:
        """Register the hooks, and their removal with ``undo``."""
        for index, layer in enumerate(self.layers):
            hook(undo, layer.register_forward_pre_hook, self._enter_layer, index, with_kwargs=True)
        hook(undo, self.language_model.norm.register_forward_pre_hook, self._enter_norm)
        if self.adapter.adds_again is not None:
            replace_method(self.language_model, self.adapter.adds_again, self._add_again, undo)
        if self.block.salience is not None:
            undo.enter_context(self.block.salience)
        for cut in self.method.cuts:
            undo.enter_context(self._tap(cut.layer))

    def _tap(self, layer: int) -> AbstractContextManager[None]:
        """Read the scores for the cut at ``layer`` where it needs any."""

        def step() -> PruneStep | None:
            return self.run.chunk.steps.get(layer) if self.run is not None and self.run.chunk is not None else None

        def read(query: Tensor, key: Tensor, scale: float | None, lse: Tensor | None = None) -> None:
            if notes():
                self.run.noted["query"] = query
            if not needs_scores():
                return
            start = mark(query.device)
            with torch.no_grad():
                if not step().rope:
                    tables = tuple(table.to(query.device) for table in self.run.tables)
                    query, key = unrotated(scoring, query, key, tables)
                mass = score(self.run, self.run.stage(layer - 1), step(), query, key, scale, lse)
                self._cut(layer, step(), mass.to(self.run.device))
            self.stats._add("ilp", start, mark(query.device))

        def needs_scores() -> bool:
            return step() is not None and step().rows is not None

        def notes() -> bool:
            return self.run is not None and self.run.noted is not None and layer == self.method.cuts[0].layer

        def asks_of_the_same() -> bool:
            """Whether the rows that score, and what they see, are those of the attention call itself."""
            return needs_scores() and step().rope and self.run.recalled is None

        scoring = self.layers[layer - 1].self_attn
        return tap(scoring, read, when=lambda: needs_scores() or notes(), with_lse=asks_of_the_same)

    def _cut(self, layer: int, step: PruneStep, score: Tensor) -> None:
        run = self.run
        self.stats._selected[layer], run.stages[layer] = choose(run, layer, step, score)

    def _enter_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
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

    def _thin(self, layer: int, step: PruneStep, hidden: Tensor) -> Tensor:
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

    def _add_again(self, add: Callable[..., Tensor], hidden: Tensor, is_vision: Tensor, level: Tensor) -> Tensor:
        """After a layer behind a cut, a level of vision features goes to the tokens that are left."""
        stage = None if self.run is None else self.run.stage(self.run.at)
        if stage is None or stage.keep is None:
            return add(hidden, is_vision, level)
        level = spread(level.to(hidden.device, hidden.dtype), is_vision.to(hidden.device))
        if self.run.recalled is not None:
            before = self.run.recalled.level(self.run.at - self.method.cuts[0].layer)
            level = torch.cat([*(piece.to(level) for piece in before), level], 1)
        return hidden + ops.compact([level], stage.keep.to(hidden.device))[0]

    def _recall(self, layer: int, hidden: Tensor) -> Tensor:
        """From here on the call is about the whole conversation."""
        run = self.run
        empty_layers(run.cache, layer)
        hidden = torch.cat([*(piece.to(hidden.device) for piece in run.recalled.hidden), hidden], 1)
        if layer not in run.chunk.steps:
            every = torch.arange(run.width, device=run.device).expand(hidden.shape[0], -1)
            run.stages[layer] = Stage(TokenMap(every, run.width, True), every, every, before=hidden, back=every)
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
