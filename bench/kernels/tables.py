"""Tables of operators, from the JSON of ``python -m bench.kernels.cpu``."""

from __future__ import annotations

from typing import Any

from bench.common import markdown


def ops(content: dict[str, Any]) -> list[str]:
    """The operators against torch, rows of one kind together: the least and the most of their ratios."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        size, *more = row["shape"].split()
        what, against = {
            "region_topk": (f"{row['dtype']}, {size[1:]} tokens, {{rows}}", "best of four forms"),
            "select": (f"{size} {more[0]}", "`topk` and sort"),
            "adaptive_pool": ("all sizes", row["best torch form"]),
        }.get(row["op"], (f"{row['shape']}, {row['dtype']}", row["best torch form"]))
        if row["op"] == "region_topk":
            count = int(more[0].removeprefix("rows"))
            what = what.format(rows="128 rows" if count > 32 else "1 to 32 rows")
        groups.setdefault((f"`{row['op']}`, {what}", against), []).append(row)
    table = []
    for (what, against), rows in groups.items():
        ratios = sorted(row["ratio"] for row in rows)
        text = f"{ratios[0]:.2f}" if len(rows) == 1 else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        bars = [row["bar"] for row in rows if row["bar"]]
        met = sum(row["met"] == "yes" for row in rows)
        goal = f"{bars[0]:g}: {met} of {len(bars)}" if bars else "-"
        table.append([what, against, f"**{text}**" if ratios[0] < 1 else text, goal])
    return markdown(["operator", "against torch's", "times as fast", "goal: rows that meet it"], table)
