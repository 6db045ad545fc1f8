"""Where to cut: answers by the decoder layer at whose input tokens leave, for several budgets and kinds of question.

    python -m bench.accuracy.layers --questions 200 --json bench/results/layers.json

Counted are the tokens that stay behind the cut: a later cut costs more time and has more of its tokens chosen by the question.
``--source`` says whose region comes first: one that was found, the true one, or none, where attention alone chooses. "average" is
what all layers see on average, of the picture's tokens; pooled to the same count before the first layer stands as layer 0.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from statistics import mean

import numpy as np

import crop
from bench.accuracy.asking import Reply, Run, answers, begin, option_parser
from bench.accuracy.data import Item, rendered
from bench.accuracy.statistics import interval
from bench.pictures import BUDGETS, NUM_TOKENS
from crop.geometry.region import Region
from crop.methods import DiverseCompression, InnerLLMPruning, Method

SOURCES = ("predicted", "oracle", "none")


def found(run: Run, items: list[Item], source: str) -> list[Region]:
    """The region of every question."""
    if source != "predicted":
        return [item.region if source == "oracle" else Region.whole() for item in items]
    find = run.asker.localizer(run.asker.default_localizer)
    regions = []
    for item in run.bar(items, "regions"):
        with crop.cache_vision(run.asker.model):
            regions.append(find(item.picture(), item.question))
    return regions


def by_group(items: list[Item], replies: list[Reply]) -> dict[str, float]:
    """Mean score of all questions, and of every group."""
    groups: dict[str, list[float]] = defaultdict(list)
    for item, reply in zip(items, replies, strict=True):
        groups["overall"].append(reply.score)
        groups[item.group].append(reply.score)
    return {name: mean(scores) for name, scores in sorted(groups.items(), key=lambda pair: pair[0] != "overall")}


def main() -> None:
    parser = option_parser("layers", __doc__, questions=200)
    parser.add_argument(
        "--budgets", type=float, nargs="+", help="fractions of the tokens; default: 192, 128, 64 and 32 of 576"
    )
    parser.add_argument("--layers", type=int, nargs="+", help="default: every layer but the first")
    parser.add_argument("--source", choices=SOURCES, default="predicted", help="of the region")
    options = parser.parse_args()
    run = begin(options)
    items = list(islice(rendered(run.first), options.questions))
    regions = found(run, items, options.source)
    plain = answers(run, items, None, regions)
    unpruned, base = by_group(items, plain), np.array([reply.score for reply in plain])
    jobs: list[tuple[float, int, Method]] = []
    for budget in options.budgets or BUDGETS:
        jobs.append((budget, 0, DiverseCompression(budget)))
        for layer in options.layers or range(1, run.asker.num_layers):
            jobs.append((budget, layer, InnerLLMPruning(budget, layer=layer)))
    rows = []
    for budget, layer, method in run.bar(jobs, "cuts"):
        replies = answers(run, items, method, regions)
        average = mean(reply.average for reply in replies) / NUM_TOKENS
        scores = {name: score / unpruned[name] for name, score in by_group(items, replies).items() if unpruned[name]}
        low, high = interval(np.array([r.score for r in replies]), base, [item.image for item in items])
        rows.append({"budget": budget, "layer": layer, "average": average, "low": low, "high": high, **scores})
    facts = run.facts | {"region": options.source, "questions": len(items), "tokens": NUM_TOKENS}
    run.finish(rows, {"run": [facts], "unpruned": [unpruned]})


if __name__ == "__main__":
    main()
