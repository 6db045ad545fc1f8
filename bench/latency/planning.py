"""What planning takes on the host, per call: regions are new every time, sizes are not. CPU seconds, medians.

    python -m bench.latency.planning --json bench/results/planning.json     # compiled, and in numpy

Every case is planned some times before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from pathlib import Path

import torch

import crop
from bench.common import header, save, table
from bench.methods import ours
from crop.patching.batch_plan import plan_batch

GRIDS, BATCHES, TEXT = ((24, 24), (48, 60)), (1, 8), 60
WARM, ROUNDS = 20, 100


def milliseconds(method: crop.Method, grid: tuple[int, int], batch: int) -> float:
    """Of one plan for ``batch`` samples with an image each."""
    draw, count = random.Random(0), grid[0] * grid[1]
    layouts = [(sample, crop.VisionLayout.grid(*grid, start=10)) for sample in range(batch)]
    valid, spent = torch.ones(batch, count + TEXT, dtype=torch.bool), []
    for _ in range(WARM + ROUNDS):
        corners = [(draw.uniform(0, 0.6), draw.uniform(0, 0.6)) for _ in range(batch)]
        regions = [crop.Region.box(x, y, x + 0.3, y + 0.2) for x, y in corners]
        start = time.process_time()
        plan_batch(method, layouts, regions, valid)
        spent.append(time.process_time() - start)
    return 1000 * statistics.median(spent[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency.planning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(header())
    rows = []
    for grid, batch, (name, method) in itertools.product(GRIDS, BATCHES, ours(0.11).items()):
        row = {"tokens": grid[0] * grid[1], "batch": batch, "method": name}
        row["ms"] = milliseconds(method.with_layer(2), grid, batch)
        with crop.use_backend("twin"):
            row["ms in numpy"] = milliseconds(method.with_layer(2), grid, batch)
        rows.append(row)
    print(table(rows))
    if options.json:
        save(options.json, rows)


if __name__ == "__main__":
    main()
