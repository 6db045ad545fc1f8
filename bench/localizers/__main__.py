"""How well a localizer finds the region: coverage, tightness, time - and what the model then answers.

    python -m bench.localizers --scenes 200
    python -m bench.localizers --scenes 200 --first 32000000 --layer 5      # seeds to try

`head` and `attention` also look at small copies of the picture (`coarse=2`, `coarse=4`), which this model scales up again to its one
size: it is not spared work, and sees what is left of small things. Controls: the true region (oracle), the whole image, a box in the centre and a random box, the last two of the size and shape
of the oracle's bounds. Settings of the localizers were chosen on seeds from 32,000,000 on; the default seeds are others.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from tqdm import tqdm

from bench.common import header, save, table
from bench.pictures import SEEDS, ask_model, draw
from bench.training.head import multiply_adds
from crop import embedded
from crop.cli.ask import Answer, Asker
from crop.embedded import scenes
from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.localizers import BoxLocalizer, Head, Localizer, encode
from crop.localizers.reading import embeddings
from crop.localizers.vision_cache import cache_vision
from crop.methods import by_name
from crop.selftest.timing import interleave

GRID = VisionLayout.grid(scenes.GRID, scenes.GRID)
COLUMNS = ("covered", "all of it", "area", "IoU", "whole", "answers", "localizer ms", "total ms")


@dataclass
class Row:
    """Sums of one localizer over the questions."""

    covered: list[float] = field(default_factory=list)
    area: list[float] = field(default_factory=list)
    iou: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    localizer: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def add(self, answer: Answer, question: scenes.Question) -> None:
        inside, wanted = GRID.inside(answer.region), GRID.inside(question.region)
        both = (inside & wanted).sum().item()
        self.covered.append(both / wanted.sum().item())
        self.area.append(inside.sum().item() / len(GRID))
        self.iou.append(both / (inside | wanted).sum().item())
        self.whole.append(answer.region.is_whole)
        self.right.append(answer.text == question.answer)
        self.localizer.append(1000 * answer.seconds["localizer"])
        self.total.append(1000 * answer.seconds["total"])

    def figures(self) -> list[float]:
        """In the order of ``COLUMNS``."""
        complete = [value > 0.999 for value in self.covered]
        shares = (self.covered, complete, self.area, self.iou, self.whole, self.right)
        return [*map(mean, shares), median(self.localizer), median(self.total)]


def moved(true: Region, rng: random.Random | None) -> Region:
    """A box of the size of the region's bounds: in the centre, or anywhere."""
    if true.is_whole:
        true = Region.box(0.0, 0.0, 0.25, 0.25)
    low_x, low_y = (min(box[axis] for box in true.boxes) for axis in (0, 1))
    width, height = (max(box[axis + 2] for box in true.boxes) - low for axis, low in enumerate((low_x, low_y)))
    x = rng.uniform(0, 1 - width) if rng else (1 - width) / 2
    y = rng.uniform(0, 1 - height) if rng else (1 - height) / 2
    return Region.box(x, y, x + width, y + height)


def localizers(asker: Asker, layer: int | None) -> dict[str, Callable[[scenes.Question, random.Random], Localizer]]:
    """What is compared: question and random numbers -> localizer."""
    looking = {}
    for times, copy in ((1, ""), (2, ", half of the sides"), (4, ", a quarter of the sides")):
        looking[f"head{copy}"] = asker.localizer("head", coarse=times)
        looking[f"attention{copy}"] = asker.localizer("attention", layer=layer, coarse=times)
    return {
        "unpruned": lambda question, rng: BoxLocalizer(Region.whole()),
        **{name: lambda question, rng, localizer=one: localizer for name, one in looking.items()},
        "oracle": lambda question, rng: BoxLocalizer(question.region),
        "whole": lambda question, rng: BoxLocalizer(Region.whole()),
        "centre": lambda question, rng: BoxLocalizer(moved(question.region, None)),
        "random": lambda question, rng: BoxLocalizer(moved(question.region, rng)),
    }


def head_cost(asker: Asker) -> list[dict[str, Any]]:
    """What the head adds to a prefill whose encoding and image features exist: multiply-adds, and milliseconds where it can run.

    "head with boxes" begins with what enters the decoder; "localizer" is all that an answer in the same ``cache_vision``
    block waits for: the model up to there, too. Multiply-adds of the prefill are those of the decoder layers' matrices
    alone, which favours no head.
    """
    scene = scenes.scene(0)
    question = scene.questions[0].text
    find = asker.localizer("head")
    with torch.no_grad(), cache_vision(asker.model):
        read = embeddings(asker.model, asker.processor, scene.image, question, asker.prompt)
        inputs = encode(asker.processor, scene.image, question, asker.prompt)
        prefill = partial(asker.model, **inputs)
        # Each after a prefill, which leaves the caches as cold as a real question finds them.
        calls = {
            "prefill": prefill,
            "head": lambda: find.region(read),
            "again": prefill,
            "localizer": lambda: find(scene.image, question),
        }
        times = interleave(calls, rounds=50)
    text, seven = asker.model.config.text_config, Head(4096)
    embedded_model = (find.head, (1, scenes.GRID, scenes.GRID), len(read.text), text.num_hidden_layers,
                      text.intermediate_size, times)  # fmt: skip
    rows = []
    for name, (head, grid, words, layers, wide, milliseconds) in {
        "embedded": embedded_model,
        "7B, 576 tokens": (seven, (1, 24, 24), 40, 32, 11008, None),
        "7B, 2880 tokens": (seven, (5, 24, 24), 40, 32, 11008, None),
    }.items():
        prefill = (math.prod(grid) + words) * layers * (4 * head.dim**2 + 3 * head.dim * wide)
        own = multiply_adds(head, *grid, words)
        rows.append({"geometry": name, "head, M multiply-adds": own / 1e6, "prefill, M": prefill / 1e6,
                     "share %": 100 * own / prefill,
                     "head with boxes, ms": milliseconds and 1e3 * milliseconds["head"].median,
                     "localizer, ms": milliseconds and 1e3 * milliseconds["localizer"].median,
                     "decoder prefill, ms": milliseconds and 1e3 * milliseconds["prefill"].median})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.localizers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--questions", type=int, default=2, help="per scene")
    parser.add_argument("--model", type=Path, help="folder of weights; default: those of the package")
    parser.add_argument("--first", type=int, default=SEEDS["try"] + 50_000, help="first seed")
    parser.add_argument("--layer", type=int, help="where the attention is read (default: that of the command line)")
    parser.add_argument("--method", choices=("crop", "diverse", "plc", "ilp"), default="crop")
    parser.add_argument("--keep", type=float, default=0.11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weights = (options.model or embedded.WEIGHTS) / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    asker = ask_model(options.model, "cpu", "auto")
    method = by_name(options.method, options.keep)
    compared = localizers(asker, options.layer)
    tables: dict[str, dict[str, Row]] = defaultdict(lambda: defaultdict(Row))
    for seed in tqdm(range(options.first, options.first + options.scenes), "scenes", disable=None):
        scene, rng = draw(seed), random.Random(seed)
        local = [question for question in scene.questions if question.local]
        whole = [question for question in scene.questions if not question.local]
        for question in (*rng.sample(local, min(options.questions, len(local))), rng.choice(whole)):
            for name, make in compared.items():
                if not question.local and name in ("oracle", "centre"):
                    continue  # the same as "whole"
                answer = asker.ask(
                    scene.image,
                    question.text,
                    method=None if name == "unpruned" else method,
                    localizer=make(question, rng),
                    max_new_tokens=embedded.LONGEST,
                )
                tables["a part answers" if question.local else "only the whole answers"][name].add(answer, question)
                if question.local and name == "head":
                    tables["head, by kind"][question.kind].add(answer, question)
    run = {
        "first seed": options.first, "scenes": options.scenes, "method": options.method, "keep": options.keep,
        "weights": digest,
    }  # fmt: skip
    rows = [
        {"questions": title, "localizer": name, "n": len(row.area), **dict(zip(COLUMNS, row.figures(), strict=True))}
        for title, found in tables.items()
        for name, row in found.items()
    ]
    costs = head_cost(asker)
    print(header(), table([run]), table(costs), table(rows), sep="\n\n")
    if options.json:
        save(options.json, rows, {"run": [run], "cost of the head": costs})


if __name__ == "__main__":
    main()
