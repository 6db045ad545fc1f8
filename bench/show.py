"""Print results files as tables, with the machine, versions and commit they name.

python -m bench.show bench/results/ops.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.common import facts_text, table
from bench.latency.e2e import report


def text(content: Mapping[str, Any]) -> str:
    """Everything a results file holds: facts of the run, then its tables."""
    blocks = [facts_text(content["machine"])]
    for name, rows in content.items():
        if name == "rows" and "geometry" in rows[0]:
            blocks.append(report.text(rows))
        elif isinstance(rows, list) and rows and isinstance(rows[0], dict):
            blocks.append(table(rows))
        elif name != "machine":
            blocks.append(f"{name}: {rows}")
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        print(text(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
