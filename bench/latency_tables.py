"""README's tables of latency, memory and scale, from the JSON of bench.e2e, bench.small and bench.scale."""

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
