"""Tables of answers and regions, from the JSON of the benches that measure them."""

from __future__ import annotations

from typing import Any

from bench.accuracy.summary import OVERALL, grid
from bench.common import markdown


def _percent(cell: dict[str, Any] | None) -> str:
    return "-" if cell is None or cell["relative"] is None else f"{100 * cell['relative']:.1f}"


def accuracy(content: dict[str, Any]) -> list[str]:
    """All questions, by layer average; a cell that spent more than its budget says how much.

    The best of each column is bold, among cells that do not know the true region and kept to the budget.
    """
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
    leads = [row for row in content["leads"] if row.get("group", OVERALL) == OVERALL]
    budgets = list(dict.fromkeys(row["budget"] for row in leads))
    found: dict[str, dict[float, str]] = {}
    for row in leads:
        text = f"{100 * row['lead']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        found.setdefault(row["contender"], {})[row["budget"]] = f"{text}, {row['baseline']}"
    table = [[name, *(cells.get(budget, "-") for budget in budgets)] for name, cells in found.items()]
    return markdown(["points ahead of the best baseline", *(f"{budget:.1%}" for budget in budgets)], table)


def accuracy_groups(content: dict[str, Any]) -> list[str]:
    """By kind of question, at 11 % layer average, with bootstrap intervals."""
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


def regions(content: dict[str, Any]) -> list[str]:
    """Exact answers by method and by where the region came from."""
    rows, plain = content["rows"], content["unpruned"][0]["exact"]
    sources = [name for name in rows[0] if name != "method"]
    table = [[row["method"], *(f"{100 * row[source]:.0f}" for source in sources)] for row in rows]
    return markdown([f"exact answers, % (unpruned {100 * plain:.0f})", *sources], table)


def encoder(content: dict[str, Any]) -> list[str]:
    """Exact answers by where in the encoder tokens leave."""
    table = [[row["tokens leave"], f"{100 * row['exact']:.1f}", f"{row['tokens']:.0f}"] for row in content["rows"]]
    return markdown([f"tokens leave ({content['run'][0]['questions']} questions)", "exact answers, %", "tokens"], table)


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
