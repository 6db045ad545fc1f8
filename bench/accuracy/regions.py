"""What a wrong region costs: answers of an embedded model at equal tokens, region by region and method by method.

    python -m bench.accuracy.regions --questions 200 --json bench/results/regions.json

Regions: the true one, what "head" and "attention" find, the true one shifted by a quarter of its size and by its whole size
in a random direction (clipped at the border, so that it stays on the image), and a random box of the size of its bounds.
Methods: PLC, ILP, what is least alike, and both at the same number of tokens in the end, with and without the context ring around
the region where they have one. Only questions that a part of the picture answers.
"""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import islice
from statistics import mean

import crop
from bench.accuracy.asking import Run, answers, begin, option_parser
from bench.accuracy.boxes import QUARTER, WHOLE, anywhere, shifted
from bench.accuracy.data import Item, rendered
from bench.pictures import NUM_TOKENS
from crop.geometry.region import Region
from crop.methods import Compose, DiverseCompression, InnerLLMPruning, Method, PreLLMCompression
from crop.methods.registry import POOL_SHARE


def methods(keep: float) -> dict[str, Method]:
    """What is compared, all with the same tokens in the end."""
    found: dict[str, Method] = {}
    for ring in (0, 2):
        found[f"PLC, ring {ring}"] = PreLLMCompression(keep=keep, ring=ring)
    for ring in (0, 1):
        found[f"ILP, ring {ring}"] = InnerLLMPruning(keep, ring=ring)
    found["diverse"] = DiverseCompression(keep)
    for ring in (0, 1):
        found[f"both, ring {ring}"] = Compose(DiverseCompression(keep**POOL_SHARE), InnerLLMPruning(keep, ring=ring))
    return found


def sources(run: Run, items: list[Item]) -> dict[str, list[Region]]:
    """Regions of every question, by where they come from."""
    names = ["attention"] if run.asker.head is None else ["head", "attention"]
    finders = {name: run.asker.localizer(name) for name in names}
    found: dict[str, list[Region]] = defaultdict(list)
    for item in run.bar(items, "regions"):
        rng, image = random.Random(item.key), item.picture()
        found["true"].append(item.region)
        with crop.cache_vision(run.asker.model):
            for name, find in finders.items():
                found[name].append(find(image, item.question))
        found["shifted 1/4"].append(shifted(item.region, QUARTER, rng))
        found["shifted whole"].append(shifted(item.region, WHOLE, rng))
        found["random"].append(anywhere(item.region, rng))
        found["whole image"].append(Region.whole())
    return found


def main() -> None:
    parser = option_parser("regions", __doc__, questions=200)
    parser.add_argument("--keep", type=float, default=0.11)
    options = parser.parse_args()
    run = begin(options)
    local = (item for item in rendered(run.first, grounding=False) if not item.region.is_whole)
    items = list(islice(local, options.questions))
    found = sources(run, items)
    want = round(options.keep * NUM_TOKENS)
    plain = answers(run, items, None, found["whole image"])
    rows = []
    for name, method in run.bar(list(methods(options.keep).items()), "answers"):
        row = {"method": name}
        for source, regions in found.items():
            asked = answers(run, items, method, regions)
            if {one.tokens for one in asked} != {want}:
                raise RuntimeError(
                    f"bench: {name} must keep {want} tokens, got {sorted({one.tokens for one in asked})}"
                )
            row[source] = mean(one.score for one in asked)
        rows.append(row)
    unpruned = {"questions": len(items), "keep": options.keep, "exact": mean(one.score for one in plain)}
    run.finish(rows, {"unpruned": [run.facts | unpruned]})


if __name__ == "__main__":
    main()
