"""Independent reference for `crop.patch`: no cache, no hooks and no code of the package, one unpadded sample at a time.

It takes the *policy* from a method (`plan`, `cuts` with `select` and `rows`, `pool_mode`), because that is pure geometry with
tests of its own, and recomputes everything else in the dullest way there is:

- pooling by a loop over the cells, in float64; a pooled token has the original position id of its leader;
- the decoder's layers called one after the other; at a cut the rows of the dropped tokens are taken out of the sequence;
- position ids, windows and what images see of themselves from original positions, whatever has been taken out;
- scores from the eager attention weights of the layer before the cut, averaged in float64, sorted in Python.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crop.geometry.layout import PATCH
from crop.methods.base import FeaturePooling, Features
from tests.support.batches import Sample
from tests.support.decision import Decision, Kept, Steps, cells_of, choose, copied, encoded
from tests.support.families.entry import PAD, Family
from tests.support.masked_tower import class_token_attention
from tests.support.sight import visible
from tests.support.vision_rows import vision_rows

GRIDS = {  # what positions follow from: argument of the model -> of `get_rope_index`
    name: name for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "target_sizes")
} | {"video_second_per_grid": "second_per_grids"}


class Oracle:
    """Reference computation on `model`, which must run eager attention; `grad`: its results can be differentiated."""

    def __init__(self, model: Any, family: Family, grad: bool = False) -> None:
        if model.config.get_text_config()._attn_implementation != "eager":
            raise ValueError("Oracle: model must run eager attention (the weights are needed)")
        self.model, self.family, self.grad = model, family, grad
        self.decoder = getattr(model.model, family.decoder)
        self.num_layers = len(self.decoder.layers)
        config = self.decoder.config
        every = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        self.kinds = getattr(config, "layer_types", None) or [every] * self.num_layers
        self.axes = len((getattr(config, "rope_parameters", None) or {}).get("mrope_section", "thw"))
        layers = [layer for layer in family.cuts if layer >= 2]
        self.default_layer = layers[0] if layers else family.cuts[-1]
        self.shares = "shared_kv_states" in inspect.signature(self.decoder.layers[0].forward).parameters
        self._features: dict[tuple, tuple[Tensor, list[Tensor]]] = {}
        self.tower_cut: int | None = None  # layer of the tower from which on it attends to what is encoded alone
        self._markers: dict[Sample, list[tuple[int, Tensor]]] = {}
        self._forwards: dict[tuple, tuple[Tensor, list[int]]] = {}

    # ------------------------------------------------------------------------------ full sequence
    def features(self, prompt: Sample, encoded: tuple = (), copied: tuple = ()) -> tuple[Tensor, list[Tensor]]:
        """(tokens,) which rows stand for an image or a video; rows of the vision encoder for them, in prompt order, and
        those of every further level that the decoder adds between its layers. `encoded`, `copied`: as in `Decision`."""
        key = prompt, encoded, copied
        if key not in self._features:
            is_vision, levels, self._markers[prompt] = vision_rows(
                self.model, self.family, prompt, encoded, copied, self.tower_cut
            )
            self._features[key] = is_vision, levels
        return self._features[key]

    def embed(self, sample: Sample, encoded: tuple = (), copied: tuple = ()) -> tuple[Tensor, list[Tensor]]:
        """Input embeddings of the whole sequence, (tokens, hidden): text rows and vision rows; what the decoder adds to
        the rows after its first layers, one (tokens, hidden) per layer."""
        rows = self.model.get_input_embeddings()(torch.tensor(sample.ids))
        is_vision, levels = self.features(sample.prompt(), encoded, copied)
        is_vision = torch.cat([is_vision, is_vision.new_zeros(len(sample.ids) - len(is_vision))])
        if levels:
            rows = rows.index_put((is_vision,), levels[0])
        for token, mark in self._markers.get(sample.prompt(), []):
            rows = torch.where((torch.tensor(sample.ids) == token)[:, None], mark, rows)
        return rows, [torch.zeros_like(rows).index_put((is_vision,), level) for level in levels[1:]]

    def positions(self, sample: Sample) -> Tensor:
        """Original position ids, (tokens,) or (3, tokens) for multi-axis rotary embeddings."""
        if not hasattr(self.model.model, "get_rope_index"):
            return torch.arange(len(sample.ids)) + self.family.first_position
        index, inputs = self.model.model.get_rope_index, sample.prompt().inputs()
        more = {asked: inputs[name] for name, asked in GRIDS.items() if name in inputs}
        if not more:
            return torch.arange(len(sample.ids)).expand(self.axes, -1)
        if "mm_token_type_ids" in inspect.signature(index).parameters:
            more["mm_token_type_ids"] = inputs["mm_token_type_ids"]
        found, _ = index(inputs["input_ids"], attention_mask=inputs["attention_mask"], **more)
        behind = found.max() + 1 + torch.arange(len(sample.ids) - sample.prompt_length)
        return torch.cat([found[:, 0], behind.expand(self.axes, -1)], 1)

    def visible(self, sample: Sample, places: Tensor, kind: str) -> Tensor | None:
        """Which of the rows at the original positions `places` each sees in a layer of this kind, see `sight.visible`."""
        return visible(self.family.mask, sample, places, kind, self.decoder.config)

    # ------------------------------------------------------------------------------ one forward
    def rows(self, sample: Sample, decision: Decision) -> list[tuple[tuple[int, ...], int]]:
        """(members, leader) positions of every row of the pooled sequence."""
        spans = sample.spans()
        vision = {position for span in spans for position in span}
        found = [((position,), position) for position in range(len(sample.ids)) if position not in vision]
        for span, cells in zip(spans, decision.cells, strict=True):
            found += [(tuple(span[m] for m in members), span[leader]) for members, leader in cells]
        return sorted(found, key=lambda row: row[1])

    def dropped(self, sample: Sample, decision: Decision, kept: Kept) -> list[int]:
        """Original positions of the leaders that are not among `kept`."""
        return [
            span[leader]
            for span, cells, mine in zip(sample.spans(), decision.cells, kept, strict=True)
            for number, (_, leader) in enumerate(cells)
            if number not in mine
        ]

    def pool(self, full: Tensor, rows: list[tuple], mode: str, weight: list[float]) -> Tensor:
        """(rows, hidden) means, or maxima, of the members of each row."""
        out = []
        for members, _ in rows:
            stack = torch.stack([full[m] for m in members]).double()
            share = torch.tensor([weight[m] for m in members]).double()
            value = stack.amax(0) if mode == "max" else share / share.sum() @ stack
            out.append(value.to(full.dtype))
        return torch.stack(out)

    @staticmethod
    def weights(full: Tensor, sample: Sample, decision: Decision) -> list[float]:
        """What each position weighs in a mean: exp(4 standard deviations of how far it points away from its image's mean)."""
        weight = [1.0] * len(full)
        if decision.mode != "distinct":
            return weight
        for span, patches in zip(sample.spans(), decision.patches, strict=True):
            rows = [full[span[p]].double() for p in patches]
            middle = sum(rows) / max(len(rows), 1)
            apart = [1 - float(row @ middle / (row.norm() * middle.norm())) for row in rows]
            average = sum(apart) / max(len(apart), 1)
            spread = (sum((a - average) ** 2 for a in apart) / max(len(apart), 1)) ** 0.5
            for p, a in zip(patches, apart, strict=True):
                weight[span[p]] = math.exp(4 * min(max((a - average) / (spread + 1e-3), -8), 8))
        return weight

    def numbers(self, sample: Sample, places: Tensor) -> Tensor:
        """Position ids of the rows at `places`, (rows,) or (3, rows), in a sequence that holds no others."""
        return self.positions(sample)[..., places]

    def entering(self, layer: int, hidden: Tensor, places: Tensor, sample: Sample, decision: Decision) -> Tensor:
        """Hidden states at the input of a cut, before rows are taken out."""
        return hidden

    def run(
        self, sample: Sample, decision: Decision, stop: int, prompt: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states behind the first `stop` layers, (rows, hidden); the original position of each row; the attention
        weights of the last of these layers, (heads, rows, rows).

        `prompt`: in every layer the rows from this position on see what the last cut leaves (a uniform cache).
        """
        with torch.set_grad_enabled(self.grad):
            rows, (full, added) = self.rows(sample, decision), self.embed(sample, decision.encoded, decision.copied)
            weight = self.weights(full, sample, decision)
            extra = self.per_layer(sample, rows)
            hidden, *added = (self.pool(level, rows, decision.mode, weight) for level in (full, *added))
            hidden = hidden * getattr(self.decoder.config, "embedding_multiplier", 1.0)
            places = torch.tensor([leader for _, leader in rows])
            unseen = torch.tensor(self.dropped(sample, decision, decision.kept), dtype=torch.int64)
            attention, cuts, shared = None, dict(decision.cuts), {}
            if extra is not None:
                extra = self.decoder.project_per_layer_inputs(hidden[None], extra[None])[0]
            for index in range(stop):
                if index in cuts:
                    hidden = self.entering(index, hidden, places, sample, decision)
                    left = ~torch.isin(places, torch.tensor(self.dropped(sample, decision, cuts[index])))
                    hidden, places, *added = (tensor[left] for tensor in (hidden, places, *added))
                    extra = None if extra is None else extra[left]
                mask = self.visible(sample, places, self.kinds[index])
                if mask is not None and prompt is not None:
                    mask = mask & ~((places >= prompt)[:, None] & torch.isin(places, unseen))
                more = {} if not self.shares else {"shared_kv_states": shared}
                more |= {} if extra is None else {"per_layer_input": extra[None, :, index]}
                hidden, attention = self.layer(index, hidden, self.numbers(sample, places), mask, **more)
                if index < len(added):
                    hidden = hidden + added[index]
            return hidden, places, attention

    def per_layer(self, sample: Sample, rows: list[tuple]) -> Tensor | None:
        """What every layer adds to each row for the sake of its token, an image's being padding: (rows, layers, dim)."""
        if not getattr(self.decoder.config, "hidden_size_per_layer_input", 0):
            return None
        vision = {position for span in sample.spans() for position in span}
        ids = [PAD if leader in vision else sample.ids[leader] for _, leader in rows]
        return self.decoder.get_per_layer_inputs(torch.tensor(ids), None)

    def layer(
        self, index: int, hidden: Tensor, ids: Tensor, mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        """One decoder layer alone: its output and its attention weights (None where it is no attention)."""
        module, seen = self.decoder.layers[index], []
        by_kind = "layer_type" in inspect.signature(self.decoder.rotary_emb.forward).parameters
        more = {"layer_type": self.kinds[index]} if by_kind else {}
        kind = (
            (getattr(self.decoder.config, "rope_parameters", None) or {}).get(self.kinds[index], {}) if by_kind else {}
        )
        rotary = (
            None if kind is None or mask is None else self.decoder.rotary_emb(hidden[None], ids.unsqueeze(-2), **more)
        )
        if mask is None:
            return _first(module(hidden[None], attention_mask=None, position_embeddings=rotary))[0], None
        added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None]
        handle = module.self_attn.register_forward_hook(lambda _module, _given, out: seen.append(out[1][0]))
        try:
            out = module(hidden[None], attention_mask=added, position_embeddings=rotary, **given)
        finally:
            handle.remove()
        return _first(out)[0], seen[0]

    def forward(self, sample: Sample, decision: Decision, prompt: int | None = None) -> tuple[Tensor, list[int]]:
        """Logits (rows, vocab) of what is left behind the last layer and the original position of each row; equal
        questions are answered from memory."""
        key = (sample, replace(decision, scores=(), near_tie=False), prompt)
        if key not in self._forwards:
            hidden, places, _ = self.run(sample, decision, self.num_layers, prompt)
            with torch.set_grad_enabled(self.grad):
                self._forwards[key] = self.model.lm_head(norm_of(self.decoder)(hidden)), places.tolist()
        return self._forwards[key]

    def logits_by_position(self, sample: Sample, decision: Decision) -> dict[int, Tensor]:
        """Logits of every row the specification defines: text and kept tokens that stand for themselves alone."""
        alone = {leader for members, leader in self.rows(sample, decision) if len(members) == 1}
        logits, places = self.forward(sample, decision)
        return {place: logits[row] for row, place in enumerate(places) if place in alone}

    def greedy(self, sample: Sample, decision: Decision, steps: int, prompt: int | None = None) -> Steps:
        """Greedy tokens, everything recomputed at each step; the decision is the prompt's."""
        result = Steps()
        for _ in range(steps):
            logits = self.forward(sample, decision, prompt)[0][-1]
            result.logits.append(logits)
            result.tokens.append(int(logits.argmax()))
            sample = sample.extended(result.tokens[-1:])
        return result

    # ------------------------------------------------------------------------------ the decision
    def keep_all(self, sample: Sample) -> Decision:
        """The decision that changes nothing."""
        return Decision(cells=tuple(tuple(((n,), n) for n in range(len(span))) for span in sample.spans()))

    def decide(
        self,
        sample: Sample,
        method: Any,
        regions: Sequence[Any],
        layouts: Sequence[Any],
        previous: Decision | None = None,
    ) -> Decision:
        """What `method` does to the images of the sample that `previous` does not know.

        Args:
            sample: the whole sequence so far.
            method: supplies plan, cuts (select, layer, rows) and pool_mode.
            regions, layouts: one per image that is decided about; layouts as before pooling.
            previous: decision on the images before.
        """
        method, decision, pooled = method.with_layer(self.default_layer), previous or Decision(), []
        fresh = range(len(decision.cells), len(decision.cells) + len(regions))
        pieces = sample.pieces()[fresh.start :] if method.encodes and fresh else [None] * len(fresh)
        known = [encoded(method, layout, *more) for layout, *more in zip(layouts, regions, pieces, strict=True)]
        if method.encodes:
            places = zip(layouts, regions, pieces, known, strict=True)
            stand = [tuple(copied(method, *more)) for more in places]
            decision = replace(
                decision, encoded=(*decision.encoded, *map(tuple, known)), copied=(*decision.copied, *stand)
            )
            known = [sorted([*own, *(n for n, _ in more)]) for own, more in zip(known, stand, strict=True)]
        else:
            decision = replace(decision, encoded=(), copied=())
        for number, region, layout, mine in zip(fresh, regions, layouts, known, strict=True):
            part = layout.take(torch.tensor(mine))
            plan = method.plan(part, region)
            if isinstance(plan, FeaturePooling):
                cells, after = self._cells_by_features(plan, method, sample, number, mine, decision), layout
            else:
                cells, after = cells_of(plan, part, mine)
            cuts = tuple((first, (*kept, tuple(range(len(cells))))) for first, kept in decision.cuts)
            decision = replace(decision, cells=(*decision.cells, cells), cuts=cuts)
            pooled.append(after)
        mode = getattr(method, "pool_mode", "mean")
        if mode == "distinct":
            pairs = zip(layouts, known, strict=True)
            found = [tuple(n for n in mine if layout.kind[n] == PATCH) for layout, mine in pairs]
            decision = replace(decision, patches=(*decision.patches, *found))
        decision = replace(decision, mode=mode)
        for number, cut in enumerate(method.cuts):
            decision = self._decide_cut(sample, decision, cut, fresh, pooled, regions, later=number > 0)
        return decision

    def _cells_by_features(
        self, plan: FeaturePooling, method: Any, sample: Sample, number: int, known: list[int], decision: Decision
    ) -> tuple:
        """Cells of an image whose method decides by features, from features computed here."""
        rows, _ = self.embed(sample, decision.encoded, decision.copied)
        spans, image = sample.spans(), sample.images[number]
        observed = None
        if self.family.tower_attention:
            tower = getattr(self.model.model, self.family.tower)
            observed = class_token_attention(tower, image.arguments["pixel_values"], method)
        mine = [spans[number][n] for n in known]
        found = plan.decide(Features(rows[mine], rows[spans[-1][-1] + 1 :], observed), *plan.given)
        cell = found.cell.tolist()
        return tuple(
            (tuple(known[n] for n, c in enumerate(cell) if c == own), known[leader])
            for own, leader in enumerate(found.leader.tolist())
        )

    def _decide_cut(
        self,
        sample: Sample,
        decision: Decision,
        cut: Any,
        fresh: range,
        pooled: Sequence[Any],
        regions: Sequence[Any],
        later: bool,
    ) -> Decision:
        selections = [cut.select(layout, region) for layout, region in zip(pooled, regions, strict=True)]
        if all(selection is None for selection in selections):
            return decision
        masses = self.masses(sample, decision, cut, fresh)
        kept, near, before = {}, decision.near_tie, decision.kept_at(cut.layer)
        for number, selection, mass in zip(fresh, selections, masses, strict=True):
            alive = before[number]
            if selection is None or (later and selection.num_keep >= len(alive)):
                continue
            priority, weight = selection.priority.tolist(), selection.weight
            if len(priority) != len(decision.cells[number]):  # of the tokens before features decided: all may stay
                leaders = [leader for _, leader in decision.cells[number]]
                priority = [priority[leader] - min(*priority, 0) for leader in leaders]
                weight = None if weight is None else weight[leaders]
            if later:  # it takes its number, if need be of those it likes least
                priority = [max(p, -1) + 1 if n in alive else -1 for n, p in enumerate(priority)]
            kept[number], tie = choose(mass, selection.num_keep, priority, weight)
            near = near or tie
        scores = decision.scores[: fresh.start] + tuple(masses)
        return replace(decision.cut(cut.layer, kept), scores=scores, near_tie=near)

    def masses(self, sample: Sample, decision: Decision, cut: Any, fresh: Sequence[int]) -> list[tuple[float, ...]]:
        """Attention mass of every cell of the images `fresh`, 0 where an earlier cut dropped it or nothing is attended."""
        weights, places = self.attention(sample, decision, cut)
        if weights is None:
            return [(0.0,) * len(decision.cells[number]) for number in fresh]
        weights, places = weights.double(), places.tolist()
        spans = [sample.spans()[number] for number in fresh]
        scoring = [row for row, place in enumerate(places) if place > max(span[-1] for span in spans)]
        if cut.rows == "last":
            scoring = [len(places) - 1]
        mean = weights[:, scoring].mean((0, 1)).tolist() if scoring else [0.0] * len(places)
        mass = dict(zip(places, mean, strict=True))
        return [
            tuple(mass.get(span[leader], 0.0) for _, leader in decision.cells[number])
            for number, span in zip(fresh, spans, strict=True)
        ]

    def attention(self, sample: Sample, decision: Decision, cut: Any) -> tuple[Tensor, Tensor]:
        """(heads, rows, rows) weights of the layer before a cut, and the original position of each row."""
        _, places, weights = self.run(sample, decision, cut.layer)
        return weights, places


def norm_of(decoder: Any) -> Any:
    """The norm behind the last layer."""
    return getattr(decoder, "norm", None) or decoder.embedding_norm


def _first(out: Any) -> Tensor:
    """The hidden states of what a layer returns."""
    return out if isinstance(out, Tensor) else out[0]
