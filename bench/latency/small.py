"""Small models, where pruning may not pay: unpruned and pruned, with and without a localizer, and what the advice is.

    python -m bench.latency.small [--rounds 15] [--json bench/results/small.json]

The embedded model and random LLaVAs (a decoder of some layers and widths, a tower of two narrow layers) answer the same
prompt in turns; every ratio is that of two runs of one round, so that a busy machine slows both. "again" is the unpruned
model a second time: what differs there is noise. The advice is that of ``crop.estimate``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import crop
from bench.accuracy.contenders import default_cut
from bench.common import header, save, table
from bench.latency.e2e import localize
from bench.latency.e2e.geometries import Geometry, Shrink
from bench.latency.e2e.workload import Model, Workload, make
from crop import embedded
from crop.embedded import scenes

KEEP, SLACK = 0.11, 0.02
SIZES = [  # decoder layers, width, tokens per side, batch
    (2, 64, 8, 1), (2, 64, 8, 8), (4, 64, 16, 1), (24, 64, 8, 1), (2, 128, 24, 1), (8, 128, 8, 1), (8, 128, 8, 8),
    (8, 256, 16, 1), (4, 256, 16, 8), (8, 256, 24, 1), (12, 512, 8, 1), (6, 1024, 8, 1),
]  # fmt: skip


def random_llava(layers: int, width: int, side: int) -> Geometry:
    """A LLaVA whose decoder is nearly all of it."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": 14 * side, "width": 14 * side}

    def config(shrink: Shrink) -> Any:
        vision = transformers.CLIPVisionConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=14 * side,
            patch_size=14, projection_dim=64,
        )  # fmt: skip
        text = transformers.LlamaConfig(
            vocab_size=1000, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=8192,
        )  # fmt: skip
        return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=999)

    return Geometry(
        config, lambda: CLIPImageProcessorPil(size=size, do_center_crop=False), (14 * side,) * 2, side**2, 0
    )


def embedded_model() -> Model:
    """The model in the package."""
    model, processor = embedded.load()
    geometry = Geometry(None, lambda: processor.image_processor, (scenes.SIZE,) * 2, scenes.GRID**2, 0)
    return Model(model, processor.image_processor, geometry, 0)


def both(work: Workload) -> crop.Method:
    """Both stages; the cut is inside the decoder, however few its layers."""
    layer = min(default_cut(work.model.model), len(work.model.decoder.layers) - 1)
    return crop.by_name("crop", KEEP).with_layer(layer)


def arms(work: Workload) -> dict[str, Callable[[], Any]]:
    """Name -> one answer's prefill."""
    model, method = work.model.model, both(work)
    find = localize.make("attention", work)

    def unpruned() -> None:
        model(**work.inputs, logits_to_keep=1)

    def pruned() -> None:
        with crop.patch(model, method, work.regions, **work.where):
            unpruned()

    def localized() -> None:
        with crop.cache_vision(model):
            find()
            pruned()

    return {"unpruned": unpruned, "again": unpruned, "pruned": pruned, "localized": localized}


@torch.no_grad()
def measure(name: str, work: Workload, rounds: int, seconds: float) -> dict[str, Any]:
    """One row: medians of the ratios within a round, and their deciles.

    Args:
        name: of the row. work: see there.
        rounds: at least. seconds: go on as long, up to ten times as many.
    """
    calls = arms(work)
    for call in calls.values():
        call(), call()
    advice = crop.estimate(work.model.model, work.inputs, both(work), work.regions, **work.where)
    spent: dict[str, list[float]] = {arm: [] for arm in calls}
    order, rng, start = list(calls), random.Random(0), time.perf_counter()
    while len(spent["unpruned"]) < rounds or (
        time.perf_counter() - start < seconds and len(spent["unpruned"]) < 10 * rounds
    ):
        rng.shuffle(order)  # what ran before leaves the caches to the next
        for arm in order:
            begin = time.perf_counter()
            calls[arm]()
            spent[arm].append(time.perf_counter() - begin)
    row: dict[str, Any] = {"model": name, "tokens": work.model.geometry.tokens, "batch": len(work.regions)}
    row |= {"rounds": len(spent["unpruned"]), "unpruned ms": 1e3 * statistics.median(spent["unpruned"])}
    for arm in list(calls)[1:]:
        ratios = [one / plain for one, plain in zip(spent[arm], spent["unpruned"], strict=True)]
        deciles = statistics.quantiles(ratios, n=10, method="inclusive")
        row |= {arm: statistics.median(ratios), f"{arm} p10": deciles[0], f"{arm} p90": deciles[-1]}
    row["advice"] = "prune" if advice.prune else "do not"
    row["advice is"] = "right" if (row["pruned"] < 1) == advice.prune else "within 2 %" if near(row) else "wrong"
    return row


def near(row: dict[str, Any]) -> bool:
    """Whether it hardly matters what is done."""
    return abs(row["pruned"] - 1) <= SLACK


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency.small", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="at least so many per size")
    parser.add_argument("--seconds", type=float, default=6, help="per size, if that allows more rounds")
    parser.add_argument("--only", type=int, nargs="+", help="rows by number, 0 is the embedded model")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    print(header(), flush=True)
    rows = []
    jobs: list[tuple[int, ...] | None] = [None, *SIZES]
    for number in tqdm(options.only or range(len(jobs)), unit="size", disable=None):
        torch.manual_seed(0)
        if jobs[number] is None:
            name, work = "embedded", make(embedded_model(), 1)
        else:
            layers, width, side, batch = jobs[number]
            model = Model.build(random_llava(layers, width, side), Shrink(), "cpu", torch.float32)
            name, work = f"{layers} x {width}", make(model, batch)
        rows.append(measure(name, work, options.rounds, options.seconds))
    print(f"\n{table(rows)}")
    if options.json:
        save(options.json, rows)


if __name__ == "__main__":
    main()
