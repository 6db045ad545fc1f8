"""Write the tables of README from the figures in bench/results, so that no number is typed by hand.

    python -m bench.readme            # rewrite
    python -m bench.readme --check    # only say what differs

A table stands between ``<!-- table NAME -->`` and ``<!-- end NAME -->``; its maker is an entry of ``TABLES``. To add one:
write a function from the JSON's content to lines of Markdown, name its file, and put the two marks into README.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import latency_tables
from bench.latency_tables import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Source:
    """Where a table's figures are, and how they become lines."""

    file: str
    make: Callable[[dict[str, Any]], list[str]]


def _percent(cell: dict[str, Any] | None) -> str:
    return "-" if cell is None or cell["relative"] is None else f"{100 * cell['relative']:.1f}"


def accuracy(content: dict[str, Any]) -> list[str]:
    """All questions, by layer average; a cell that spent more than its budget says how much.

    The best of each column is bold, among cells that do not know the true region and kept to the budget.
    """
    from bench.accuracy.summary import OVERALL, grid

    rows = content["rows"]
    budgets = sorted({row["budget"] for row in rows if row["counted"] == "average"}, reverse=True)
    plain = next(row for row in rows if row["contender"] == "unpruned" and row["group"] == OVERALL)
    cells = grid(rows, OVERALL, "average", budgets)

    def fair(name: str, cell: dict[str, Any] | None, budget: float) -> bool:
        return cell is not None and "oracle" not in name and cell["average"] <= 1.05 * budget

    best = {
        b: max((found[b]["relative"] for name, found in cells.items() if fair(name, found.get(b), b)), default=None)
        for b in budgets
    }
    table = []
    for name, found in cells.items():
        line = []
        for budget in budgets:
            cell = found.get(budget)
            text = _percent(cell)
            if cell is not None and cell["average"] > 1.05 * budget:
                text += f" (spent {cell['average']:.0%})"
            bold = fair(name, cell, budget) and cell["relative"] == best[budget]
            line.append(f"**{text}**" if bold else text)
        table.append([name, *line])
    head = [f"% of the unpruned score ({plain['score']:.3f}, {plain['n']} questions)", *(f"{b:.1%}" for b in budgets)]
    return markdown(head, table)


def accuracy_leads(content: dict[str, Any]) -> list[str]:
    """Ours with a predicted region against the best baseline, in points, with 95 % intervals."""
    leads = content["leads"]
    budgets = list(dict.fromkeys(row["budget"] for row in leads))
    found: dict[str, dict[float, str]] = {}
    for row in leads:
        text = f"{100 * row['lead']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        found.setdefault(row["contender"], {})[row["budget"]] = f"{text}, {row['baseline']}"
    table = [[name, *(cells.get(budget, "-") for budget in budgets)] for name, cells in found.items()]
    return markdown(["points ahead of the best baseline", *(f"{budget:.1%}" for budget in budgets)], table)


def accuracy_groups(content: dict[str, Any]) -> list[str]:
    """By kind of question, at 11 % layer average, with bootstrap intervals."""
    from bench.accuracy.summary import OVERALL, grid

    rows, budget = content["rows"], 0.11
    groups = sorted({row["group"] for row in rows} - {OVERALL})
    by_group = {group: grid(rows, group, "average", [budget]) for group in groups}
    table = []
    for name in dict.fromkeys(name for found in by_group.values() for name in found):
        cells = (by_group[group].get(name, {}).get(budget) for group in groups)
        table.append(
            [name, *(f"{_percent(c)} ({100 * c['low']:.0f} to {100 * c['high']:.0f})" if c else "-" for c in cells)]
        )
    return markdown([f"{budget:.0%} of the tokens, layer average", *groups], table)


def receipts(content: dict[str, Any]) -> list[str]:
    """Answers wholly inside the region per field, and over all fields area, IoU, lines read and time on a new image."""
    rows = {(row["localizer"], row["question"]): row for row in content["rows"]}
    fields = ("company", "date", "address", "total amount")
    head = ["answer's box wholly inside, %", *fields, "all four", "coverage", "mean area", "IoU", "lines read", "ms"]
    table = []
    for name in dict.fromkeys(name for name, question in rows if question == "all four"):
        every = rows[name, "all four"]
        shares = [rows[name, field]["containment"] for field in fields] + [
            every[key] for key in ("containment", "coverage", "area", "IoU", "read")
        ]
        cells = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        table.append([name, *cells, "-" if every["ms"] is None else f"{every['ms']:.0f}"])
    return markdown(head, table)


def regions(content: dict[str, Any]) -> list[str]:
    """Exact answers by method and by where the region came from."""
    rows, plain = content["rows"], content["unpruned"][0]["exact"]
    sources = [name for name in rows[0] if name != "method"]
    table = [[row["method"], *(f"{100 * row[source]:.0f}" for source in sources)] for row in rows]
    return markdown([f"exact answers, % (unpruned {100 * plain:.0f})", *sources], table)


def localizers(content: dict[str, Any]) -> list[str]:
    """Questions that a part of the picture answers: how well the region is found, what it costs, what is answered."""
    rows = [row for row in content["rows"] if row["questions"] == "a part answers"]
    table = [
        [
            f"{row['localizer']} (n={row['n']})",
            *(f"{100 * row[name]:.1f} %" for name in ("covered", "area", "answers")),
            *(f"{row[name]:.1f}" for name in ("localizer ms", "total ms")),
        ]
        for row in rows
    ]
    return markdown(
        ["region from", "covers the true one", "area", "right answers", "localizer, ms", "total, ms"], table
    )


TABLES = {
    "accuracy": Source("accuracy.json", accuracy),
    "accuracy-leads": Source("accuracy.json", accuracy_leads),
    "accuracy-groups": Source("accuracy.json", accuracy_groups),
    "accuracy-22": Source("accuracy_22.json", accuracy),
    "accuracy-22-leads": Source("accuracy_22.json", accuracy_leads),
    "e2e": Source("e2e.json", latency_tables.e2e),
    "e2e-bars": Source("e2e.json", latency_tables.bars),
    "ops": Source("ops.json", latency_tables.ops),
    "ops-region-topk": Source("ops_region_topk.json", latency_tables.ops),
    "prefill-576": Source("prefill_576.json", latency_tables.prefill),
    "prefill-2880": Source("prefill_2880.json", latency_tables.prefill),
    "small": Source("small.json", latency_tables.small),
    "scale": Source("scale.json", latency_tables.scale),
    "receipts": Source("receipts.json", receipts),
    "regions": Source("regions.json", regions),
    "localizers": Source("localizers.json", localizers),
}


def marks(name: str) -> tuple[str, str]:
    """The two lines around a table."""
    return f"<!-- table {name} -->", f"<!-- end {name} -->"


def rewrite(text: str, results: Path = RESULTS) -> str:
    """README with every table made anew.

    Args:
        text: README as it is. results: folder of the JSON files.
    Raises:
        ValueError: a mark of an unknown table, or one without its end.
    """
    for name in re.findall(r"<!-- table (\S+) -->", text):
        if name not in TABLES:
            raise ValueError(f"rewrite: table must be one of {', '.join(TABLES)}, got {name!r}")
        begin, end = marks(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise ValueError(f"rewrite: {begin} must stand once and be followed by {end}, got another order or number")
        content = json.loads((results / TABLES[name].file).read_text())
        inside = "\n".join(TABLES[name].make(content))
        text = f"{text[: text.index(begin)]}{begin}\n{inside}\n{text[text.index(end) :]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if something differs")
    options = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    made = rewrite(text)
    if options.check:
        sys.exit("README differs from bench/results: run python -m bench.readme" if made != text else 0)
    path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
