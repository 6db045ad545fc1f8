"""Seconds and peak memory of the whole first token, stage by stage, on the CPU.

    python -m bench.latency.stages --json bench/results/stages.json

From the opened picture to the logits behind the prompt, of models that are narrower and shallower than the published ones by
the divisors in the table, with random weights; tokens are those of the full size. Attention shrinks by the width, matrices by its
square, so that stages take other shares than at full size; `bench.latency.first_token` has those. Contenders: the model as it is;
"language model", `crop.by_name("crop", 0.11)` with the region known; "all", the same behind `EncoderPruning`, with the look that
finds a region (`attention` with `coarse=4`; the region that is used is one of a tenth of the picture all the same).

Seconds are medians of rounds in which the contenders take turns, in one process per model. Memory is the growth of the resident
size until each stage's peak, in a process per contender that gives freed memory back at once, which is slow and thus not timed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import BatchFeature

import crop
from bench.common import ROOT, header, save, table
from bench.latency.e2e.geometries import GEOMETRIES, Shrink, build
from bench.latency.e2e.memory import CLEAR, resident
from bench.latency.e2e.workload import AFTER, BEFORE
from bench.latency.first_token import KEEP, NAMES, REGIONS, TIMES, encoded_share, image_tokens
from crop.models import family_of
from crop.patching.planner import Planner

STAGES = ("look", "preprocess", "host", "encoder", "language model")
CONTENDERS: dict[str, crop.Method | None] = {
    "unpruned": None,
    "language model": crop.by_name("crop", KEEP),
    "all": crop.by_name("crop", KEEP, encoder=True),
}
REGION = REGIONS[0]  # in a corner


@dataclass(frozen=True)
class Processor:
    """Random text around one picture."""

    model: Any
    image_processor: Any
    chat_template: None = None

    def __call__(self, images: Image.Image, text: str, return_tensors: str) -> BatchFeature:
        seen = dict(self.image_processor(images, return_tensors=return_tensors))
        seen.pop("num_patches", None)
        seen = {name: torch.as_tensor(value) for name, value in seen.items()}
        config = self.model.config
        words = torch.randint(
            1, config.text_config.vocab_size - 8, (2, AFTER), generator=torch.Generator().manual_seed(1)
        )
        count = image_tokens(self.model, images.size, seen | {"views": len(seen["pixel_values"])})
        ids = torch.cat([words[0, :BEFORE], torch.full((count,), config.image_token_id), words[1]])[None]
        if "image_grid_thw" in seen:
            seen["mm_token_type_ids"] = (ids == config.image_token_id).int()
        return BatchFeature(seen | {"input_ids": ids})


@dataclass
class Meter:
    """What every stage took: seconds, or bytes at its peak above what the process held before."""

    memory: bool
    found: dict[str, float] = field(default_factory=dict)
    last: float = 0.0

    def begin(self) -> None:
        gc.collect()
        if self.memory:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            CLEAR.write_text("5")
            self.last = resident("VmRSS")
        else:
            self.last = time.perf_counter()

    def end(self, stage: str) -> None:
        """Of ``stage``, which began with the end of the one before."""
        if self.memory:
            self.found[stage] = max(resident("VmHWM") - self.last, self.found.get(stage, 0.0))
            CLEAR.write_text("5")
        else:
            now = time.perf_counter()
            self.found[stage] = self.found.get(stage, 0.0) + now - self.last
            self.last = now


@dataclass(frozen=True)
class Work:
    """A model and a picture."""

    model: Any
    processor: Processor
    picture: Image.Image

    @staticmethod
    def of(name: str, shrink: Shrink) -> Work:
        geometry = GEOMETRIES[name]
        torch.manual_seed(0)
        model = build(geometry.config(shrink), "cpu", torch.float32)
        picture = Image.effect_mandelbrot(geometry.image, (-2.2, -1.5, 1.0, 1.5), 60).convert("RGB")
        return Work(model, Processor(model, geometry.processor()), picture)

    @property
    def where(self) -> dict[str, Any]:
        """What ``patch`` must be told about the picture."""
        return {"processor": self.processor, "image_size": self.picture.size}

    def inputs(self) -> BatchFeature:
        """Of the model."""
        return crop.encode(self.processor, self.picture, "", str)

    @torch.no_grad()
    def first_token(self, contender: str, meter: Meter) -> None:
        """From the picture to the logits."""
        method, tower = (
            CONTENDERS[contender],
            family_of(self.model).vision_tower(family_of(self.model).base(self.model)),
        )
        localizer = crop.get_localizer(
            "attention", model=self.model, processor=self.processor, prompt=str, coarse=TIMES
        )
        meter.begin()
        if contender == "all":
            localizer(self.picture, "")
            meter.end("look")
        inputs = self.inputs()
        meter.end("preprocess")

        def run() -> None:
            handles = [
                tower.register_forward_pre_hook(lambda *_: meter.end("host"), prepend=True),
                tower.register_forward_hook(lambda *_: meter.end("encoder")),
            ]
            try:
                self.model(**inputs, logits_to_keep=1)
            finally:
                for handle in handles:
                    handle.remove()
            meter.end("language model")

        if method is None:
            run()
            return
        with crop.patch(self.model, method, REGION, **self.where):
            run()

    def encoded(self) -> float:
        """Share that the encoder gets; 1 where tokens leave at a late layer of it."""
        planner = Planner(self.model, CONTENDERS["all"], REGION, self.processor, self.picture.size)
        tower = planner.family.vision_tower(planner.family.base(self.model))
        if planner.encoder.layers(tower):
            return 1.0
        return encoded_share([image.encoding for image in planner.plan(self.inputs()).images])


def timed(work: Work, seconds: float) -> dict[str, dict[str, float]]:
    """Median seconds of every stage of every contender; ``seconds``: go on as long, for a round at least."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    work.first_token("all", Meter(memory=False))  # warms up
    start = time.perf_counter()
    while not found["all"] or time.perf_counter() - start < seconds:
        for name, runs in found.items():
            meter = Meter(memory=False)
            work.first_token(name, meter)
            runs.append(meter.found)
    return {name: {stage: median(one[stage] for one in runs) for stage in runs[0]} for name, runs in found.items()}


def in_a_process(job: dict[str, Any], **environment: str) -> Any:
    """What ``child`` prints for a job, of a process of its own."""
    command = [sys.executable, "-m", "bench.latency.stages", "--child", json.dumps(job)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def child(job: dict[str, Any]) -> Any:
    """One model's times, or one contender's memory."""
    torch.set_num_threads(job["threads"])
    work = Work.of(job["model"], Shrink(*job["shrink"]))
    if "contender" not in job:
        return {"seconds": timed(work, job["seconds"]), "encoded": work.encoded()}
    meter = Meter(memory=True)
    work.first_token(job["contender"], meter)
    return meter.found


def measure(name: str, shrink: tuple[int, int], seconds: float, threads: int) -> list[dict[str, Any]]:
    """One row per contender."""
    job, rows = {"model": name, "shrink": shrink, "threads": threads}, []
    times = in_a_process(job | {"seconds": seconds})
    plain = times["seconds"]["unpruned"]
    for contender, spent in times["seconds"].items():
        held = in_a_process(job | {"contender": contender}, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
        total, share = sum(spent.values()), times["encoded"] if contender == "all" else 1.0
        rows.append(
            {"model": name, "width /": shrink[0], "depth /": shrink[1], "pruned": contender}
            | {stage: spent.get(stage, 0.0) for stage in STAGES}
            | {"total": total, "of unpruned": total / sum(plain.values()), "encoded": share}
            | {"encoder per share": spent["encoder"] / plain["encoder"] / share}
            | {f"{stage} MB": held.get(stage, 0.0) / 1e6 for stage in STAGES}
            | {"peak MB": max(held.values()) / 1e6}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency.stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(GEOMETRIES), default=NAMES)
    parser.add_argument("--width", type=int, default=16, help="divides widths")
    parser.add_argument("--depth", type=int, default=8, help="divides depths")
    parser.add_argument("--seconds", type=float, default=10.0, help="of rounds, per model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
        return
    print(header(), flush=True)
    shrink, rows = (options.width, options.depth), []
    for name in tqdm(options.models, unit="model", disable=None):
        rows += measure(name, shrink, options.seconds, options.threads)
    print(f"\n{table(rows)}", flush=True)
    if options.json:
        save(options.json, rows, {"threads": [{"threads": options.threads}]})


if __name__ == "__main__":
    main()
