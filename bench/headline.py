"""The one table of README: what pruning keeps, gains and costs, losing rows included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.accuracy.summary import OVERALL
from bench.common import markdown

ANSWERS = (("both, predicted", 0.1111), ("both, predicted", 0.0556))  # method, share of the tokens
SETS = ("accuracy_1.json", "accuracy_2.json")  # of pictures, disjoint: what holds on one alone is no headline
FIRST_TOKEN = "qwen2.5-vl-7b-16k"  # the most vision tokens
PREFILL = ("prefill_576.json", "prefill_2880.json")


def headline(results: Path) -> list[str]:
    """Lines of the table.

    Args:
        results: folder of the JSON files.
    """

    def read(name: str) -> dict[str, Any]:
        return json.loads((results / name).read_text())

    table = []
    if all((results / name).exists() for name in SETS):
        table = [_answers([read(name) for name in SETS], method, budget) for method, budget in ANSWERS]
    table.append(_prefill([read(name)["rows"] for name in PREFILL], "both 11%"))
    table.append(_first_token(read("stages.json")["rows"]))
    table.append(_small(read("small.json")["rows"]))
    return markdown(["measured on CPU, 2 cores", "crop", "beside it"], table)


def _answers(sets: list[dict[str, Any]], method: str, budget: float) -> list[str]:
    """Kept answers beside the best baseline, on each set."""
    kept, beside = [], []
    for content in sets:
        rows = {
            row["contender"]: row
            for row in content["rows"]
            if (row["budget"], row["counted"], row["group"]) == (budget, "average", OVERALL)
        }
        lead = next(row for row in content["leads"] if (row["contender"], row["budget"]) == (method, budget))
        kept.append(f"{100 * rows[method]['relative']:.1f}")
        points = f"({100 * lead['low']:+.1f} to {100 * lead['high']:+.1f} points)"
        beside.append(f"{lead['baseline']} {100 * rows[lead['baseline']]['relative']:.1f} % {points}")
        count = rows[method]["n"]
    tokens = round(budget * sets[0]["pictures"]["tokens"])
    what = f"{method.partition(',')[0]}, {tokens} of {sets[0]['pictures']['tokens']} vision tokens: score left"
    return [f"{what} (two sets of {count} questions)", f"{' and '.join(kept)} %", f"best baseline: {', '.join(beside)}"]


def _prefill(runs: list[list[dict[str, Any]]], contender: str) -> list[str]:
    found = [next(row for row in rows if row["contender"] == contender) for rows in runs]
    tokens = " and ".join(str(row["vision tokens"]) for row in found)
    faster = " and ".join(f"{row['speed-up']:.1f}" for row in found)
    fewer = " and ".join(f"{row['FLOP ratio']:.1f}" for row in found)
    what = f"{contender.replace(' ', ', ').replace('%', ' %')} of the vision tokens: prefill of a 300 M decoder, {tokens} tokens"
    return [what, f"{faster} times as fast", f"{fewer} times fewer FLOPs"]


def _first_token(rows: list[dict[str, Any]]) -> list[str]:
    """The whole first token, with and without the stage before the encoder."""
    seconds = {row["pruned"]: row["total"] for row in rows if row["model"] == FIRST_TOKEN}
    faster, behind = (seconds["unpruned"] / seconds[name] for name in ("all", "language model"))
    what = f"three stages, 11 %: whole first token of a narrow {FIRST_TOKEN}, localizer included"
    return [what, f"{faster:.1f} times as fast", f"{behind:.1f} times without the encoder's"]


def _small(rows: list[dict[str, Any]]) -> list[str]:
    """The model that pruning slows down most."""
    row = max(rows, key=lambda row: row["pruned"])
    what = f"both, 11 % of the vision tokens: prefill of a tiny decoder ({row['model']}, {row['tokens']} tokens)"
    beside = f"{row['unpruned ms']:.0f} ms unpruned; `crop.estimate` advised: {row['advice']}"
    return [what, f"{row['pruned']:.1f} times as slow", beside]
