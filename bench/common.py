"""What every bench shares: where it ran, interleaved timing, one table, one JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import crop

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, str]:
    """Machine, versions and commit, as every table states them."""
    import transformers

    facts = {
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "crop": crop.__version__,
        "build": str(crop.build_info()),
        "commit": commit(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
    return facts


def header() -> str:
    """The facts of ``machine``, one a line."""
    return "\n".join(f"{name + ':':14}{value}" for name, value in machine().items())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:  # there is no git
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    return (commit + (" with changes" if git("status", "--porcelain", "-uno") else "")) or "unknown"


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and spread over the rounds."""

    median: float
    p10: float
    p90: float


def interleave(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int = 20, warmup: int = 2, repeat: int = 1
) -> dict[str, Timing]:
    """Time every contender once per round, in turn, so that a busy machine slows all of them alike.

    Args:
        contenders: name -> call without arguments.
        rounds: timed rounds. warmup: untimed ones. repeat: calls per timing, for work of microseconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, call in contenders.items():
            _wait()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            _wait()
            if turn >= warmup:
                seconds[name].append((time.perf_counter() - start) / repeat)
    return {name: timing(values) for name, values in seconds.items()}


def timing(values: Sequence[float]) -> Timing:
    """Median and spread of measured values."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), deciles[0], deciles[-1])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned text; a missing value is a dash."""
    names = list(rows[0])
    cells = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save(
    path: Path, rows: Sequence[Mapping[str, Any]], more: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> None:
    """Machine and rows as JSON, and the printed table beside it as text; ``more``: further tables by name, printed first."""
    more = more or {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **more, "rows": list(rows)}, indent=1) + "\n")
    tables = "\n\n".join(table(found) for found in (*more.values(), rows))
    path.with_suffix(".txt").write_text(f"{header()}\n\n{tables}\n")
