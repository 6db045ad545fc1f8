"""What planning takes on the host, per call: regions are new every time, sizes are not. CPU seconds, medians.

python -m bench.latency.planning            # compiled, and in numpy
"""

from __future__ import annotations

import itertools
import random
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

import crop
from bench.common import header
from bench.methods import ours
from crop.patching.batch_plan import plan_batch

GRIDS, BATCHES, ROUNDS, TEXT = ((24, 24), (48, 60)), (1, 8), 20, 60


def milliseconds(method: crop.Method, grid: tuple[int, int], batch: int) -> float:
    """Of one plan for ``batch`` samples with an image each."""
    draw, count = random.Random(0), grid[0] * grid[1]
    layouts = [(sample, crop.VisionLayout.grid(*grid, start=10)) for sample in range(batch)]
    valid, spent = torch.ones(batch, count + TEXT, dtype=torch.bool), []
    for _ in range(ROUNDS):
        corners = [(draw.uniform(0, 0.6), draw.uniform(0, 0.6)) for _ in range(batch)]
        regions = [crop.Region.box(x, y, x + 0.3, y + 0.2) for x, y in corners]
        start = time.process_time()
        plan_batch(method, layouts, regions, valid)
        spent.append(time.process_time() - start)
    return 1000 * statistics.median(spent)


def main() -> None:
    torch.set_num_threads(1)
    print(header())
    table = Table("tokens", "batch", "method", "ms", "ms in numpy", "ms per image")
    for grid, batch in itertools.product(GRIDS, BATCHES):
        for name, method in ours(0.11).items():
            fast = milliseconds(method.with_layer(2), grid, batch)
            with crop.use_backend("twin"):
                slow = milliseconds(method.with_layer(2), grid, batch)
            table.add_row(str(grid[0] * grid[1]), str(batch), name, f"{fast:.2f}", f"{slow:.2f}", f"{fast / batch:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
