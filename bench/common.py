"""What every bench shares: where it ran, where its data is, one table, one JSON file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from crop.cli.report import commit, facts_text, header, machine, save, table

__all__ = ["ROOT", "commit", "data_folder", "facts_text", "header", "machine", "markdown", "save", "table"]

ROOT = Path(__file__).resolve().parent.parent


def data_folder() -> Path:
    """The folder with the data files: CROP_DATA, or shared/data beside the project."""
    return Path(os.environ.get("CROP_DATA") or ROOT.parent / "shared" / "data")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; all columns but the first are numbers."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
