"""What pruning inside the vision encoder costs: answers of the embedded model, by the layer at which tokens leave.

    python -m bench.accuracy.encoder --scenes 200 --json bench/results/encoder.json

The embedded model has one view of the picture and attends over all of it, so that its tokens lose context when others leave.
Encoded are the true region, a ring around it and every fourth token of every fourth row. "Behind" drops the same tokens behind
the encoder, which has seen them all: the difference to it is what the encoder's late layers lose. Only questions that a part of
the picture answers.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import crop
from bench.common import header, save, table
from crop import embedded
from crop.embedded import scenes
from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.models import register_family
from crop.models.encoders import LayerEncoder
from crop.models.registry import families


@dataclass(frozen=True)
class Behind(crop.EncoderPruning):
    """The same tokens, dropped behind the encoder."""

    def encode(self, layout: VisionLayout, region: Region, pieces: crop.Pieces) -> None:
        return None

    def plan(self, layout: VisionLayout, region: Region) -> crop.PoolPlan:
        """Those that the encoder would get."""
        every = torch.stack([layout.row, layout.col], 1) % self.every == 0
        tokens: Tensor = (layout.levels(region, self.ring) < 2) | every.all(1)
        kept = torch.nonzero(tokens).flatten()
        return crop.PoolPlan.identity(len(kept)).among(kept, len(layout))


def questions(first: int, count: int, per_scene: int) -> list[tuple[scenes.Scene, scenes.Question]]:
    """Local questions of rendered pictures."""
    found = []
    for seed in range(first, first + count):
        scene, rng = scenes.scene(seed), random.Random(seed)
        local = [question for question in scene.questions if question.local]
        found += [(scene, question) for question in rng.sample(local, min(per_scene, len(local)))]
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.encoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--questions", type=int, default=2, help="per scene")
    parser.add_argument("--first", type=int, default=10_850_000, help="first seed")
    parser.add_argument("--rings", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--batch", type=int, default=20, help="questions answered together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, processor = embedded.load()
    depth, known = len(model.model.vision_tower.encoder.layers), families()["llava"]
    asked = questions(options.first, options.scenes, options.questions)
    jobs: list[tuple[str, crop.Method | None, int]] = [("unpruned", None, 0)]
    for ring in options.rings:
        jobs.append((f"behind, ring {ring}", Behind(ring), 0))
        jobs += [(f"layer {cut} of {depth}, ring {ring}", crop.EncoderPruning(ring), cut) for cut in range(depth)]
    rows: list[dict[str, Any]] = []
    try:
        for name, method, cut in tqdm(jobs, unit="row", disable=None):
            register_family(replace(known, encoder=LayerEncoder(cut / depth)))
            right, tokens = [], []
            for start in range(0, len(asked), options.batch):
                part = asked[start : start + options.batch]
                images, regions = [scene.image for scene, _ in part], [question.region for _, question in part]
                sizes = [image.size for image in images]
                with crop.patch(model, method, regions, processor=processor, image_size=sizes) as stats:
                    said = embedded.answer(model, processor, images, [question.text for _, question in part])
                right += [text == question.answer for text, (_, question) in zip(said, part, strict=True)]
                tokens += stats.tokens_after_plc
            rows.append({"tokens leave": name, "exact": mean(right), "tokens": mean(tokens)})
    finally:
        register_family(known)
    run = {"first seed": options.first, "questions": len(asked)}
    print(header(), table([run]), table(rows), sep="\n\n")
    if options.json:
        save(options.json, rows, {"run": [run]})


if __name__ == "__main__":
    main()
