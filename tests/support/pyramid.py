"""Independent reference for several cuts: the oracle of one cut, asked once per cut. Nothing is sliced here either."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tests.support.oracle import Decision, Oracle
from tests.support.tiny_models import Sample

Cut = tuple[int, tuple[tuple[int, ...], ...]]  # first layer, kept cells per image


class PyramidOracle(Oracle):
    """Cells as in the decision; `cuts`: what every layer from each cut's on may see of them.

    `prompt`: the rows from this position on see in every layer what the last cut left (a uniform cache); None: as cut.
    """

    def __init__(self, oracle: Oracle, cuts: Sequence[Cut] = (), prompt: int | None = None) -> None:
        super().__init__(oracle.model)
        self._features = oracle._features
        self.cuts, self.prompt = tuple(cuts), prompt

    @contextlib.contextmanager
    def _masks(self, masks: list[torch.Tensor]) -> Any:
        for index, mask in enumerate(masks):
            mask[:, [hidden for first, hidden in self._hidden if first <= index][-1]] = False
            mask[self._behind :, self._hidden[-1][1]] = False
            mask.fill_diagonal_(True)
        with super()._masks(masks):
            yield

    def _forward(self, sample: Sample, decision: Decision, attentions: bool) -> Any:
        self._hidden = [(0, [])]
        self._hidden += [(first, self._layout(sample, replace(decision, kept=kept))[1]) for first, kept in self.cuts]
        leaders = [leader for _, leader in self._layout(sample, decision)[0]]
        self._behind = len(leaders) if self.prompt is None else sum(leader < self.prompt for leader in leaders)
        return super()._forward(sample, decision, attentions)


def decide(
    oracle: Oracle, sample: Sample, method: Any, regions: list[Any], layouts: list[Any], kind: type | None = None
) -> tuple[PyramidOracle, Decision]:
    """Cut by cut: scores under the masks of the earlier cuts, survivors ranked by the cut's own selection."""
    kind = kind or PyramidOracle
    start = oracle.decide(sample, _Pooling(method), regions, layouts)
    pooled = []
    for layout, region, cells in zip(layouts, regions, start.cells, strict=True):
        plan = method.plan(layout, region)
        pooled.append(layout if plan is None else layout.pool(plan, torch.arange(len(cells))))
    cuts: list[Cut] = []
    kept = start.kept
    for cut in method.cuts:
        now = kind(oracle, cuts)
        masses = now._masses(sample, start, cut, list(range(len(regions))), 0, len(sample.ids))
        chosen = []
        for image, (layout, region) in enumerate(zip(pooled, regions, strict=True)):
            selection, alive = cut.select(layout, region), kept[image]
            if selection is None or (cuts and selection.num_keep >= len(alive)):
                chosen.append(alive)
                continue
            priority = selection.priority.tolist()
            if cuts:  # a later cut takes its number, if need be of those it likes least
                priority = [max(p, -1) + 1 if n in alive else -1 for n, p in enumerate(priority)]
            ranked = replace(selection, priority=torch.tensor(priority))
            keep, near_tie = oracle._choose(masses[image], ranked)
            assert not near_tie, "the test's own data is too close to call: change a seed"
            chosen.append(keep)
        kept = tuple(chosen)
        cuts.append((cut.layer, kept))
    return kind(oracle, cuts), replace(start, kept=kept)


class _Pooling:
    """Of a method, what it does before the decoder."""

    layer, rows = None, "text"

    def __init__(self, method: Any) -> None:
        self.plan, self.pool_mode = method.plan, method.pool_mode
