"""Why pooling costs answers: one thing changed at a time, on questions for a place and on those that read what is there.

    python -m bench.accuracy.pooling --questions 200 --json bench/results/pooling.json

All with the true region. "blurred" keeps every token where it is, each replaced by the mean of its cell: what pooling does to
the content, without fewer tokens. "leaders" keeps one token of each cell as it is: fewer tokens, no means. "centred" gives a
pooled token the mean of its members' positions, "compact" closes the gaps. "log of size" adds it to the attention that a pooled
token receives in every layer (eager and sdpa). "alone" drops what the others pool; "from layer 4" drops it there. "outside
blank" keeps every token, those outside the region all alike; "a tenth of the outside dropped" tells how much a random trifle costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from bench.accuracy.asking import Around, Reply, Run, answers, begin, option_parser
from bench.accuracy.data import Item, rendered
from bench.pictures import GROUNDING
from crop.embedded import scenes
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods import DiverseCompression, InnerLLMPruning, Method, PreLLMCompression
from crop.models import family_of
from crop.patching.stats import PruneStats


@dataclass(frozen=True)
class Leaders(Method):
    """Of every cell of another method only the leader stays, as it is."""

    cells: Method

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan:
        leader = self.cells.plan(layout, region).leader.long()
        return PoolPlan.identity(len(leader)).among(leader, len(layout))


@dataclass(frozen=True)
class Near(Method):
    """The tokens of the region and of a ring around it stay, the others leave."""

    ring: int

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan:
        kept = torch.nonzero(layout.levels(region, self.ring) < 2).flatten()
        return PoolPlan.identity(len(kept)).among(kept, len(layout))


@dataclass(frozen=True)
class Blank(Method):
    """One cell outside the region: with ``Blurred``, nothing there tells one place from another."""

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan:
        inside, own = layout.inside(region), torch.arange(len(layout))
        return PoolPlan.from_labels(own.masked_fill(~inside, len(layout)), layout.row, layout.col, inside.byte())


@dataclass(frozen=True)
class Thinned(Method):
    """Random tokens outside the region leave, a share of them, the same for equal regions."""

    share: float

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan:
        lot = torch.rand(len(layout), generator=torch.Generator().manual_seed(0))
        kept = torch.nonzero(layout.inside(region) | (lot >= self.share)).flatten()
        return PoolPlan.identity(len(kept)).among(kept, len(layout))


def decoder(run: Run) -> nn.Module:
    """The language model."""
    return family_of(run.asker.model).language_model(run.asker.model)


@contextmanager
def hooked(modules: list[nn.Module], hook: Any) -> Iterator[None]:
    """``hook(module, args, kwargs)`` before every call of the modules; a pair that it returns takes the place of both."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@dataclass(frozen=True)
class Blurred(Around):
    """Every token is replaced by the mean of its cell; none leaves."""

    cells: Method

    def batch(self, run: Run, inputs: Any, regions: Sequence[Region], stats: PruneStats) -> Any:
        seen = inputs["input_ids"] == run.asker.model.config.image_token_id
        return hooked([decoder(run)], partial(self._blur, run, seen, regions))

    def _blur(
        self, run: Run, seen: Tensor, regions: Sequence[Region], module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple | None:
        embeds = kwargs["inputs_embeds"]
        if embeds.shape[1] == 1:
            return None
        side = scenes.GRID
        layout, embeds = VisionLayout.grid(side, side), embeds.clone()
        for row, region in enumerate(regions):
            plan = self.cells.plan(layout, region)
            if plan is None:
                continue
            cell, tokens = plan.inverse.long(), embeds[row, seen[row]]
            sums = tokens.new_zeros(plan.num_out, tokens.shape[1]).index_add(0, cell, tokens)
            embeds[row, seen[row]] = (sums / plan.counts.unsqueeze(1))[cell]
        return args, kwargs | {"inputs_embeds": embeds}


@dataclass(frozen=True)
class Centred(Around):
    """A pooled token stands at the mean position of its members."""

    def batch(self, run: Run, inputs: Any, regions: Sequence[Region], stats: PruneStats) -> Any:
        return hooked([decoder(run)], partial(self._move, stats))

    def _move(self, stats: PruneStats, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if kwargs["inputs_embeds"].shape[1] == 1:
            return None
        ids = kwargs["position_ids"].float().clone()
        for image, (pooled, plan) in enumerate(zip(stats.pooled, stats.plans, strict=True)):
            if plan is None:
                continue
            own, cell = torch.arange(len(plan.inverse)).float(), plan.inverse.long()
            middle = torch.zeros(plan.num_out).index_add(0, cell, own) / plan.counts
            ids[image, pooled.position] += middle - plan.leader
        return args, kwargs | {"position_ids": ids}


@dataclass(frozen=True)
class SizeBias(Around):
    """The log of a pooled token's size is added to the attention that it receives, in every decoder layer.

    Source: proportional attention of ToMe (arXiv 2210.09461). Pooling before the decoder alone; eager and sdpa.
    """

    def batch(self, run: Run, inputs: Any, regions: Sequence[Region], stats: PruneStats) -> Any:
        return hooked([layer.self_attn for layer in decoder(run).layers], partial(self._add, stats))

    def _add(self, stats: PruneStats, module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        hidden = args[0] if args else kwargs["hidden_states"]
        held = [] if (cache := kwargs.get("cache", kwargs.get("past_key_values"))) is None else cache.layers
        keys = held[module.layer_idx].keys if len(held) > module.layer_idx else None
        (batch, rows), past = hidden.shape[:2], 0 if keys is None or keys.dim() < 4 else keys.shape[2]
        bias = hidden.new_zeros(batch, past + rows)
        for image, (pooled, plan) in enumerate(zip(stats.pooled, stats.plans, strict=True)):
            if plan is not None:
                bias[image, pooled.position] = plan.counts.to(bias).log()
        mask = kwargs["attention_mask"]
        if mask is None:
            place = torch.arange(past + rows)
            mask = (place <= place[past:].unsqueeze(1)).expand(batch, 1, -1, -1)
        if mask.dtype == torch.bool:
            mask = hidden.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        return args, kwargs | {"attention_mask": mask + bias[:, None, None]}


def ways(keep: float, layers: int) -> dict[str, tuple[Method | None, Around, str]]:
    """Name -> method, what is done beside it, where positions go."""
    plc, plain = PreLLMCompression(keep=keep), PreLLMCompression(keep=keep, mode="mean")
    beside, original = Around(), "original"
    found: dict[str, tuple[Method | None, Around, str]] = {
        "PLC": (plc, beside, original),
        "diverse": (DiverseCompression(keep), beside, original),
        "PLC, plain means": (plain, beside, original),
        "PLC, log of size": (plc, SizeBias(), original),
        "PLC, plain means, log of size": (plain, SizeBias(), original),
        "PLC, centred": (plc, Centred(), original),
        "PLC, compact": (plc, beside, "compact"),
        "leaders": (Leaders(plc), beside, original),
        "blurred": (None, Blurred(plc), original),
        "outside blank": (None, Blurred(Blank()), original),
        "a tenth of the outside dropped": (Thinned(0.1), beside, original),
        "half of the outside dropped": (Thinned(0.5), beside, original),
        "region alone": (Near(0), beside, original),
        "region and ring 1 alone": (Near(1), beside, original),
        "region and ring 2 alone": (Near(2), beside, original),
    }
    for layer in sorted({2, layers // 4, layers // 2, 3 * layers // 4}):
        found[f"region alone, from layer {layer}"] = (InnerLLMPruning(mode="strict", layer=layer), beside, original)
    return found


def sides(items: list[Item], replies: list[Reply]) -> dict[str, float]:
    """Of questions for a place: share of answers with the left, upper, right, lower block right, and all four."""
    digits = [(reply.text.replace(" ", ""), item.answers[0]) for item, reply in zip(items, replies, strict=True)]
    right = [[said[n : n + 1] == true[n] for n in range(4)] for said, true in digits]
    return {name: mean(row[n] for row in right) for n, name in enumerate(("left", "top", "right", "bottom"))} | {
        "all four": mean(all(row) for row in right)
    }


def main() -> None:
    parser = option_parser("pooling", __doc__, questions=200)
    parser.add_argument("--budgets", type=float, nargs="+", default=(0.2222, 0.1111))
    parser.add_argument("--asked", nargs="+", choices=("grounding", "others"), default=("grounding", "others"))
    parser.add_argument("--only", nargs="+", help="only these ways")
    options = parser.parse_args()
    run = begin(options)
    every = [rendered(run.first), rendered(run.first, whole=False)]
    asked = {
        "grounding": list(islice((i for i in every[0] if i.group == GROUNDING), options.questions)),
        "others": list(islice((i for i in every[1] if i.group != GROUNDING), options.questions)),
    }
    rows = []
    for group in options.asked:
        items = asked[group]
        regions = [item.region for item in items]
        plain = answers(run, items, None, regions)
        for budget in options.budgets:
            table = {"unpruned": (None, Around(), "original"), **ways(budget, run.asker.num_layers)}
            for name, (method, beside, positions) in run.bar(list(table.items()), f"{group}, {budget:.0%}"):
                if options.only and name not in (*options.only, "unpruned"):
                    continue
                replies = plain if name == "unpruned" else answers(run, items, method, regions, beside, positions)
                score, base = mean(one.score for one in replies), mean(one.score for one in plain)
                row = {"asked": group, "budget": budget, "way": name, "tokens": mean(one.entering for one in replies),
                       "score": score, "relative": score / base}  # fmt: skip
                rows.append(row | (sides(items, replies) if group == "grounding" else {}))
    run.finish(rows, {"run": [run.facts | {"questions": options.questions}]})


if __name__ == "__main__":
    main()
