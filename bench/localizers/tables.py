"""Tables of localizers, from the JSON of ``python -m bench.localizers``."""

from __future__ import annotations

from typing import Any

from bench.common import markdown


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


def head_cost(content: dict[str, Any]) -> list[str]:
    """What the head adds to a prefill, in multiply-adds and, where it ran, in milliseconds."""
    table = []
    for row in content["cost of the head"]:
        times = (row[name] for name in ("head with boxes, ms", "localizer, ms", "decoder prefill, ms"))
        share = f"{row['share %']:.2g} %"
        table.append([row["geometry"], share, *("-" if value is None else f"{value:.1f}" for value in times)])
    head = [
        "model",
        "multiply-adds of the head, of the prefill's",
        "head, ms",
        "head and what it waits for, ms",
        "prefill, ms",
    ]
    return markdown(head, table)
