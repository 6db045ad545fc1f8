"""Train the head of ``HeadLocalizer`` for a vision-language model, from (image, question, box) records.

    python -m bench.training.head --out crop/embedded/head.safetensors                          # embedded model, rendered set
    python -m bench.training.head --evaluate crop/embedded/head.safetensors --scenes 100        # held-out pictures
    python -m bench.training.head --model FOLDER --out FOLDER/head.safetensors     # embedded model with weights of its own
    python -m bench.training.head --model PATH --records train.jsonl --dev dev.jsonl --out head.safetensors

Records: see bench.records.

The model runs once per image up to its decoder; what the head needs is kept in --cache. Rendered pictures: seeds "train" of
bench.pictures, the confidence is fitted on seeds "fit"; --evaluate asks about seeds "try".
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bench.common import header
from bench.pictures import SEEDS, ask_model
from bench.records import Record, read_jsonl, rendered
from bench.training.embedded.muon import Muon
from crop.cli.ask import EMBEDDED, Asker, load
from crop.cli.images import open_image
from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.localizers.boxes import Raster
from crop.localizers.head import OCTAVES, REACH, Grid, Head, HeadLocalizer, clues, head_region
from crop.localizers.reading import embeddings
from crop.localizers.vision_cache import cache_vision

BOXES = ("threshold", "gap", "max_boxes", "dilate")
SETTINGS = {field.name: field.default for field in fields(HeadLocalizer) if field.name in BOXES}


@dataclass(frozen=True, eq=False)
class Example:
    """One image and what is asked about it; features in float16."""

    layout: VisionLayout
    vision: Tensor
    asked: list[tuple[str, Any]]


def features(asker: Asker, records: Iterable[Record], total: int | None) -> tuple[list[Example], dict[str, Tensor]]:
    """What the head sees: image features and question embeddings, each computed once."""
    examples, texts = [], {}
    groups = groupby(records, key=lambda record: record[0] if isinstance(record[0], Path) else id(record[0]))
    for _, group in tqdm(groups, "features", total, disable=None):
        group = list(group)
        image = group[0][0]
        image = open_image(image) if isinstance(image, Path) else image
        read = None
        with cache_vision(asker.model), torch.no_grad():
            for _, question, _ in group:
                if read is None or question not in texts:
                    read = embeddings(asker.model, asker.processor, image, question, asker.prompt)
                    texts[question] = read.text.half().cpu()
        asked = [(question, boxes) for _, question, boxes in group]
        examples.append(Example(read.layout, read.vision.half().cpu(), asked))
    return examples, texts


Target = tuple[str, Tensor, float]  # question, (N,) bool, 1 a part is enough, 0 the whole is needed, -1 nothing answers


def targets(example: Example) -> list[Target]:
    """What the head should say to each question about an image."""
    found = []
    for question, boxes in example.asked:
        region = as_region(boxes)
        inside = torch.zeros(len(example.layout), dtype=torch.bool) if region is None else example.layout.inside(region)
        found.append((question, inside, -1.0 if region is None else float(not region.is_whole)))
    return found


def as_region(boxes: Any) -> Region | None:
    """The boxes of a record; None where nothing answers."""
    return None if boxes is None else Region(tuple(map(tuple, boxes)))


def batch(
    examples: list[tuple[Example, list[Target]]], texts: dict[str, Tensor], per_image: int, rng: random.Random
) -> dict[str, Any]:
    """B images as (B, N, dim) and their grid, and B * Q questions with (B * Q, N) targets, padded."""
    asked = [entry for _, known in examples for entry in rng.choices(known, k=per_image)]
    words = [texts[question] for question, *_ in asked]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "vision": pad([example.vision for example, _ in examples], True).float(),
        "grid": Grid.of([example.layout for example, _ in examples]),
        "words": pad(words, True).float(),
        "length": torch.tensor([len(entry) for entry in words]),
        "target": pad([inside.float() for _, inside, _ in asked], True),
        "local": torch.tensor([local for *_, local in asked]),
    }


def loss(head: Head, data: dict[str, Any]) -> Tensor:
    """Cross entropy of the tokens (where a part is enough, or nothing) and of "a part is enough"."""
    asked, grid = head.read(data["words"], data["length"]), data["grid"]
    per_image = len(data["target"]) // len(data["vision"])
    seen, repeated = head.see(data["vision"], grid).repeat_interleave(per_image, 0), grid.repeat(per_image)
    asks = (data["local"] != 0).unsqueeze(1) & repeated.real
    weight = torch.tensor(2.0)  # a token missed costs an answer, one too many next to nothing
    logits = head.match(seen, repeated, asked)
    tokens = F.binary_cross_entropy_with_logits(
        logits, data["target"], asks.float(), pos_weight=weight, reduction="sum"
    )
    known = data["local"] >= 0
    part = F.binary_cross_entropy_with_logits(asked.local[known], data["local"][known], reduction="sum")
    return tokens / (32 * len(logits)) + part / max(1, int(known.sum()))


def train(head: Head, examples: list[Example], texts: dict[str, Tensor], minutes: float, steps: int) -> None:
    """Muon, linear warm-up and cosine decay over the CPU time or the steps, whichever end first."""
    rng, start = random.Random(0), time.process_time()
    optimizer = Muon(list(head.named_parameters()), 0.02, 2e-3, inside=("near.", "order.", "blocks."))
    head.train()
    known = [(example, targets(example)) for example in examples]
    for step in (bar := tqdm(range(steps), "training", disable=None)):
        done = max(step / steps, (time.process_time() - start) / (60 * minutes))
        if done >= 1:
            break
        value = loss(head, batch(rng.sample(known, min(32, len(known))), texts, 6, rng))
        head.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step(min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done)))
        if step % 100 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")
            print(
                f"step {step} loss {value.item():.4f} {time.process_time() - start:.0f} s", file=sys.stderr, flush=True
            )
    head.eval()


Verdict = tuple[Example, Any, Tensor, float]  # boxes of the record, token logits, local logit


@torch.no_grad()
def judged(head: Head, examples: list[Example], texts: dict[str, Tensor]) -> Iterator[Verdict]:
    """What the head makes of every question."""
    for example in examples:
        grid = Grid.of([example.layout])
        seen = head.see(example.vision.float().unsqueeze(0), grid)
        for question, boxes in example.asked:
            asked = head.read(texts[question].float().unsqueeze(0))
            yield example, boxes, head.match(seen, grid, asked)[0], float(asked.local)


def calibrate(head: Head, verdicts: list[Verdict]) -> None:
    """Fit the confidence: logistic regression of "the boxes hold all that is needed" on the clues."""
    inputs, held = [], []
    for example, boxes, logits, local in verdicts:
        raster = Raster.of(example.layout, logits.sigmoid())
        found = raster.boxes(
            raster.values >= SETTINGS["threshold"], **{k: v for k, v in SETTINGS.items() if k != "threshold"}
        )
        inputs.append(clues(raster, raster.inside(found), local))
        held.append(bool(found) and boxes is not None and covers(example.layout, raster.region(found, 1.0), boxes))
    inputs, held = torch.tensor(inputs), torch.tensor(held).float()
    scale = inputs.std(0, correction=0).clamp(min=1e-3)
    weights = torch.zeros(inputs.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logit = weights[0] + (inputs / scale) @ weights[1:]
        value = F.binary_cross_entropy_with_logits(logit, held) + 1e-4 * (weights**2).sum()
        value.backward()
        return value

    optimizer.step(closure)
    head.calibration.copy_(torch.cat([weights[:1], weights[1:] / scale]).detach())


def multiply_adds(head: Head, views: int, rows: int, columns: int, words: int) -> int:
    """Multiply-adds of one question of ``words`` tokens about an image of views * rows * columns tokens."""
    near, blocks, width = len(head.near), len(head.blocks), head.width
    per_token = head.dim + 4 * OCTAVES + 1 + near * (REACH[0] * REACH[1] + width)
    per_token += blocks * (10 * width + 2 * (words + 1) + rows + columns)
    per_word = head.dim + len(head.order) * 3 * width + 2 * head.probes + blocks * 2 * width
    once = head.probes * width * 3 + 1
    return width * (views * rows * columns * per_token + words * per_word + once)


def covers(layout: VisionLayout, region: Region, boxes: Any) -> bool:
    """Whether a region holds every token of the true boxes."""
    return bool((layout.inside(region) | ~layout.inside(as_region(boxes))).all())


def report(head: Head, verdicts: list[Verdict], min_confidence: float) -> str:
    """One line: what the regions hold, how large they are, how honest the confidence is."""
    held, area, true, whole, nothing, trust, good = [], [], [], [], [], [], []
    for example, boxes, logits, local in verdicts:
        region = head_region(example.layout, logits, local, head.calibration, **SETTINGS, min_confidence=min_confidence)
        if boxes is None:
            nothing.append(region.is_whole)
            continue
        wanted = as_region(boxes)
        if wanted.is_whole:
            whole.append(region.is_whole)
            continue
        held.append(covers(example.layout, region, boxes))
        area.append(region.area)
        true.append(wanted.area)
        if not region.is_whole:
            trust.append(region.confidence)
            good.append(held[-1])
    shares = {"holds all": held, "area": area, "true area": true, "whole for global": whole, "whole for absent": nothing,
              "confidence": trust, "of these hold all": good}  # fmt: skip
    told = ", ".join(f"{name} {mean(map(float, values)):.3f}" for name, values in shares.items() if values)
    return f"min_confidence {min_confidence}: {told}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training.head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="folder of the embedded model's weights, or with records any folder or hub name"
    )
    parser.add_argument("--records", type=Path, help="JSON lines to train on (default: rendered pictures)")
    parser.add_argument("--dev", type=Path, help="JSON lines to fit the confidence on")
    parser.add_argument("--out", type=Path, help="file to write the head to")
    parser.add_argument(
        "--evaluate", type=Path, metavar="HEAD", help="judge a head on the held-out pictures, train nothing"
    )
    parser.add_argument("--start", type=Path, metavar="HEAD", help="a head to go on from")
    parser.add_argument("--cache", type=Path, help="file to keep the features in")
    parser.add_argument(
        "--scenes", type=int, default=12000, help="rendered pictures to train on; a tenth as many to fit on"
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=60.0, help="of CPU time in training at most")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the model; the head trains on the CPU")
    options = parser.parse_args()
    if options.records is not None and options.dev is None:
        parser.error("--records must come with --dev")
    if (options.out is None) == (options.evaluate is None):
        parser.error("one of --out and --evaluate must be given")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    def asker() -> Asker:
        if options.dev:
            return load(options.model or EMBEDDED, options.device, "auto")
        return ask_model(Path(options.model) if options.model else None, options.device, "auto")

    if options.evaluate:
        first = SEEDS["try"]
        held_out = read_jsonl(options.dev) if options.dev else rendered(first, options.scenes, 8)
        verdicts = list(judged(Head.load(options.evaluate), *features(asker(), held_out, None)))
        print(header())
        print(f"{options.dev or f'seeds from {first}'}, {len(verdicts)} questions")
        for min_confidence in (0.3, 0.5, 0.7, 0.9):
            print(report(Head.load(options.evaluate), verdicts, min_confidence))
        return
    if options.cache and options.cache.is_file():
        sets = torch.load(options.cache, weights_only=False)
    else:
        model = asker()
        sources = ((options.records, "train", options.scenes), (options.dev, "fit", options.scenes // 10))
        sets = [
            features(
                model,
                read_jsonl(path) if path else rendered(SEEDS[use], count, 8),
                None if path else count,
            )
            for path, use, count in sources
        ]
        if options.cache:
            torch.save(sets, options.cache)
    (examples, texts), dev = sets
    head = Head.load(options.start) if options.start else Head(examples[0].vision.shape[1], options.width)
    train(head, examples, texts, options.minutes, options.steps)
    verdicts = list(judged(head, *dev))
    calibrate(head, verdicts)
    head.save(options.out)
    print(header())
    print(f"{sum(p.numel() for p in head.parameters())} parameters, {len(examples)} images, "
          f"{sum(len(example.asked) for example in examples)} questions; development set:")  # fmt: skip
    for min_confidence in (0.3, 0.5, 0.7, 0.9):
        print(report(head, verdicts, min_confidence))


if __name__ == "__main__":
    main()
