"""Train the head of ``HeadLocalizer`` for a vision-language model, from (image, question, box) records.

    python bench/train_head.py --out crop/embedded/head.safetensors                          # embedded model, rendered set
    python bench/train_head.py --model PATH --records train.jsonl --dev dev.jsonl --out head.safetensors

A record is one line of JSON: {"image": path, "question": text, "boxes": [[x0, y0, x1, y1], ...]} with boxes as fractions of
width and height; the whole image where all of it is needed; "boxes": null where nothing in the image answers. Image paths
are relative to the file.

The model runs once per image up to its decoder; what the head needs is kept in --cache. Rendered pictures: training seeds
from 9 000 000 on, development seeds from 10 500 000 on, where also the confidence is fitted; 10 800 000 and more are left to
bench_localizers.py.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import header
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from crop.ask import EMBEDDED, Asker, load
from crop.embedded import scenes
from crop.localizers.boxes import Raster
from crop.localizers.head import Head, clues, head_region
from crop.localizers.reading import embeddings
from crop.region import Region, VisionLayout
from crop.share import share_vision

TRAIN_SEED, DEV_SEED = 9_000_000, 10_500_000
SETTINGS = {"threshold": 0.3, "gap": 0, "max_boxes": 8, "dilate": 0}
Record = tuple[Any, str, Any]  # (image or its path, question, boxes or None)


def rendered(first: int, count: int, questions: int) -> Iterator[Record]:
    """Records of rendered pictures; one in each asks for what only another picture shows."""
    before: tuple[scenes.Question, ...] = ()
    for seed in range(first, first + count):
        scene, rng = scenes.scene(seed), random.Random(seed)
        known = {question.text for question in scene.questions}
        chosen = rng.sample(scene.questions, min(questions, len(scene.questions)))
        for question in chosen:
            yield scene.image, question.text, question.boxes
        absent = [q.text for q in before if q.text not in known and foreign(q, scene)]
        if absent:
            yield scene.image, rng.choice(absent), None
        before = scene.questions


def foreign(question: scenes.Question, scene: scenes.Scene) -> bool:
    """Whether a question of another picture names a thing that this one surely does not show."""
    if not question.local:
        return False
    shown = {str(value) for thing in scene.things for value in (thing.color, thing.shape, thing.word) if value}
    shown |= {f"{thing.shape}s" for thing in scene.things if thing.shape}
    named = set(question.text.split()) & (
        {*scenes.COLORS, *scenes.SHAPES, *scenes.DRAWN_WORDS} | {f"{s}s" for s in scenes.SHAPES}
    )
    return bool(named - shown)


def read_jsonl(path: Path) -> Iterator[Record]:
    """Records of a file, one JSON object a line."""
    for line in path.read_text().splitlines():
        record = json.loads(line)
        yield path.parent / record["image"], record["question"], record["boxes"]


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
        image = Image.open(image).convert("RGB") if isinstance(image, Path) else image
        read = None
        with share_vision(asker.model), torch.no_grad():
            for _, question, _ in group:
                if read is None or question not in texts:
                    read = embeddings(asker.model, asker.processor, image, question, asker.prompt)
                    texts[question] = read.text.half().cpu()
        asked = [(question, boxes) for _, question, boxes in group]
        examples.append(Example(read.layout, read.vision.half().cpu(), asked))
    return examples, texts


def batch(examples: list[Example], texts: dict[str, Tensor], per_image: int, rng: random.Random) -> dict[str, Tensor]:
    """(B, N, ...) of the images and (B, Q, ...) of the questions, padded."""
    asked = [rng.choices(example.asked, k=per_image) for example in examples]
    words = [texts[question] for row in asked for question, _ in row]
    target, local = [], []
    for example, row in zip(examples, asked, strict=True):
        for _, boxes in row:
            region = Region(tuple(map(tuple, boxes))) if boxes else None
            inside = example.layout.inside(region) if region else torch.zeros(len(example.layout), dtype=torch.bool)
            target.append(inside.float())
            local.append(-1.0 if region is None else float(not region.is_whole))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "vision": pad([example.vision for example in examples], True).float(),
        "center": pad([example.layout.center for example in examples], True),
        "real": pad([torch.ones(len(example.layout)) for example in examples], True),
        "words": pad(words, True).float(),
        "length": torch.tensor([len(entry) for entry in words]),
        "target": pad(target, True).unflatten(0, (len(examples), per_image)),
        "local": torch.tensor(local),
    }


def loss(head: Head, data: dict[str, Tensor]) -> Tensor:
    """Cross entropy of the tokens (where a part is enough, or nothing) and of "a part is enough"."""
    count, per_image, _ = data["target"].shape
    film, local = head.read(data["words"], data["length"])
    logits = head.match(head.see(data["vision"], data["center"]), film.unflatten(0, (count, per_image)))
    asks = (data["local"] != 0).view(count, per_image, 1) * data["real"].unsqueeze(1)
    weight = torch.tensor(2.0)  # a token missed costs an answer, one too many next to nothing
    tokens = F.binary_cross_entropy_with_logits(logits, data["target"], asks, pos_weight=weight, reduction="sum")
    known = data["local"] >= 0
    part = F.binary_cross_entropy_with_logits(local[known], data["local"][known])
    return tokens / (count * per_image * 8) + part


def train(head: Head, examples: list[Example], texts: dict[str, Tensor], minutes: float, steps: int) -> None:
    """AdamW, linear warm-up and cosine decay over the time or the steps, whichever end first."""
    rng, start = random.Random(0), time.monotonic()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, weight_decay=0.01)
    head.train()
    for step in (bar := tqdm(range(steps), "training", disable=None)):
        done = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        if done >= 1:
            break
        rate = 3e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done))).item()
        optimizer.param_groups[0]["lr"] = rate
        value = loss(head, batch(rng.sample(examples, min(32, len(examples))), texts, 6, rng))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")
            print(f"step {step} loss {value.item():.4f} {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    head.eval()


@torch.no_grad()
def judged(
    head: Head, examples: list[Example], texts: dict[str, Tensor]
) -> Iterator[tuple[Example, Any, Tensor, float]]:
    """(example, boxes, token logits, local logit) of every question."""
    for example in examples:
        seen = head.see(example.vision.float(), example.layout.center).unsqueeze(0)
        for question, boxes in example.asked:
            film, local = head.read(texts[question].float().unsqueeze(0))
            yield example, boxes, head.match(seen, film.unsqueeze(1))[0, 0], float(local)


def calibrate(head: Head, examples: list[Example], texts: dict[str, Tensor]) -> None:
    """Fit the confidence: logistic regression of "the boxes hold all that is needed" on the clues."""
    inputs, held = [], []
    for example, boxes, logits, local in judged(head, examples, texts):
        raster = Raster.of(example.layout, logits.sigmoid())
        found = raster.boxes(
            raster.values >= SETTINGS["threshold"], **{k: v for k, v in SETTINGS.items() if k != "threshold"}
        )
        inputs.append(clues(raster, raster.inside(found), local))
        held.append(bool(found) and boxes is not None and covers(example.layout, raster.region(found, 1.0), boxes))
    inputs, held = torch.stack(inputs), torch.tensor(held).float()
    scale = inputs.std(0).clamp(min=1e-3)
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


def covers(layout: VisionLayout, region: Region, boxes: Any) -> bool:
    """Whether a region holds every token of the true boxes."""
    return bool((layout.inside(region) | ~layout.inside(Region(tuple(map(tuple, boxes))))).all())


def report(head: Head, examples: list[Example], texts: dict[str, Tensor], min_confidence: float) -> str:
    """One line: what the regions hold, how large they are, how honest the confidence is."""
    held, area, true, whole, nothing, trust, good = [], [], [], [], [], [], []
    for example, boxes, logits, local in judged(head, examples, texts):
        region = head_region(example.layout, logits, local, head.calibration, **SETTINGS, min_confidence=min_confidence)
        if boxes is None:
            nothing.append(region.is_whole)
            continue
        wanted = Region(tuple(map(tuple, boxes)))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="embedded, a folder or a hub name")
    parser.add_argument("--records", type=Path, help="JSON lines to train on (default: rendered pictures)")
    parser.add_argument("--dev", type=Path, help="JSON lines to fit the confidence on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="file to keep the features in")
    parser.add_argument(
        "--scenes", type=int, default=3000, help="rendered pictures to train on; a tenth as many to fit on"
    )
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--minutes", type=float, default=8.0, help="training at most this long")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the model; the head trains on the CPU")
    options = parser.parse_args()
    if (options.records is None) != (options.dev is None):
        parser.error("--records must come with --dev")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.cache and options.cache.is_file():
        sets = torch.load(options.cache, weights_only=False)
    else:
        asker = load(options.model, options.device, "auto")
        sources = ((options.records, TRAIN_SEED, options.scenes), (options.dev, DEV_SEED, options.scenes // 10))
        sets = [
            features(asker, read_jsonl(path) if path else rendered(seed, count, 8), None if path else count)
            for path, seed, count in sources
        ]
        if options.cache:
            torch.save(sets, options.cache)
    (examples, texts), dev = sets
    head = Head(examples[0].vision.shape[1], options.width)
    train(head, examples, texts, options.minutes, options.steps)
    calibrate(head, *dev)
    head.save(options.out)
    print(header())
    print(f"{sum(p.numel() for p in head.parameters())} parameters, {len(examples)} images, "
          f"{sum(len(example.asked) for example in examples)} questions; development set:")  # fmt: skip
    for min_confidence in (0.3, 0.5, 0.7, 0.9):
        print(report(Head.load(options.out), *dev, min_confidence))


if __name__ == "__main__":
    main()
