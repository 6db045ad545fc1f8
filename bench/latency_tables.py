"""README's tables of time, memory and growth, from the JSON of the benches that measure them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.e2e import report


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; all columns but the first are numbers."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def e2e(content: dict[str, Any]) -> list[str]:
    """Speed-ups to the first token, localizer included, and memory above the weights."""
    names = ("FastV, eager layer", "ILP", "PLC", "both")
    table = []
    for row in content["rows"]:
        what = f"{row['geometry']}, {row['tokens']} tokens, batch {row['batch']}, {100 * row['keep']:.0f} %"
        if "contenders" not in row:
            table.append([what, *["-"] * (len(names) + 2)])
            continue
        found = row["contenders"]
        plain = found["unpatched"]
        memory = [report.ratio(found.get(name, {}), plain, "memory") for name in names]
        table.append(
            [
                what,
                *(_times(report.ratio(plain, found.get(name, {}), "first")) for name in names),
                _times(report.ratio(plain, found.get("both", {}), "flops")),
                " / ".join(map(_times, memory)),
            ]
        )
    return markdown(["to the first token: faster by", *names, "both, FLOPs", "memory above weights: share"], table)


def bars(content: dict[str, Any]) -> list[str]:
    """What is wanted on an H100."""
    return markdown(
        ["on an H100, full size, localizer included", "wanted", "measured", ""], report.bars(content["rows"])
    )


def small(content: dict[str, Any]) -> list[str]:
    """Time against the unpruned model, deciles in brackets."""

    def span(row: dict[str, Any], arm: str) -> str:
        return f"{row[arm]:.2f} ({row[f'{arm} p10']:.2f} to {row[f'{arm} p90']:.2f})"

    arms = ("again", "pruned", "auto", "localized", "localized auto")
    table = [
        [
            f"{row['model']}, {row['tokens']} tokens, batch {row['batch']}",
            f"{row['unpruned ms']:.1f}",
            *(span(row, arm) for arm in arms),
            row["advice"],
        ]
        for row in content["rows"]
    ]
    return markdown(["layers x width", "unpruned, ms", *arms, "advice"], table)


def scale(content: dict[str, Any]) -> list[str]:
    """Fitted exponents, one line per kind of work."""
    found = {(line["axis"], line["work"]): line["exponent"] for line in content["exponents"]}
    axes, works = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    last = {axis: max(row["size"] for row in content["rows"] if row["axis"] == axis) for axis in axes}
    table = [[work, *(_times(found.get((axis, work))) for axis in axes)] for work in works]
    return markdown(["exponent of growth", *(f"{axis}, to {last[axis]}" for axis in axes)], table)


def prefill(content: dict[str, Any]) -> list[str]:
    """Speed-up, ratio of FLOPs and own work of every method at every budget; unpatched and keep-all as they were."""
    rows = {row["contender"]: row for row in content["rows"]}
    table = []
    for name, row in rows.items():
        if name.startswith("localizer"):
            continue
        own = "-" if row["own work %"] is None else f"{row['own work %']:.2f} %"
        spread = f"{row['ms'] / 1e3:.2f} ({row['p10'] / 1e3:.2f} to {row['p90'] / 1e3:.2f})"
        table.append([name, spread, _times(row["speed-up"]), _times(row["FLOP ratio"]), own])
    tokens = content["rows"][0]["vision tokens"]
    return markdown([f"{tokens} vision tokens", "seconds (p10 to p90)", "faster by", "FLOPs", "own work"], table)


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
