"""Tables of time, memory and growth, from the JSON of the benches that measure them."""

from __future__ import annotations

from typing import Any

from bench.common import markdown
from bench.latency.e2e import report


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

    arms = ("again", "pruned", "localized")
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


def attention_pass(content: dict[str, Any]) -> list[str]:
    """What the pass of the ``attention`` localizer takes of the unpruned prefill."""
    rows = [row for row in content["rows"] if row["contender"].startswith("localizer: attention of ")]
    table = [[row["contender"].partition(" of ")[2], f"{row['own work %']:.1f} %"] for row in rows]
    return markdown([f"attention read at ({rows[0]['vision tokens']} tokens)", "of the unpruned prefill"], table)


def serving(content: dict[str, Any]) -> list[str]:
    """Requests, times to the first token and KV blocks of every arm at every concurrency."""
    table = [
        [
            f"{row['concurrency']} at a time, {row['arm']}",
            f"{row['requests/s']:.2f}",
            _times(row["times as many"]),
            f"{row['TTFT p50, s']:.1f} / {row['TTFT p95, s']:.1f}",
            str(row["KV blocks"]),
        ]
        for row in content["rows"]
    ]
    return markdown(["requests", "a second", "times as many", "first token, s: p50 / p95", "KV blocks in use"], table)


def first_token(content: dict[str, Any]) -> list[str]:
    """FLOPs of every stage by what is pruned, as shares of the unpruned first token."""
    rows, table = content["rows"], []
    for row in rows:
        plain = row["TFLOP"] / row["of unpruned"]
        stages = ("encoder", "language model", "look")
        table.append(
            [
                f"{row['model']}, {row['tokens']} tokens",
                row["pruned"],
                f"{row['TFLOP']:.1f}",
                *(f"{100 * row[stage] / plain:.1f}" for stage in stages),
                f"{100 * row['of unpruned']:.1f}",
            ]
        )
    return markdown(["", "pruned", "TFLOP", "encoder, %", "language model, %", "look, %", "all, %"], table)


def stages(content: dict[str, Any]) -> list[str]:
    """Seconds of every stage, against the unpruned model, and peak memory."""
    names, table = ("look", "preprocess", "host", "encoder", "language model", "total"), []
    for row in content["rows"]:
        share = f"{row['encoder per share']:.2f}" if row["encoded"] < 1 else "-"
        table.append(
            [
                f"{row['model']} / {row['width /']} wide, / {row['depth /']} deep",
                row["pruned"],
                *(f"{row[name]:.2f}" for name in names),
                f"{100 * row['of unpruned']:.0f}",
                share,
                f"{row['peak MB']:.0f}",
            ]
        )
    return markdown(["seconds", "pruned", *names, "of unpruned, %", "encoder, per share", "peak, MB"], table)


def planning(content: dict[str, Any]) -> list[str]:
    """Milliseconds of a plan, compiled and in numpy."""
    table = [
        [
            f"{row['tokens']} tokens, batch {row['batch']}, {row['method']}",
            _times(row["ms"]),
            _times(row["ms"] / row["batch"]),
            _times(row["ms in numpy"]),
        ]
        for row in content["rows"]
    ]
    return markdown(["milliseconds of one plan", "compiled", "per image", "in numpy"], table)
