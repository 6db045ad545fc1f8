"""Independent reference for `crop.patch`: no cache, no hooks of the package, one unpadded sample at a time.

It takes the *policy* from a method (`plan`, `select`, `layer`, `rows`, `pool_mode`), because that is pure
geometry with tests of its own, and recomputes everything else in the dullest way there is:

- pooling by a loop over the cells, in float64; a pooled token has the original position id of its leader;
- scores from the eager attention weights of layer `layer - 1`, averaged in float64, sorted in Python;
- dropped tokens stay in the sequence, but no row of a layer >= `layer` sees their key. Nothing is sliced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tiny_models import Sample
from torch import Tensor

NEAR_TIE = 1e-5  # relative gap below which float32 may decide otherwise


@dataclass(frozen=True)
class Decision:
    """What happens to the images of one sample.

    Attributes:
        layer: first decoder layer that does not see the dropped tokens; None: every layer sees all.
        mode: "mean" or "max" pooling.
        cells: per image, one (members, leader) per token after pooling, as indices in the image.
        kept: per image, the ascending indices into `cells` that survive.
        scores: per image, the float64 attention mass of every cell (empty where not computed).
        near_tie: some cut between kept and dropped falls between scores closer than `NEAR_TIE`.
    """

    layer: int | None = None
    mode: str = "mean"
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
        self.model = model
        self.language_model = model.model.language_model
        self._features: dict[tuple, Tensor] = {}
        self._forwards: dict[tuple, tuple] = {}

    # ------------------------------------------------------------------------------ full sequence
    @torch.no_grad()
    def embed(self, sample: Sample) -> Tensor:
        """Input embeddings of the whole sequence, (tokens, hidden): text rows and vision rows."""
        rows = self.model.get_input_embeddings()(torch.tensor(sample.ids)).clone()
        for span, pixels, (height, width) in zip(sample.spans(), sample.pixels, sample.grids, strict=True):
            key = (height, width, pixels.numpy().tobytes())
            if key not in self._features:
                extra = {}
                if self.model.config.model_type == "qwen2_5_vl":
                    extra = {"image_grid_thw": torch.tensor([[1, 2 * height, 2 * width]])}
                (found,) = self.model.model.get_image_features(pixels, **extra).pooler_output
                self._features[key] = found
            rows[span.start : span.stop] = self._features[key]
        return rows

    def positions(self, sample: Sample) -> Tensor:
        """Original position ids, (tokens,) or (3, tokens) for multi-axis rotary embeddings."""
        if self.model.config.model_type != "qwen2_5_vl":
            return torch.arange(len(sample.ids))
        ids, types = torch.tensor([sample.ids]), torch.zeros(1, len(sample.ids), dtype=torch.int32)
        for span in sample.spans():
            types[0, span.start : span.stop] = 1
        grids = [[1, 2 * height, 2 * width] for height, width in sample.grids]
        if not grids:
            return torch.arange(len(sample.ids)).expand(3, -1)
        found, _ = self.model.model.get_rope_index(ids, types, image_grid_thw=torch.tensor(grids))
        return found[:, 0]

    # ------------------------------------------------------------------------------ one forward
    def _layout(self, sample: Sample, decision: Decision) -> tuple[list[tuple], list[int]]:
        """Rows of the pooled sequence as (members, leader) positions, and the rows that are dropped."""
        image_of = {span.start: number for number, span in enumerate(sample.spans())}
        rows, dropped, position = [], [], 0
        while position < len(sample.ids):
            number = image_of.get(position)
            if number is None:
                rows.append(((position,), position))
                position += 1
                continue
            start, kept = position, set(decision.kept[number])
            for index, (members, leader) in enumerate(decision.cells[number]):
                if index not in kept:
                    dropped.append(len(rows))
                rows.append((tuple(start + m for m in members), start + leader))
            position = start + len(sample.spans()[number])
        return rows, dropped

    def _pooled(self, full: Tensor, rows: list[tuple], mode: str) -> Tensor:
        out = []
        for members, _ in rows:
            stack = torch.stack([full[m] for m in members]).double()
            value = stack.amax(0) if mode == "max" else stack.sum(0) / len(members)
            out.append(value.to(full.dtype))
        return torch.stack(out)

    @contextlib.contextmanager
    def _masked_from(self, layer: int | None, mask: Tensor) -> Iterator[None]:
        """Layers >= `layer` get `mask` instead of the plain causal one."""
        handles = []
        if layer is not None:
            for module in list(self.language_model.layers)[layer:]:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _m, args, kwargs: (args, {**kwargs, "attention_mask": mask}),
                        with_kwargs=True,
                    )
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(
        self, sample: Sample, decision: Decision, *, attentions: bool = False
    ) -> tuple[Tensor, list[int], list[int], Any]:
        """Logits of the pooled sequence; equal questions are answered from memory.

        Returns:
            logits (rows, vocab), original position of each row, rows that were dropped, and the
            attention weights per layer where asked.
        """
        pixels = tuple(p.numpy().tobytes() for p in sample.pixels)
        question = replace(decision, scores=(), near_tie=False)
        key = (sample.ids, sample.starts, sample.grids, pixels, question, attentions)
        if key not in self._forwards:
            self._forwards[key] = self._forward(sample, decision, attentions)
        return self._forwards[key]

    @torch.no_grad()
    def _forward(
        self, sample: Sample, decision: Decision, attentions: bool
    ) -> tuple[Tensor, list[int], list[int], Any]:
        rows, dropped = self._layout(sample, decision)
        leaders = [leader for _, leader in rows]
        embeds = self._pooled(self.embed(sample), rows, decision.mode)
        causal = torch.full((len(rows), len(rows)), -torch.inf).triu(1)
        cut = causal.clone()
        cut[:, dropped] = -torch.inf
        cut.fill_diagonal_(0.0)  # a dropped row sees itself only to stay finite; nobody sees it
        with self._masked_from(decision.layer, cut[None, None]):
            out = self.language_model(
                inputs_embeds=embeds[None],
                attention_mask=causal[None, None],
                position_ids=self.positions(sample)[..., leaders].unsqueeze(-2),
                use_cache=False,
                output_attentions=attentions,
            )
        logits = self.model.lm_head(out.last_hidden_state)[0]
        return logits, leaders, dropped, out.attentions

    def text_logits(self, sample: Sample, decision: Decision) -> dict[int, Tensor]:
        """Logits by original position of every row the specification defines: text and kept tokens
        that stand for themselves alone."""
        rows, dropped = self._layout(sample, decision)
        logits = self.forward(sample, decision)[0]
        return {
            leader: logits[row]
            for row, (members, leader) in enumerate(rows)
            if row not in dropped and len(members) == 1
        }

    def greedy(self, sample: Sample, decision: Decision, steps: int) -> Steps:
        """Greedy tokens, everything recomputed at each step; the decision is the prompt's."""
        result = Steps()
        for _ in range(steps):
            logits = self.forward(sample, decision)[0][-1]
            result.logits.append(logits)
            result.tokens.append(int(logits.argmax()))
            sample = sample.extended(result.tokens[-1:])
        return result

    # ------------------------------------------------------------------------------ the decision
    def keep_all(self, sample: Sample) -> Decision:
        """The decision that changes nothing."""
        cells = tuple(tuple(((n,), n) for n in range(h * w)) for h, w in sample.grids)
        return Decision(cells=cells, kept=tuple(tuple(range(len(c))) for c in cells))

    def decide(
        self,
        sample: Sample,
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
        fresh = [n for n, start in enumerate(sample.starts) if first <= start < stop]
        cells, pooled_layouts = [], []
        for number, region, layout in zip(fresh, regions, layouts, strict=True):
            plan = method.plan(layout, region)
            if plan is None:
                height, width = sample.grids[number]
                cells.append(tuple(((n,), n) for n in range(height * width)))
                pooled_layouts.append(layout)
                continue
            edges, members = plan.offsets.tolist(), plan.members.tolist()
            leaders = plan.leader.tolist()
            cells.append(tuple((tuple(members[edges[c] : edges[c + 1]]), leaders[c]) for c in range(len(leaders))))
            pooled_layouts.append(layout.pool(plan, torch.arange(len(leaders))))
        decision = Decision(
            layer=None,
            mode=getattr(method, "pool_mode", "mean"),
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

    def _masses(
        self, sample: Sample, decision: Decision, method: Any, fresh: list[int], first: int, stop: int
    ) -> list[tuple[float, ...]]:
        """Attention mass of every cell of the images `fresh`, one forward over the sequence so far."""
        spans = [sample.spans()[number] for number in fresh]
        part = Sample(sample.ids[:stop], sample.grids, sample.starts, sample.pixels)
        rows, _ = self._layout(part, decision)
        leaders = [leader for _, leader in rows]
        if method.rows == "last":
            scoring = [len(rows) - 1]
        else:
            last_image_token = max(span.stop for span in spans) - 1
            scoring = [r for r, leader in enumerate(leaders) if leader > last_image_token]
        weights = self.forward(part, replace(decision, layer=None), attentions=True)[3]
        weights = weights[method.layer - 1][0].double()  # (heads, rows, keys)
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
