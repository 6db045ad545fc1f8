"""FLOPs of the whole first token, stage by stage: encoder, language model, and the look that finds the region.

    python -m bench.latency.first_token --json bench/results/first_token.json

FLOPs of full-size models are counted from the sizes of modules on the meta device and from the plan that `crop.patch` would carry out; a test
holds the formula to torch's counter. "look" is `crop.get_localizer("attention", coarse=4)`: the encoder on a copy with a quarter of
the sides, or on the view of the whole picture where there are tiles, and the first decoder layers over its tokens. "zoom" is
`crop.zoom`, two pictures and no pruning, without its look. All are means over nine places of a region of a tenth of
the picture. The head over the vocabulary is in no figure. Seconds and memory: `bench.latency.stages`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import crop
from bench.common import header, save, table
from bench.latency.e2e.geometries import GEOMETRIES, Geometry, Shrink, build
from bench.latency.e2e.workload import AFTER, BEFORE
from crop.cost.encoder import EncoderGeometry
from crop.cost.geometry import DecoderGeometry
from crop.geometry.pieces import Encoding
from crop.localizers.coarse import small_copy
from crop.methods.encoder import OverviewOnly
from crop.models.anyres import anyres_layout
from crop.patching.planner import Planner

NAMES = ("llava-1.5-7b", "llava-next-7b", "internvl3-8b", "qwen2.5-vl-7b-4k", "qwen2.5-vl-7b-16k")
REGIONS = [  # a tenth of the picture, at nine places
    crop.Region.box(x, y, x + 0.4, y + 0.25) for x in (0.03, 0.3, 0.57) for y in (0.04, 0.37, 0.7)
]
KEEP, TIMES = 0.11, 4
SHIPPED = crop.by_name("crop", KEEP)


class Everything(crop.EncoderPruning):
    """Takes everything, so that plans say what that is."""

    def encode(self, layout: Any, region: crop.Region, pieces: crop.Pieces) -> torch.Tensor:
        return torch.ones(len(pieces), dtype=torch.bool)


METHODS: dict[str, crop.Method] = {
    "unpruned": Everything(),
    "language model": crop.Compose(SHIPPED.plc, SHIPPED.ilp, Everything()),
    "encoder": crop.EncoderPruning(),
    "both": crop.by_name("crop", KEEP, encoder=True),
}


@dataclass(frozen=True)
class Count:
    """One prefill: FLOPs of the encoder and of every decoder layer, tokens of the last, share that is encoded."""

    encoder: float
    layers: list[float]
    tokens: int
    encoded: float


def counted(
    model: nn.Module,
    processor: Any,
    pictures: Sequence[Image.Image],
    method: crop.Method,
    region: crop.Region | None = None,
) -> Count:
    """One prefill over some pictures under a method that has an encoder stage; ``region``: of each."""
    planner = Planner(model, method, [region] * len(pictures), processor, [picture.size for picture in pictures])
    plan, encoder = planner.plan(_inputs(model, processor, pictures)), EncoderGeometry.of(planner.family, model)
    layers = DecoderGeometry.of(planner.language_model).layers
    vision = [sum(image.tokens_at(layer) for image in plan.images) for layer in range(len(layers))]
    lengths = [BEFORE + AFTER + count for count in vision]
    encodings = [image.encoding for image in plan.images]
    return Count(
        encoder.flops(encodings),
        [
            layer.matrix_flops(length) + layer.attention_flops(length)
            for layer, length in zip(layers, lengths, strict=True)
        ],
        vision[-1],
        encoded_share(encodings),
    )


def encoded_share(encodings: Sequence[Encoding]) -> float:
    """What an encoder gets, by what there is: tiles, or tokens, those of copies included."""
    if encodings[0].pieces.place is None:
        return sum(int(one.taken.sum()) for one in encodings) / sum(len(one.taken) for one in encodings)
    taken = sum(int(one.own.sum()) + (0 if one.copy is None else len(one.copy)) for one in encodings)
    return taken / sum(len(one.layout) for one in encodings)


def _inputs(model: nn.Module, processor: Any, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Text around pictures; no pixels, since nothing runs."""
    made = [_seen(processor, picture.size) for picture in pictures]
    inputs = {name: torch.cat([one[name] for one in made]) for name in made[0] if name != "views"}
    config, ids = model.config, [1] * BEFORE
    for picture, one in zip(pictures, made, strict=True):
        ids += [config.image_token_id] * image_tokens(model, picture.size, one) + [1]
    return inputs | {"input_ids": torch.tensor([[*ids, *[1] * (AFTER - len(pictures))]])}


@cache
def _seen(processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """What the processor tells the model of a picture of this size beside its pixels, and how many views these are of."""
    made = processor(Image.new("RGB", size, "gray"), return_tensors="pt")
    found = {name: torch.as_tensor(made[name]) for name in ("image_grid_thw", "image_sizes") if name in made}
    return found | {"pixel_values": torch.zeros(1), "views": len(torch.as_tensor(made["pixel_values"]))}


def image_tokens(model: nn.Module, size: tuple[int, int], seen: dict[str, Any]) -> int:
    """Vision tokens of one picture of (width, height); ``seen``: what its processor tells of it."""
    config = model.config
    if "image_grid_thw" in seen:
        return int(seen["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2
    if hasattr(config, "image_grid_pinpoints"):
        return len(anyres_layout(config, size[::-1]))
    return seen["views"] * getattr(config, "image_seq_length", 576)


def count(name: str, geometry: Geometry) -> list[dict[str, Any]]:
    """One row per contender, means over the regions."""
    model, processor = build(geometry.config(Shrink()), "meta", torch.bfloat16), geometry.processor()
    picture = Image.new("RGB", geometry.image, "gray")
    plain = counted(model, processor, [picture], Everything())
    glance = counted(model, processor, [small_copy(picture, TIMES, 112)], OverviewOnly())
    layer = max(1, len(glance.layers) // 16)  # the one whose attention is read
    look = glance.encoder + sum(glance.layers[: layer + 1])
    runs: dict[str, list[tuple[Count, float]]] = {label: [] for label in (*METHODS, "both, look", "zoom")}
    for region in REGIONS:
        for label, method in METHODS.items():
            runs[label].append((counted(model, processor, [picture], method, region), 0.0))
        runs["both, look"].append((runs["both"][-1][0], look))
        runs["zoom"].append((counted(model, processor, crop.zoom(picture, region, times=TIMES), Everything()), 0.0))
    rows = []
    for label, found in runs.items():
        encoder, decoder = (
            mean(value) / 1e12 for value in ([c.encoder for c, _ in found], [sum(c.layers) for c, _ in found])
        )
        more = mean(glance for _, glance in found) / 1e12
        total = encoder + decoder + more
        rows.append(
            {
                "model": name, "tokens": plain.tokens, "pruned": label, "TFLOP": total, "encoder": encoder,
                "language model": decoder, "look": more,
                "of unpruned": total * 1e12 / (plain.encoder + sum(plain.layers)),
                "encoded": mean(c.encoded for c, _ in found), "last layers": mean(c.tokens for c, _ in found),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency.first_token", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=list(GEOMETRIES), default=NAMES)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    print(header(), flush=True)
    rows = [row for name in tqdm(options.models, unit="model", disable=None) for row in count(name, GEOMETRIES[name])]
    print(f"\n{table(rows)}", flush=True)
    if options.json:
        save(options.json, rows)


if __name__ == "__main__":
    main()
