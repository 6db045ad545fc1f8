"""Tables of what was measured, and JSON that says where: machine, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import crop

SOURCE = Path(crop.__file__).resolve().parent.parent  # the repository, where crop runs from its source


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
    return facts_text(machine())


def facts_text(facts: Mapping[str, str]) -> str:
    """Facts, one a line."""
    return "\n".join(f"{name + ':':14}{value}" for name, value in facts.items())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """CROP_COMMIT, for where there is no git; else that of the source, with what was changed since; else "unknown"."""
    if given := os.environ.get("CROP_COMMIT"):
        return given
    if not (SOURCE / "csrc").is_dir():  # installed: a repository around it is another one
        return "unknown"

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=SOURCE, capture_output=True, text=True)
        except OSError:  # there is no git
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "--short", "HEAD")
    return (found + (" with changes" if git("status", "--porcelain", "-uno") else "")) or "unknown"


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
    """Machine and rows as JSON, which ``python -m bench.show`` prints; ``more``: further tables by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **(more or {}), "rows": list(rows)}, indent=1) + "\n")
