"""Cost against size: vision tokens, samples, images per prompt, with the exponent of growth fitted.

    python -m bench.latency.scale [--json bench/results/scale.json]          # and scale.png beside it

Everything that ``crop`` adds to a prefill is timed alone: token layout, planning (pools and candidates; nothing cached), the
operators, entering and leaving ``patch``. Then the prefill of a small random LLaVA whose prompt grows picture by
picture, unpruned and pruned to 11 %. An exponent of 1 is linear; it is fitted over the larger half of the sizes, where
fixed costs weigh less. Attention itself is quadratic: so is the unpruned prefill, in the end.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import crop
from bench.common import header, save, table
from bench.latency.e2e.geometries import Shrink
from bench.latency.e2e.workload import AFTER, BEFORE, Model, Workload, make, regions
from bench.latency.small import random_llava
from crop.methods.saliency import saliency_weights
from crop.patching.batch_plan import BatchPlan, plan_batch

KEEP = 0.11
AXES = {
    "tokens": (256, 1024, 4096, 16384, 65536),  # of one picture, square
    "samples": (1, 4, 16, 64),  # of one picture of 576 tokens each
    "images": (1, 4, 16, 64, 256),  # of 256 tokens each, in one prompt
    "prompt tokens": (256, 1024, 4096, 16384, 65536),  # pictures of 256 tokens, prefill
}
MOST_UNPRUNED = 16384
READ = "(one read of the tokens)"  # a control: how memory itself grows
WORK = ("layout", "plan", "distinct weights", "adaptive_pool", READ, "attention_mass", "select", "compact")
HEADS, DIM, ROWS = 4, 64, 50

Case = tuple[str, str, int, Callable[[], Any]]


def own_work(axis: str, size: int) -> Iterator[Case]:
    """What ``crop`` adds to a prefill of one of the first three axes."""
    samples = size if axis == "samples" else 1
    images = size if axis == "images" else 1
    side = {"tokens": round(size**0.5), "samples": 24, "images": 16}[axis]
    where, length = regions(samples * images), BEFORE + AFTER + images * side * side
    real, method = torch.ones(samples, length, dtype=torch.bool), crop.by_name("crop", KEEP).with_layer(2)

    def layout() -> list[tuple[int, crop.VisionLayout]]:
        return [
            (sample, crop.VisionLayout.grid(side, side, start=BEFORE + number * side * side))
            for sample in range(samples)
            for number in range(images)
        ]

    layouts = layout()

    def plan() -> BatchPlan:
        return plan_batch(method, layouts, where, real)

    made = plan()
    (step,) = made.prunes.values()
    slots = made.pool.kept_index.shape[1]
    key, query = torch.randn(samples, HEADS, slots, DIM), torch.randn(samples, HEADS, ROWS, DIM)
    hidden, tokens = torch.randn(samples, slots, HEADS * DIM), torch.randn(samples * length, HEADS * DIM)
    mass = crop.attention_mass(query, key, step.candidates, sample=step.sample)
    kept = crop.select(mass, step.num_keep, priority=step.priority)
    keep = torch.arange(step.width).expand(samples, -1).contiguous()
    yield axis, "layout", size, layout
    yield axis, "plan", size, plan
    yield axis, "attention_mass", size, lambda: crop.attention_mass(query, key, step.candidates, sample=step.sample)
    yield axis, "select", size, lambda: crop.select(mass, step.num_keep, priority=step.priority)
    yield axis, "compact", size, lambda: crop.compact([hidden], keep)
    embeds, pooling, alone, patches = tokens.view(samples, length, -1), made.pool.plan, made.pool.alone, made.patches

    def weigh() -> Tensor:
        return saliency_weights(alone, patches, embeds)

    weight = weigh()
    yield axis, "distinct weights", size, weigh
    yield axis, "adaptive_pool", size, lambda: crop.adaptive_pool(tokens, pooling, "weighted", weight)
    yield axis, READ, size, lambda: tokens.sum()
    assert kept.shape[1] == max(step.num_keep)


def prefill(model: Model, size: int) -> Iterator[Case]:
    """A prompt of many pictures, unpruned and pruned; and entering and leaving the patch alone."""
    one, images = make(model, 1), size // model.geometry.tokens
    ids = one.inputs["input_ids"]
    picture = ids[:, BEFORE:-AFTER].repeat(1, images)
    inputs = {
        "input_ids": torch.cat([ids[:, :BEFORE], picture, ids[:, -AFTER:]], 1),
        "pixel_values": one.inputs["pixel_values"].repeat(images, 1, 1, 1),
    }
    work = Workload(model, inputs, regions(images), one.preprocess)

    def run(method: crop.Method | None = None) -> Callable[[], None]:
        def call() -> None:
            if method is None:
                model.model(**work.inputs, logits_to_keep=1)
                return
            with crop.patch(model.model, method, work.regions, **work.where):
                model.model(**work.inputs, logits_to_keep=1)

        return call

    def enter() -> None:
        with crop.patch(model.model, crop.by_name("crop", KEEP), work.regions, **work.where):
            pass

    axis = "prompt tokens"
    yield axis, "patch entry and exit", size, enter
    if size <= MOST_UNPRUNED:
        yield axis, "prefill, unpruned", size, run()
    for name, kind in (("PLC", "plc"), ("both", "crop")):
        yield axis, f"prefill, {name} {KEEP:.0%}", size, run(crop.by_name(kind, KEEP))


def cases(axes: Sequence[str], most: int) -> Iterator[Case]:
    """Everything on some axes up to some size, each prepared when it is asked for."""
    torch.manual_seed(0)
    model = Model.build(random_llava(4, 64, 16), Shrink(), "cpu", torch.float32)
    for axis in axes:
        for size in AXES[axis]:
            if size <= most:
                yield from prefill(model, size) if axis == "prompt tokens" else own_work(axis, size)


@torch.no_grad()
def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Median of as many calls as fit into some seconds, three at least; two of those that take longer."""
    axis, name, size, call = case
    start = time.perf_counter()
    call()
    least = 3 if time.perf_counter() - start < seconds else 1
    spent: list[float] = []
    start = time.perf_counter()
    while len(spent) < least or (time.perf_counter() - start < seconds and len(spent) < 500):
        begin = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begin)
    median = statistics.median(spent)
    return {"axis": axis, "work": name, "size": size, "calls": len(spent), "ms": 1e3 * median, "min ms": 1e3 * min(spent),
            "us each": 1e6 * median / size}  # fmt: skip


def exponents(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per axis and work: growth between its larger sizes, by least squares on logarithms of the fastest calls."""
    found = []
    for axis, work in dict.fromkeys((row["axis"], row["work"]) for row in rows):
        mine = [row for row in rows if (row["axis"], row["work"]) == (axis, work)]
        upper = mine[len(mine) // 2 - (len(mine) == 2) :] if len(mine) > 2 else mine
        size, cost = (np.log([row[name] for row in upper]) for name in ("size", "min ms"))
        line = {"axis": axis, "work": work, "from": upper[0]["size"], "to": upper[-1]["size"]}
        found.append(line | {"exponent": float(np.polyfit(size, cost, 1)[0])})
    return found


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per axis, both scales logarithmic, a line of slope 1 to compare with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    lines = (len(axes) + 1) // 2
    figure, panels = pyplot.subplots(lines, 2, figsize=(13, 4.3 * lines), layout="constrained", squeeze=False)
    for panel, axis in zip(panels.flat, axes, strict=False):
        for work in dict.fromkeys(row["work"] for row in rows if row["axis"] == axis):
            mine = [row for row in rows if (row["axis"], row["work"]) == (axis, work)]
            panel.loglog([row["size"] for row in mine], [row["min ms"] for row in mine], marker="o", label=work)
        shown = [row for row in rows if row["axis"] == axis]
        low, high = min(row["size"] for row in shown), max(row["size"] for row in shown)
        start = min(row["min ms"] for row in shown)
        panel.loglog([low, high], [start, start * high / low], "k:", linewidth=1, label="linear")
        panel.set_xlabel(f"{axis} per prompt" if axis == "images" else axis)
        panel.set_ylabel("ms, fastest call")
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--most", type=int, help="leave out sizes beyond")
    parser.add_argument("--json", type=Path, help="also write the rows here, the plot beside it")
    options = parser.parse_args(arguments)
    print(header(), flush=True)
    chosen = cases(options.axis, options.most or 10**9)
    rows = [measure(case, options.seconds) for case in tqdm(chosen, unit="case", disable=None)]
    fits = exponents(rows)
    print(f"\n{table(fits)}\n\n{table(rows)}")
    if options.json:
        save(options.json, rows, {"exponents": fits})
        draw(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
