"""Ask every question under every contender; append what came out, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import lzma
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import nn
from tqdm import tqdm

from bench.accuracy.boxes import WHOLE, shifted
from bench.accuracy.contenders import Job
from bench.accuracy.data import Item
from bench.common import commit
from crop.cli.ask import Asker
from crop.geometry.region import Region
from crop.localizers import Localizer
from crop.localizers.vision_cache import cache_vision
from crop.patching.patch import patch


def shard() -> tuple[int, int]:
    """Index and number of this process, as ``accelerate launch`` and torchrun tell them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def read(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, of every process, packed ones (.xz) too; a line that a kill cut short is left out."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("answers.*.jsonl*")):
        data = path.read_bytes()
        for line in (lzma.decompress(data) if path.suffix == ".xz" else data).decode(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["job"], row["item"]] = row
    return list(rows.values())


SETTINGS = "settings.json"


def settings(folder: Path) -> dict[str, Any]:
    """What all answers of a folder have in common."""
    path = folder / SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def begin(folder: Path, facts: dict[str, Any]) -> None:
    """Note in a folder what its answers have in common; a run that needs no localizer leaves that open.

    Raises:
        ValueError: it holds answers of something else, which must not be counted together.
    """
    known = settings(folder)
    other = {name: value for name, value in facts.items() if known.get(name, value) != value}
    if other:
        raise ValueError(
            f"begin: {folder} holds answers with { ({name: known.get(name) for name in other}) }, got {other}; take another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(known | facts, indent=1), encoding="utf-8")


class Journal:
    """Append-only file of one process."""

    def __init__(self, folder: Path, index: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"answers.{index}.jsonl"
        self.commit = commit()  # of each row: a run that goes on later may do so with other code
        # A line that a kill cut short must not run into the next one.
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        self.file = self.path.open("a", encoding="utf-8")
        if torn:
            self.file.write("\n")

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows; they are on disk when this returns."""
        self.file.write("".join(json.dumps(row | {"commit": self.commit}) + "\n" for row in rows))
        self.file.flush()
        os.fsync(self.file.fileno())


def grid_of(model: nn.Module) -> int | None:
    """Tokens per side of a model that scales every picture to one square; None: it does not."""
    vision = getattr(model.config, "vision_config", None)
    side, patch_side = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    return side // patch_side if isinstance(side, int) and isinstance(patch_side, int) else None


def score(asker: Asker, job: Job, item: Item, region: Region, text: str) -> float:
    """Of an answer; places that it names on another canvas are turned back."""
    if job.contender.back is None:
        return item.score(text)
    return item.score(text, lambda box: job.contender.back(box, job.budget, region, grid_of(asker.model)))


def seen(asker: Asker, job: Job, item: Item, region: Region) -> Image:
    """The picture of a question as the processor gets it."""
    image = item.picture()
    if job.contender.prepare is None:
        return image
    return job.contender.prepare(image, job.budget, region, grid_of(asker.model))


@torch.no_grad()
def ask_batch(
    asker: Asker, job: Job, items: Sequence[Item], regions: Sequence[Region], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers of one batch under one contender, as rows of the journal."""
    images = [seen(asker, job, item, region) for item, region in zip(items, regions, strict=True)]
    inputs = asker.encode_batch([[image] for image in images], [item.question for item in items])
    inputs = inputs.to(asker.model.device, dtype=asker.model.dtype)
    sizes = [image.size for image in images]
    with patch(asker.model, job.method, list(regions), processor=asker.processor, image_size=sizes) as stats:
        output = asker.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in asker.processor.batch_decode(new, skip_special_tokens=True)]
    return [
        {
            "job": job.key,
            "item": item.key,
            "picture": item.image,
            "group": item.group,
            "answer": text,
            "score": round(score(asker, job, item, regions[number], text), 4),
            "entering": stats.tokens_after_plc[number],
            "tokens": stats.tokens_after_ilp[number],
            "average": round(stats.layer_average[number], 2),
            "before": stats.tokens_before[number],
            "whole": regions[number].is_whole,
        }
        for number, (item, text) in enumerate(zip(items, texts, strict=True))
    ]


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _regions(
    journal: Journal, known: dict[str, Region], items: Sequence[Item], localizer: Localizer
) -> dict[str, Region]:
    """Predicted regions, found once per question."""
    rows = []
    for item in items:
        if item.key not in known:
            region = known[item.key] = localizer(item.picture(), item.question)
            rows.append({"job": "region", "item": item.key, "boxes": region.boxes, "confidence": region.confidence})
    journal.add(rows)
    return known


def run(
    asker: Asker,
    jobs: Sequence[Job],
    items: Sequence[Item],
    localizer: Localizer,
    folder: Path,
    *,
    batch: int = 16,
    max_new_tokens: int = 5,
) -> None:
    """Everything of this process's share that the folder does not hold yet.

    Args:
        asker: model. jobs: contenders at budgets. items: all questions, the same in every process.
        localizer: for contenders with a predicted region; asked once per question.
        folder: of the journal. batch: questions at once.
    """
    index, count = shard()
    done: dict[str, set[str]] = defaultdict(set)
    known: dict[str, Region] = {}
    for row in read(folder):
        done[row["job"]].add(row["item"])
        if row["job"] == "region":
            known[row["item"]] = Region(tuple(map(tuple, row["boxes"])), row["confidence"])
    journal = Journal(folder, index)
    # Rows that may share one pass of the vision tower first: those that ask it for its attention need passes of their own.
    shared = [job for job in jobs if job.contender.prepare is None and not (job.method and job.method.observes)]
    alone = [job for job in jobs if job not in shared]
    mine = items[index::count]
    with tqdm(total=len(mine) * len(jobs), unit="answer", disable=None, position=index) as progress:
        for part in _batches(mine, batch):
            if any(job.contender.region == "predicted" for job in jobs):
                _regions(journal, known, part, localizer)
            for group, context in ((shared, cache_vision(asker.model)), (alone, nullcontext())):
                with ExitStack() as stack, torch.no_grad():
                    stack.enter_context(context)
                    for job in group:
                        open_items = [item for item in part if item.key not in done[job.key]]
                        if open_items:
                            where = [region_of(job, item, known) for item in open_items]
                            journal.add(ask_batch(asker, job, open_items, where, max_new_tokens))
                        progress.update(len(part))


def region_of(job: Job, item: Item, known: dict[str, Region]) -> Region:
    """The region that a contender is given for a question.

    Args:
        known: predicted regions by question.
    Raises:
        ValueError: it needs the true one, and nobody knows it.
    """
    source = job.contender.region
    if source == "predicted":
        return known[item.key]
    if source == "none":
        return Region.whole()
    if item.region is None:
        raise ValueError(f"run: {job.contender.name!r} needs the true region of every question, got none")
    if source == "oracle" or item.region.is_whole:
        return item.region
    return shifted(item.region, WHOLE, random.Random(item.key))
