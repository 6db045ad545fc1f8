"""What pruning inside the vision encoder costs: answers of an embedded model, by the layer at which tokens leave.

    python -m bench.accuracy.encoder --questions 400 --json bench/results/encoder.json

The embedded models have one view of the picture and attends over all of it, so that their tokens lose context when others leave.
Encoded are the true region, a ring around it and every fourth token of every fourth row. "Behind" drops the same tokens behind
the encoder, which has seen them all: the difference to it is what the encoder's late layers lose. Only questions that a part of
the picture answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from statistics import mean

import torch
from torch import Tensor

import crop
from bench.accuracy.asking import answers, begin, option_parser
from bench.accuracy.data import rendered
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


def main() -> None:
    parser = option_parser("encoder", __doc__, questions=400)
    parser.add_argument("--rings", type=int, nargs="+", default=(1, 2))
    options = parser.parse_args()
    run = begin(options)
    depth, known = len(run.asker.model.model.vision_tower.encoder.layers), families()["llava"]
    local = (item for item in rendered(run.first, grounding=False) if not item.region.is_whole)
    items = list(islice(local, options.questions))
    jobs: list[tuple[str, crop.Method | None, int]] = [("unpruned", None, 0)]
    for ring in options.rings:
        jobs.append((f"behind, ring {ring}", Behind(ring), 0))
        jobs += [(f"layer {cut} of {depth}, ring {ring}", crop.EncoderPruning(ring), cut) for cut in range(depth)]
    rows = []
    try:
        for name, method, cut in run.bar(jobs, "rows"):
            register_family(replace(known, encoder=LayerEncoder(cut / depth)))
            asked = answers(run, items, method, [item.region for item in items])
            exact, tokens = (mean(getattr(one, key) for one in asked) for key in ("score", "entering"))
            rows.append({"tokens leave": name, "exact": exact, "tokens": tokens})
    finally:
        register_family(known)
    run.finish(rows, {"run": [run.facts | {"questions": len(items)}]})


if __name__ == "__main__":
    main()
