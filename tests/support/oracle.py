"""Independent reference for `crop.patch`: no cache, no hooks of the package, one unpadded sample at a time.

It takes the *policy* from a method (`plan`, `select`, `layer`, `rows`, `pool_mode`), because that is pure
geometry with tests of its own, and recomputes everything else in the dullest way there is:

- pooling by a loop over the cells, in float64; a pooled token has the original position id of its leader;
- scores from the eager attention weights of layer `layer - 1`, averaged in float64, sorted in Python;
- dropped tokens stay in the sequence, but no row of a layer >= `layer` sees their key. Nothing is sliced.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from crop.geometry.layout import PATCH
from crop.methods.base import FeaturePooling, Features

NEAR_TIE = 1e-5  # relative gap below which float32 may decide otherwise


@dataclass(frozen=True)
class Decision:
    """What happens to the images of one sample.

    Attributes:
        layer: first decoder layer that does not see the dropped tokens; None: every layer sees all.
        mode: "mean", "max" or "distinct" pooling.
        patches: per image, the indices of its tokens that are no padding and no newline.
        cells: per image, one (members, leader) per token after pooling, as indices in the image.
        kept: per image, the ascending indices into `cells` that survive.
        scores: per image, the float64 attention mass of every cell (empty where not computed).
        near_tie: some cut between kept and dropped falls between scores closer than `NEAR_TIE`.
    """

    layer: int | None = None
    mode: str = "mean"
    patches: tuple[tuple[int, ...], ...] = ()
    cells: tuple[tuple[tuple[tuple[int, ...], int], ...], ...] = ()
    kept: tuple[tuple[int, ...], ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()
    near_tie: bool = False

    def kept_original(self, image: int) -> list[int]:
        """Ascending indices among the image's original tokens that survive (leaders of cells)."""
        return [self.cells[image][k][1] for k in self.kept[image]]

    def counts(self) -> list[tuple[int, int, int]]:
        """(original, after pooling, after dropping) tokens per image."""
        return [
            (sum(len(members) for members, _ in cells), len(cells), len(kept))
            for cells, kept in zip(self.cells, self.kept, strict=True)
        ]


def _rows(features: Any) -> Tensor:
    """Features as (tokens, hidden), whatever list or batch of images they came in."""
    if not isinstance(features, Tensor):
        return torch.cat([_rows(part) for part in features])
    return features.reshape(-1, features.shape[-1])


@dataclass
class Steps:
    """Greedy generation: the token and the logits of each step."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class Oracle:
    """Reference computation on `model`, which must run eager attention."""

    def __init__(self, model: Any) -> None:
        if model.config.get_text_config()._attn_implementation != "eager":
            raise ValueError("Oracle: model must run eager attention (the weights are needed)")
        self.model, self.family = model, model.config.model_type
        self.language_model = getattr(model.model, "language_model", None) or model.model.text_model
        self.num_layers = len(self.language_model.layers)
        self._features: dict[tuple, tuple[Tensor, list[Tensor]]] = {}
        self._forwards: dict[tuple, tuple] = {}

    # ------------------------------------------------------------------------------ full sequence
    @torch.no_grad()
    def features(self, sample: Any) -> tuple[Tensor, list[Tensor]]:
        """Rows of the vision encoder for each image or video token, in prompt order, and those of every further
        level that the decoder adds between its layers."""
        key = sample.vision_key()
        if key not in self._features:
            inputs, base = sample.inputs(self.family), self.model.model
            streams = []
            for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
                if pixels not in inputs:
                    continue
                encode = getattr(base, f"get_{name}_features")
                wanted = [*inspect.signature(encode).parameters, "image_sizes"]
                out = encode(**{key: value for key, value in inputs.items() if key in wanted}, return_dict=True)
                levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
                streams.append((name, [_rows(level) for level in levels]))
            ids = inputs["input_ids"][0]
            tokens = {name: getattr(self.model.config, f"{name}_token_id") for name, _ in streams}
            is_vision = sum((ids == token for token in tokens.values()), torch.zeros(len(ids), dtype=torch.bool))
            merged = [torch.zeros(int(is_vision.sum()), level.shape[1]) for level in streams[0][1]] if streams else []
            for name, levels in streams:
                for into, level in zip(merged, levels, strict=True):
                    into[ids[is_vision] == tokens[name]] = level
            self._features[key] = is_vision, merged
        return self._features[key]

    @torch.no_grad()
    def embed(self, sample: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Input embeddings of the whole sequence, (tokens, hidden): text rows and vision rows; which rows are vision;
        what the decoder adds to the rows after its first layers, one (tokens, hidden) per layer."""
        rows = self.model.get_input_embeddings()(torch.tensor(sample.ids)).clone()
        is_vision, levels = self.features(sample)
        is_vision = is_vision[: len(sample.ids)]
        is_vision = torch.cat([is_vision, is_vision.new_zeros(len(sample.ids) - len(is_vision))])
        if levels:
            rows[is_vision] = levels[0]
        added = []
        for level in levels[1:]:
            full = torch.zeros_like(rows)
            full[is_vision] = level
            added.append(full)
        return rows, is_vision, added

    def positions(self, sample: Any) -> Tensor:
        """Original position ids, (tokens,) or (3, tokens) for multi-axis rotary embeddings."""
        if not hasattr(self.model.model, "get_rope_index"):
            first = 1 if self.family == "paligemma" else 0
            return torch.arange(len(sample.ids)) + first
        inputs = sample.inputs(self.family)
        grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
        if not grids:
            return torch.arange(len(sample.ids)).expand(3, -1)
        more = {name: inputs[name] for name in ("second_per_grid_ts",) if name in inputs}
        kinds = torch.zeros_like(inputs["mm_token_type_ids"])
        for span in sample.spans():  # a placeholder without an image is text
            kinds[:, span] = inputs["mm_token_type_ids"][:, span]
        found, _ = self.model.model.get_rope_index(inputs["input_ids"], mm_token_type_ids=kinds, **grids, **more)
        return found[:, 0]

    def visible(self, sample: Any, kind: str) -> Tensor:
        """(tokens, tokens) bool: which key each row of a layer of this kind sees in the unpruned model."""
        row, key = torch.arange(len(sample.ids))[:, None], torch.arange(len(sample.ids))[None]
        seen = key <= row
        if self.family == "paligemma":  # the prompt sees all of itself
            seen = seen | (key < sample.prompt_length)
        if self.family == "gemma3":  # an image sees all of itself
            for span in sample.spans():
                here = torch.zeros(len(sample.ids), dtype=torch.bool)
                here[list(span)] = True
                seen = seen | (here[:, None] & here[None])
        if kind == "sliding_attention":
            seen = seen & (row - key < self.language_model.config.sliding_window)
        return seen

    # ------------------------------------------------------------------------------ one forward
    def _layout(self, sample: Any, decision: Decision) -> tuple[list[tuple], list[int]]:
        """Rows of the pooled sequence as (members, leader) positions, and the rows that are dropped."""
        image_of = {position: number for number, span in enumerate(sample.spans()) for position in span}
        rows = [((position,), position, False) for position in range(len(sample.ids)) if position not in image_of]
        for number, span in enumerate(sample.spans()):
            for index, (members, leader) in enumerate(decision.cells[number]):
                gone = index not in decision.kept[number]
                rows.append((tuple(span[m] for m in members), span[leader], gone))
        rows.sort(key=lambda row: row[1])
        return [row[:2] for row in rows], [n for n, (_, _, gone) in enumerate(rows) if gone]

    def _pooled(self, full: Tensor, rows: list[tuple], mode: str, weight: list[float]) -> Tensor:
        out = []
        for members, _ in rows:
            stack = torch.stack([full[m] for m in members]).double()
            share = torch.tensor([weight[m] for m in members]).double()
            value = stack.amax(0) if mode == "max" else share / share.sum() @ stack
            out.append(value.to(full.dtype))
        return torch.stack(out)

    @staticmethod
    def _weights(full: Tensor, sample: Any, decision: Decision) -> list[float]:
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

    @contextlib.contextmanager
    def _masks(self, masks: list[Tensor]) -> Iterator[None]:
        """Every layer gets its own (rows, rows) bool mask."""
        handles = []
        for module, mask in zip(self.language_model.layers, masks, strict=True):
            added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None]
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, added=added: (args, {**kwargs, "attention_mask": added}),
                    with_kwargs=True,
                )
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(
        self, sample: Any, decision: Decision, *, attentions: bool = False
    ) -> tuple[Tensor, list[int], list[int], Any]:
        """Logits of the pooled sequence; equal questions are answered from memory.

        Returns:
            logits (rows, vocab), original position of each row, rows that were dropped, and the
            attention weights per layer where asked.
        """
        question = replace(decision, scores=(), near_tie=False)
        key = (sample.ids, sample.vision_key(), question, attentions)
        if key not in self._forwards:
            self._forwards[key] = self._forward(sample, decision, attentions)
        return self._forwards[key]

    @torch.no_grad()
    def _forward(self, sample: Any, decision: Decision, attentions: bool) -> tuple[Tensor, list[int], list[int], Any]:
        rows, dropped = self._layout(sample, decision)
        leaders = [leader for _, leader in rows]
        full, is_vision, added = self.embed(sample)
        weight = self._weights(full, sample, decision)
        more = {}
        if added:
            more["visual_pos_masks"] = is_vision[leaders][None]
            more["deepstack_visual_embeds"] = [
                self._pooled(level, rows, decision.mode, weight)[is_vision[leaders]] for level in added
            ]
        kinds = getattr(self.language_model.config, "layer_types", None) or ["full_attention"] * self.num_layers
        masks = []
        for index, kind in enumerate(kinds):
            mask = self.visible(sample, kind)[leaders][:, leaders]
            if decision.layer is not None and index >= decision.layer:
                mask[:, dropped] = False
                mask.fill_diagonal_(True)  # a dropped row sees itself only to stay finite; nobody sees it
            masks.append(mask)
        with self._masks(masks):
            out = self.language_model(
                inputs_embeds=self._pooled(full, rows, decision.mode, weight)[None],
                position_ids=self.positions(sample)[..., leaders].unsqueeze(-2),
                use_cache=False,
                output_attentions=attentions,
                **more,
            )
        logits = self.model.lm_head(out.last_hidden_state)[0]
        return logits, leaders, dropped, out.attentions

    def text_logits(self, sample: Any, decision: Decision) -> dict[int, Tensor]:
        """Logits by original position of every row the specification defines: text and kept tokens
        that stand for themselves alone."""
        rows, dropped = self._layout(sample, decision)
        logits = self.forward(sample, decision)[0]
        return {
            leader: logits[row]
            for row, (members, leader) in enumerate(rows)
            if row not in dropped and len(members) == 1
        }

    def greedy(self, sample: Any, decision: Decision, steps: int) -> Steps:
        """Greedy tokens, everything recomputed at each step; the decision is the prompt's."""
        result = Steps()
        for _ in range(steps):
            logits = self.forward(sample, decision)[0][-1]
            result.logits.append(logits)
            result.tokens.append(int(logits.argmax()))
            sample = sample.extended(result.tokens[-1:])
        return result

    # ------------------------------------------------------------------------------ the decision
    def keep_all(self, sample: Any) -> Decision:
        """The decision that changes nothing."""
        cells = tuple(tuple(((n,), n) for n in range(len(span))) for span in sample.spans())
        return Decision(cells=cells, kept=tuple(tuple(range(len(c))) for c in cells))

    def decide(
        self,
        sample: Any,
        method: Any,
        regions: list[Any],
        layouts: list[Any],
        *,
        chunk: tuple[int, int] | None = None,
        previous: Decision | None = None,
    ) -> Decision:
        """What `method` does to the images inside `chunk` of the sample (default: all of it).

        Args:
            sample: the whole sequence so far.
            method: supplies plan, select, layer, rows and pool_mode.
            regions: one per image of the chunk.
            layouts: one per image of the chunk, before pooling.
            chunk: (first, last + 1) positions that the model takes in this forward.
            previous: decision on the images before the chunk.
        """
        first, stop = chunk or (0, len(sample.ids))
        past = previous or Decision()
        spans = sample.spans()
        fresh = [n for n, span in enumerate(spans) if first <= span[0] < stop]
        cells, pooled_layouts = [], []
        for number, region, layout in zip(fresh, regions, layouts, strict=True):
            plan = method.plan(layout, region)
            if plan is None:
                cells.append(tuple(((n,), n) for n in range(len(spans[number]))))
                pooled_layouts.append(layout)
                continue
            if isinstance(plan, FeaturePooling):
                cells.append(self._late(plan, sample, number, stop))
                pooled_layouts.append(layout)
                continue
            edges, members = plan.offsets.tolist(), plan.members.tolist()
            leaders = plan.leader.tolist()
            cells.append(tuple((tuple(members[edges[c] : edges[c + 1]]), leaders[c]) for c in range(len(leaders))))
            pooled_layouts.append(layout.pool(plan, torch.arange(len(leaders))))
        mode = getattr(method, "pool_mode", "mean")
        patches = [torch.nonzero(one.kind == PATCH).flatten().tolist() for one in layouts if mode == "distinct"]
        decision = Decision(
            layer=None,
            mode=mode,
            patches=past.patches + tuple(map(tuple, patches)),
            cells=past.cells + tuple(cells),
            kept=past.kept + tuple(tuple(range(len(c))) for c in cells),
        )
        selections = [
            None if method.layer is None else method.select(layout, region)
            for layout, region in zip(pooled_layouts, regions, strict=True)
        ]
        if method.layer is None:
            return decision
        decision = replace(decision, layer=method.layer)
        if all(selection is None for selection in selections):
            return decision
        masses = self._masses(sample, decision, method, fresh, first, stop)
        kept, near = list(decision.kept), past.near_tie
        for number, selection, mass in zip(fresh, selections, masses, strict=True):
            if selection is not None:
                kept[number], tie = self._choose(mass, selection)
                near = near or tie
        return replace(decision, kept=tuple(kept), scores=past.scores + tuple(masses), near_tie=near)

    def _late(self, plan: FeaturePooling, sample: Any, number: int, stop: int) -> tuple:
        """Assignment of an image whose method decides by features, from features computed here."""
        (rows, _, _), span = self.embed(sample), sample.spans()[number]
        last = max(s.stop for s in sample.spans() if s.stop <= stop)
        salience = None
        if self.model.config.model_type == "llava":
            salience = self.salience(sample.pixels[number])
        found = plan.decide(Features(rows[span.start : span.stop], rows[last:stop], salience))
        cell = found.cell.tolist()
        return tuple(
            (tuple(n for n, c in enumerate(cell) if c == own), leader)
            for own, leader in enumerate(found.leader.tolist())
        )

    @torch.no_grad()
    def salience(self, pixels: Tensor) -> Tensor:
        """(tokens,) attention from the class token of a CLIP tower in the layer before the last, from eager weights."""
        out = self.model.model.vision_tower(pixels, output_attentions=True)
        return out.attentions[-2][0].double().mean(0)[0, 1:].float()

    def _masses(
        self, sample: Any, decision: Decision, method: Any, fresh: list[int], first: int, stop: int
    ) -> list[tuple[float, ...]]:
        """Attention mass of every cell of the images `fresh`, one forward over the sequence so far."""
        spans = [sample.spans()[number] for number in fresh]
        part = sample.cut(stop)
        rows, _ = self._layout(part, decision)
        leaders = [leader for _, leader in rows]
        if method.rows == "last":
            scoring = [len(rows) - 1]
        else:
            last_image_token = max(span[-1] for span in spans)
            scoring = [r for r, leader in enumerate(leaders) if leader > last_image_token]
        weights = self.forward(part, replace(decision, layer=None), attentions=True)[3]
        weights = weights[method.layer - 1][0].double()  # (heads, rows, keys)
        if method.rows == "raters":
            vision = [r for r, leader in enumerate(leaders) if any(leader in span for span in spans)]
            looks = [float(weights[:, row, vision].sum()) for row in scoring]
            scoring = [
                row for row, look in zip(scoring, looks, strict=True) if look >= sum(looks) / len(looks) * (1 - 1e-6)
            ]
        result = []
        for span in spans:
            columns = [r for r, leader in enumerate(leaders) if leader in span]
            if not scoring:
                result.append((0.0,) * len(columns))
                continue
            chosen = weights[:, scoring][:, :, columns]  # (heads, scoring rows, cells)
            count = chosen.shape[0] * chosen.shape[1]
            result.append(tuple((chosen.sum((0, 1)) / count).tolist()))
        return result

    @staticmethod
    def _choose(mass: tuple[float, ...], selection: Any) -> tuple[tuple[int, ...], bool]:
        """Ascending kept indices, and whether the cut is too close to call in float32."""
        priority = selection.priority.tolist()
        weight = [1.0] * len(mass) if selection.weight is None else selection.weight.tolist()
        score = [m * w for m, w in zip(mass, weight, strict=True)]
        order = [n for n in range(len(mass)) if priority[n] >= 0]
        order.sort(key=lambda n: (-priority[n], -score[n], n))
        kept, rest = order[: selection.num_keep], order[selection.num_keep :]
        near = False
        if kept and rest and priority[kept[-1]] == priority[rest[0]]:
            high, low = score[kept[-1]], score[rest[0]]
            near = 0 < abs(high - low) <= NEAR_TIE * max(abs(high), abs(low))
        return tuple(sorted(kept)), near
