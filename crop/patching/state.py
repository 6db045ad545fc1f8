"""The state of one call of the model, and of one ``generate()``; both belong to the thread and task that makes the call.

Calls nest: a hook, a logits processor or another thread may call the same model meanwhile. Each has a state of its own,
found through a context variable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from crop import ops
from crop.geometry.pieces import Encoding
from crop.patching.batch_plan import BatchPlan
from crop.patching.cache import CacheState, cache_state
from crop.patching.planner import Look
from crop.patching.positions import close_gaps
from crop.patching.stats import PrefillStats
from crop.patching.token_map import TokenMap, look_up


@dataclass
class VisionRun:
    """What is noted while the vision tower runs, be it in ``generate()`` or in the model's own forward.

    Args:
        marks: at the tower's last begin and end. decoder_start: at the language model's begin.
        observed: what the method's ``observe`` read last, by number of its watch, one row per image of the tower each.
        encodings: the images of each call of the tower that is still to come, where it gets less than all of them.
        running: those of the call that runs now. place: where what it returns will stand, None: as it is.
    """

    marks: list[Any] = field(default_factory=list)
    decoder_start: Any = None
    observed: dict[int, Tensor] = field(default_factory=dict)
    encodings: list[list[Encoding]] = field(default_factory=list)
    running: list[Encoding] | None = None
    place: Tensor | None = None


def by_tower_call(encodings: Sequence[Encoding | None]) -> list[list[Encoding]]:
    """The images of each call of the tower: models encode pictures first, then videos; none where all of them is encoded."""
    found = [one for one in encodings if one is not None]
    if all(one.whole for one in found):
        return []
    return [call for kind in (False, True) if (call := [one for one in found if one.video == kind])]


@dataclass
class GenerationState:
    """One ``generate()``.

    Args:
        owner: the block whose model generates. arguments: what its caller gave.
        copies: how often every sample is repeated, for beams and return sequences.
        input_ids: of the call of the model that comes next; None once that has begun.
        encodes: what the model is going to be called with, where the vision tower may run before it does.
        look: at the images of that call, once the tower does run. coming: the state of that call, if no sample is repeated.
    """

    owner: Any
    arguments: Mapping[str, Any]
    copies: int = 1
    input_ids: Tensor | None = None
    encodes: Mapping[str, Any] | None = None
    look: Look | None = None
    coming: ForwardState | None = None
    vision: VisionRun = field(default_factory=VisionRun)


@dataclass
class LayerState:
    """What a run of decoder layers holds of the pooled tokens, in one call; it begins at a cut.

    Args:
        tokens: pooled to layer coordinates after this call, None: they hold everything.
        kept_index: (batch, width) int64 pooled tokens of this call that they get, -1 = filler; None: all of them.
        slot_of: (batch, pooled length) int64 inverse of kept_index, -1 = dropped.
        hidden_before: hidden states that came to the cut, of which these layers take a part.
        taken: (batch, width) int64 places of that part in hidden_before, -1 = filler.
        seen_from: (batch, width) int64 the first entry that sees each, as in ``PruneStep``; None: masks tell.
        position_ids: (axes, batch, width), where they are not the model's.
        shift: (batch,) int64 how far renumbered ids lie below: in layer 0 the caller's, later layer 0's; None: not renumbered.
        merge: what the method does to the hidden states before tokens leave, None: nothing.
        rotary: (cos, sin) that the layers receive, kept where a cut scores without positions.
    """

    tokens: TokenMap | None = None
    kept_index: Tensor | None = None
    slot_of: Tensor | None = None
    hidden_before: Tensor | None = None
    taken: Tensor | None = None
    seen_from: Tensor | None = None
    position_ids: Tensor | None = None
    shift: Tensor | None = None
    merge: Callable[[Tensor], Tensor] | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    memo: dict[tuple, tuple[Any, Any]] = field(default_factory=dict)

    def fitted(self, value: Any, kind: Any, change: Callable[[Any], Any]) -> Any:
        """``change(value)``; the model hands the same object to every layer (of a kind), so once per object."""
        key = (kind, id(value))
        if key not in self.memo:
            self.memo[key] = (value, change(value))  # keeps the value alive, so its id stays taken
        return self.memo[key][1]


@dataclass
class ForwardState:
    """One call of the multimodal model.

    Args:
        owner: the block whose model is called.
        plan: what is pruned, on the device of the embeddings once these exist; None: nothing.
        later: makes the plan; None: made, or there is none.
        stats: None for a call without images.
        vision: of the tower.
        input_valid: (batch, past + added) mask of the caller, where the multimodal model makes the masks.
        prefix: the prompt sees all of itself.
        cache: of keys and values, None: there is none.
        past: input tokens before this call. added: input tokens of it.
        valid: (batch, pooled past + pooled length) bool, None: all real.
        pooled: input to pooled coordinates after this call, None: nothing was ever pooled.
        layers: by first decoder layer; 0 is there always.
        layer: decoder layer that was entered last.
    """

    owner: Any
    plan: BatchPlan | None = None
    later: Callable[[], None] | None = None
    stats: PrefillStats | None = None
    vision: VisionRun = field(default_factory=VisionRun)
    input_valid: Tensor | None = None
    prefix: bool = False
    cache: Any = None
    past: int = 0
    added: int = 0
    valid: Tensor | None = None
    pooled: TokenMap | None = None
    layers: dict[int, LayerState] = field(default_factory=lambda: {0: LayerState()})
    layer: int = 0

    def plan_now(self) -> None:
        """Make the plan, unless it is made."""
        later, self.later = self.later, None
        if later is not None:
            later()

    @property
    def before(self) -> CacheState:
        """What was pruned of the cache before this call."""
        return cache_state(self.cache)

    @property
    def pooled_past(self) -> int:
        """Pooled tokens before this call."""
        pooled = self.before.pooled
        return self.past - (0 if pooled is None else pooled.dropped)

    @property
    def pooled_length(self) -> int:
        """Pooled tokens of this call."""
        pool = None if self.plan is None else self.plan.pool
        return self.added if pool is None else pool.kept_index.shape[1]

    @property
    def pooled_total(self) -> int:
        """Pooled tokens after this call."""
        return self.pooled_past + self.pooled_length

    def at(self, layer: int) -> LayerState:
        """What decoder layer ``layer`` holds."""
        return self.layers[max(first for first in self.layers if first <= layer)]

    def entries(self, layer: int) -> int:
        """How many entries of this call decoder layer ``layer`` holds."""
        kept = self.at(layer).kept_index
        return self.pooled_length if kept is None else kept.shape[1]

    def continue_cut(self, layer: int) -> None:
        """Where only earlier calls were cut at ``layer``, the layers from there take what those before have of this one."""
        here, before = self.layers[layer], self.at(layer - 1)
        if before.kept_index is not None:
            tokens = TokenMap.extended(
                here.tokens, self.pooled_past, before.kept_index, self.pooled_length, before.tokens.full
            )
            self.layers[layer] = LayerState(tokens, before.kept_index, before.slot_of)

    def renumber(self, layer: int, close: bool) -> None:
        """Position ids of the layers from ``layer`` on, gaps closed where ``close``."""
        here, ids = self.layers[layer], self.layers[0].position_ids
        shift = CacheState.at(self.before.shifts, layer)
        here.shift = shift
        if here.kept_index is not None and close:
            images = [(image.sample, place) for image, place in zip(self.plan.images, self.plan.positions, strict=True)]
            ids, by = close_gaps(ids, here.slot_of >= 0, images)
            here.shift = by if shift is None else by + shift
        ids = ids if here.kept_index is None else gather_positions(ids, here.kept_index, 0)
        here.position_ids = ids if shift is None else ids - shift.unsqueeze(1)

    def left_at_the_end(self, num_layers: int) -> list[Tensor | None]:
        """Per layer, which of its entries of this call the last layer holds too; None: all of them."""
        last, found = self.at(num_layers - 1), []
        for layer in range(num_layers):
            here = self.at(layer)
            if here is last or last.kept_index is None or here.kept_index is last.kept_index:
                found.append(None)
            else:
                found.append(last.kept_index if here.kept_index is None else look_up(here.slot_of, last.kept_index))
        return found


def gather_positions(position_ids: Tensor | None, index: Tensor, past: int) -> Tensor:
    """Position ids (..., 1 or batch, seq_len) of the tokens that ``index`` (batch, n) names, ascending; fillers get some."""
    if position_ids is None:
        return index + past if past else index
    full = position_ids.expand(*position_ids.shape[:-2], len(index), -1).movedim(-2, 0)
    return ops.compact([full], index, token_dim=-1)[0].movedim(0, -2)
