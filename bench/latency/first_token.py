"""The whole first token, stage by stage: encoder, language model, and the look that finds the region.

    python -m bench.latency.first_token --json bench/results/first_token.json     # FLOPs of full-size models, by formula
    python -m bench.latency.first_token --time 7                                  # also seconds of narrow copies of them

FLOPs are counted from the sizes of modules on the meta device and from the plan that `crop.patch` would carry out; a test
holds the formula to torch's counter. "look" is `crop.get_localizer("attention", coarse=4)`: the encoder on a copy with a quarter of
the sides, or on the view of the whole picture where there are tiles, and the first decoder layers over its tokens, their
feed-forward parts included, which the localizer leaves out. "zoom" is `crop.zoom`, two pictures and no pruning, without its
look. All are means over nine places of a region of a tenth of the picture. The head over the vocabulary is in no figure.

Times are of the encoder alone, pruned and unpruned in turns, on the CPU and with random weights; "per share" is the ratio of
times by the share of the encoder's tokens that is encoded: 1 would be no loss.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
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
from bench.latency.e2e.workload import AFTER, BEFORE, Model, make
from crop.cost.geometry import DecoderGeometry
from crop.geometry.pieces import Encoding
from crop.localizers.coarse import small_copy
from crop.localizers.reading import Stop, run_until_stop
from crop.methods.encoder import OverviewOnly
from crop.methods.registry import POOL_SHARE
from crop.models import family_of
from crop.models.anyres import anyres_layout
from crop.patching.planner import Planner

NAMES = ("llava-1.5-7b", "llava-next-7b", "internvl3-8b", "qwen2.5-vl-7b-4k", "qwen2.5-vl-7b-16k")
REGIONS = [  # a tenth of the picture, at nine places
    crop.Region.box(x, y, x + 0.4, y + 0.25) for x in (0.03, 0.3, 0.57) for y in (0.04, 0.37, 0.7)
]
KEEP, TIMES = 0.11, 4
PLC, ILP = crop.PreLLMCompression(keep=KEEP**POOL_SHARE), crop.InnerLLMPruning(KEEP)


@dataclass(frozen=True)
class EncoderWork:
    """What the sizes of an encoder make of patches.

    Args:
        tower, projector: modules, weights on any device; None: the tower projects itself.
        merge: patches per token.
    """

    tower: nn.Module
    projector: nn.Module | None
    merge: int

    def flops(self, encodings: Sequence[Encoding]) -> float:
        """Of one pass over some images, for what is taken of them."""
        lengths = self.sequences(encodings)
        blocks = next(
            part for part in self.tower.modules() if isinstance(part, nn.ModuleList) and len(part) == len(lengths)
        )
        inside = {id(part) for part in blocks.modules()}
        total = 2.0 * _weights(blocks) / len(blocks) * sum(map(sum, lengths))
        for name, part in self.tower.named_modules():
            if id(part) not in inside:
                rows = sum(lengths[-1]) / self.merge if "merger" in name else self._embedded(lengths[0])
                total += 2.0 * _weights(part, alone=True) * rows
        if self.projector is not None:  # it gets zeros for what was not encoded
            total += 2.0 * _weights(self.projector) * sum(map(self._tokens, encodings))
        width = getattr(self.tower.config, "embed_dim", self.tower.config.hidden_size)
        return total + sum(4.0 * width * length**2 for layer in lengths for length in layer)

    def sequences(self, encodings: Sequence[Encoding]) -> list[list[int]]:
        """For every layer the lengths of the sequences inside which it attends."""
        config = self.tower.config
        if hasattr(config, "depth"):  # all patches in one sequence per image; windows
            whole = [int(image.tokens.sum()) * self.merge for image in encodings]
            if not hasattr(config, "fullatt_block_indexes"):
                return [whole] * config.depth
            windows = [
                count * self.merge
                for image in encodings
                for count in torch.bincount(image.pieces.of_token[image.tokens, 0]).tolist()
                if count
            ]
            return [whole if layer in config.fullatt_block_indexes else windows for layer in range(config.depth)]
        depth = config.num_hidden_layers
        tile = self._patches + (config.model_type != "siglip_vision_model")  # class token
        tiles = [tile] * sum(int(image.taken.sum()) for image in encodings)
        if len(encodings[0].pieces) != len(encodings[0].layout):
            return [tiles] * depth
        # Tokens leave at a late layer.
        late, few = [tile] * len(encodings), [int(image.tokens.sum()) + tile - self._patches for image in encodings]
        cut = crop.models.families()["llava"].encoder.cut(depth)
        return [late if layer < cut else few for layer in range(depth)]

    def _embedded(self, lengths: Sequence[int]) -> int:
        """Patches among these sequences; class tokens are none."""
        return sum(lengths) if hasattr(self.tower.config, "depth") else len(lengths) * self._patches

    @property
    def _patches(self) -> int:
        """Of a tile."""
        config = self.tower.config
        side, patch = (
            value[0] if isinstance(value, (list, tuple)) else value for value in (config.image_size, config.patch_size)
        )
        return (side // patch) ** 2

    def _tokens(self, image: Encoding) -> int:
        """That the projector makes of an image."""
        tiles = image.pieces.place is None
        return len(image.pieces) * self._patches // self.merge if tiles else len(image.layout)


def _weights(module: nn.Module, alone: bool = False) -> int:
    """Elements of the matrices of a module, or of it without what it holds."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return sum(part.weight.numel() for part in ([module] if alone else module.modules()) if isinstance(part, kinds))


def encoder_of(model: nn.Module) -> EncoderWork:
    """The encoder of a model."""
    family = family_of(model)
    tower, *behind = family.vision_modules(family.base(model))
    merge = getattr(tower, "spatial_merge_size", 1) ** 2
    if hasattr(model.config, "downsample_ratio"):
        merge = round(model.config.downsample_ratio**-2)
    return EncoderWork(tower, behind[0] if behind else None, merge)


class Everything(crop.EncoderPruning):
    """Takes everything, so that plans say what that is."""

    def encode(self, layout: Any, region: crop.Region, pieces: crop.Pieces) -> torch.Tensor:
        return torch.ones(len(pieces), dtype=torch.bool)


METHODS: dict[str, crop.Method] = {
    "unpruned": Everything(),
    "language model": crop.Compose(PLC, ILP, Everything()),
    "encoder": crop.EncoderPruning(),
    "both": crop.Compose(PLC, ILP, crop.EncoderPruning()),
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
    plan, encoder = planner.plan(_inputs(model, processor, pictures)), encoder_of(model)
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
        sum(int(one.tokens.sum()) for one in encodings) / sum(len(one.layout) for one in encodings),
    )


def _inputs(model: nn.Module, processor: Any, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Text around pictures; no pixels, since nothing runs."""
    made = [_seen(processor, picture.size) for picture in pictures]
    inputs = {name: torch.cat([one[name] for one in made]) for name in made[0] if name != "views"}
    config, ids = model.config, [1] * BEFORE
    for picture, one in zip(pictures, made, strict=True):
        ids += [config.image_token_id] * _tokens(model, picture, one) + [1]
    return inputs | {"input_ids": torch.tensor([[*ids, *[1] * (AFTER - len(pictures))]])}


@cache
def _seen(processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """What the processor tells the model of a picture of this size beside its pixels, and how many views these are of."""
    made = processor(Image.new("RGB", size, "gray"), return_tensors="pt")
    found = {name: torch.as_tensor(made[name]) for name in ("image_grid_thw", "image_sizes") if name in made}
    return found | {"pixel_values": torch.zeros(1), "views": len(torch.as_tensor(made["pixel_values"]))}


def _tokens(model: nn.Module, picture: Image.Image, seen: dict[str, Any]) -> int:
    """Vision tokens of one picture."""
    config = model.config
    if "image_grid_thw" in seen:
        return int(seen["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2
    if hasattr(config, "image_grid_pinpoints"):
        return len(anyres_layout(config, picture.size[::-1]))
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


@torch.no_grad()
def timed(name: str, geometry: Geometry, rounds: int, shrink: Shrink) -> dict[str, Any]:
    """Seconds of the encoder, all of the picture against what is taken, in turns; no decoder layer runs."""
    work = make(Model.build(geometry, shrink, "cpu", torch.float32), 1)
    model, marks = work.model, []

    def stop(*_: Any) -> None:
        raise Stop

    def run(method: crop.Method) -> float:
        """Seconds; the plan's call of the tower, what is taken out and put back included."""
        with crop.patch(model.model, method, REGIONS[0], **work.where), ExitStack() as undo:
            for register, more in (
                (model.tower.register_forward_pre_hook, {"prepend": True}),
                (model.tower.register_forward_hook, {}),
            ):
                undo.callback(register(lambda *_: marks.append(time.perf_counter()), **more).remove)
            undo.callback(model.decoder.register_forward_pre_hook(stop).remove)
            run_until_stop(model.base, work.inputs)
        return marks[-1] - marks[-2]

    spent = [(run(Everything()), run(crop.EncoderPruning())) for _ in range(rounds + 1)][1:]  # the first warms up
    planner = Planner(model.model, crop.EncoderPruning(), REGIONS[0], **work.where)
    (image,) = planner.plan(work.inputs).images
    # Of what the encoder works on: tiles, or tokens.
    share = image.encoding.taken if image.encoding.pieces.place is None else image.encoding.tokens
    share = float(share.float().mean())
    ratio = statistics.median(taken / whole for whole, taken in spent)
    return {
        "model": name, "width /": shrink.width, "depth /": shrink.depth, "seconds": statistics.median(whole for whole, _ in spent),
        "share": share, "time": ratio, "per share": ratio / share,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency.first_token", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=list(GEOMETRIES), default=NAMES)
    parser.add_argument("--time", type=int, default=0, help="rounds of the encoder's timing, 0: none")
    parser.add_argument(
        "--timed", nargs="+", choices=list(GEOMETRIES), default=NAMES[1:-1], help="models of the timing"
    )
    parser.add_argument("--width", type=int, default=4, help="divides widths where time is measured")
    parser.add_argument("--depth", type=int, default=4, help="divides depths where time is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(header(), flush=True)
    rows = [row for name in tqdm(options.models, unit="model", disable=None) for row in count(name, GEOMETRIES[name])]
    print(f"\n{table(rows)}", flush=True)
    times: list[dict[str, Any]] = []
    if options.time:
        shrink = Shrink(options.width, options.depth)
        times = [timed(name, GEOMETRIES[name], options.time, shrink) for name in tqdm(options.timed, disable=None)]
        print(f"\n{table(times)}")
    if options.json:
        save(options.json, rows, {"times": times})


if __name__ == "__main__":
    main()
