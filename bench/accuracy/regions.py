"""What a wrong region costs: answers of the embedded model at equal tokens, region by region and method by method.

    python -m bench.accuracy.regions --scenes 100 --json bench/results/regions.json

Regions: the true one, what "head" and "attention" find, the true one shifted by a quarter of its size and by its whole size
in a random direction (clipped at the border, so that it stays on the image), and a random box of the size of its bounds.
Methods: PLC, ILP and both at the same number of tokens in the end, with and without the context ring around the region. Only questions that a part of the picture answers; seeds as in `python -m bench.localizers`.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

import crop
from bench.common import header, save, table
from crop import embedded
from crop.cli.ask import EMBEDDED, load
from crop.embedded import scenes
from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, Method, PreLLMCompression
from crop.methods.registry import POOL_SHARE

QUARTER, WHOLE = 0.25, 1.0


def shifted(true: Region, by: float, rng: random.Random) -> Region:
    """Every box moved by ``by`` of its width and height, in one random diagonal direction; turned round at the border."""
    sign_x, sign_y = rng.choice((-1, 1)), rng.choice((-1, 1))
    boxes = []
    for x0, y0, x1, y1 in true.boxes:
        dx, dy = by * (x1 - x0) * sign_x, by * (y1 - y0) * sign_y
        dx = dx if 0 <= x0 + dx and x1 + dx <= 1 else -dx
        dy = dy if 0 <= y0 + dy and y1 + dy <= 1 else -dy
        # A box wider than half the image cannot leave its place both ways: as far as it goes.
        dx, dy = min(max(dx, -x0), 1 - x1), min(max(dy, -y0), 1 - y1)
        boxes.append((x0 + dx, y0 + dy, x1 + dx, y1 + dy))
    return Region(tuple(boxes))


def anywhere(true: Region, rng: random.Random) -> Region:
    """A box of the size of the bounds of all boxes, at a random place."""
    left, top, right, bottom = zip(*true.boxes, strict=True)
    width, height = max(right) - min(left), max(bottom) - min(top)
    x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return Region.box(x, y, x + width, y + height)


def methods(keep: float) -> dict[str, Method]:
    """What is compared, all with the same tokens in the end."""
    found: dict[str, Method] = {}
    for ring in (0, 2):
        found[f"PLC, ring {ring}"] = PreLLMCompression(keep=keep, ring=ring)
    for ring in (0, 1):
        found[f"ILP, ring {ring}"] = InnerLLMPruning(keep, ring=ring)
    for ring in (0, 1):
        plc = PreLLMCompression(keep=keep**POOL_SHARE, ring=2 * ring)
        found[f"both, ring {ring}"] = Compose(plc, InnerLLMPruning(keep, ring=ring))
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.regions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--questions", type=int, default=2, help="per scene, of different kinds where it has them")
    parser.add_argument("--first", type=int, default=10_800_000, help="first seed")
    parser.add_argument("--keep", type=float, default=0.11)
    parser.add_argument("--batch", type=int, default=20, help="questions answered together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    asker = load(EMBEDDED, "cpu", "auto")
    model, processor = asker.model, asker.processor
    finders = {name: asker.localizer(name) for name in ("head", "attention")}
    asked: list[tuple[Any, scenes.Question, dict[str, Region]]] = []
    for seed in tqdm(range(options.first, options.first + options.scenes), "regions", disable=None):
        scene, rng = scenes.scene(seed), random.Random(seed)
        by_kind = defaultdict(list)
        for question in scene.questions:
            if question.local:
                by_kind[question.kind].append(question)
        kinds = rng.sample(sorted(by_kind), min(options.questions, len(by_kind)))
        with crop.cache_vision(model):
            for question in (rng.choice(by_kind[kind]) for kind in kinds):
                true = question.region
                regions = {"true": true}
                regions |= {name: find(scene.image, question.text) for name, find in finders.items()}
                regions |= {"shifted 1/4": shifted(true, QUARTER, rng), "shifted whole": shifted(true, WHOLE, rng)}
                regions |= {"random": anywhere(true, rng), "whole image": Region.whole()}
                asked.append((scene.image, question, regions))
    rows: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    compared: dict[str, Method | None] = {"unpruned": None, **methods(options.keep)}
    for start in tqdm(range(0, len(asked), options.batch), "answers", disable=None):
        part = asked[start : start + options.batch]
        images, questions = [image for image, *_ in part], [question for _, question, _ in part]
        with crop.cache_vision(model):
            for name, method in compared.items():
                for source in part[0][2] if method else ("whole image",):
                    regions = [regions[source] for *_, regions in part]
                    sizes = [image.size for image in images]
                    with crop.patch(model, method, regions, processor=processor, image_size=sizes) as stats:
                        said = embedded.answer(model, processor, images, [question.text for question in questions])
                    want = round(options.keep * stats.tokens_before[0]) if method else stats.tokens_before[0]
                    if set(stats.tokens_after_ilp) != {want}:
                        raise RuntimeError(f"bench: {name} must keep {want} tokens, got {stats.tokens_after_ilp}")
                    right = [text == question.answer for text, question in zip(said, questions, strict=True)]
                    rows[name][source] += right
    shares = [
        {"method": name, **{source: mean(right) for source, right in by_source.items()}}
        for name, by_source in rows.items()
        if name != "unpruned"
    ]
    unpruned = mean(rows["unpruned"]["whole image"])
    run = {"first seed": options.first, "questions": len(asked), "keep": options.keep, "exact": unpruned}
    print(header(), table([run]), table(shares), sep="\n\n")
    if options.json:
        save(options.json, shares, {"unpruned": [run]})


if __name__ == "__main__":
    main()
