"""The CUDA kernels against their floors and against peers.

    python -m bench.kernels.cuda [--only select ...] [--json bench/results/kernels.json]

Times are medians in microseconds of CUDA-graph replay (one call after another in one graph, L2 warm; or each call after
256 MiB have been read, which empties L2, the time of that taken off: cold) and of eager calls. The floor of a row is what the
hardware cannot beat: bytes over the copy bandwidth measured in the same run, or products and exponentials over the rates of
an H100 (assumed: 798 TFLOP/s, 3.9 T/s). Every contender is checked against the same operation in float64 or against
the definition before it is timed; a wrong one is listed as wrong, one that is off by rounding (logits in bfloat16: up to 5 %) is ranked
with its error, an absent one reads not installed. Losing rows stay; where crop itself is wrong or fails, the run ends with an
error, after the other rows.

Without a GPU the contenders are checked on small shapes on the CPU, and every time reads "not measured".
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.common import header, save, table
from bench.kernels.peers import peers_of
from bench.kernels.torch_forms import ROUGH, forms_of, in_order
from crop.selftest.cases import CASES, Case
from crop.selftest.timing import copy_bandwidth, graph_times

MMA, EXP = 798e12, 3.9e12  # of an H100, per second
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@dataclass(frozen=True)
class Goals:
    """What a row should reach: graph replay at most so many microseconds or floors, so many times as fast as a peer."""

    most_us: float | None = None
    most_floors: float | None = None
    least: dict[str, float] = field(default_factory=dict)


def goals(case: Case) -> Goals:
    """The goals of a case, on an H100."""
    size = case.size
    if case.op == "score + select + compact":
        few = size["batch"] == 1 and size["tokens"] <= 4096 and size["rows"] <= 64
        return Goals(12.0 if few else None, 1.4)
    if case.op == "attention_mass, lse given":
        return Goals(least={"torch rows": 5.0, "flash_colreduce": 1.5, "keys_values": 1.5})
    if case.op == "select":
        return Goals(5.0 if size == {"batch": 1, "tokens": 8192} else None, least={"torch.topk + sort": 2.0})
    if case.op == "compact":
        return Goals(least={"index_select each": 1.0 if size["tensors"] < 3 else 1.01})
    if case.op.startswith("adaptive_pool"):
        few, large = (size["side"], size["images"]) == (24, 1), case.bytes >= 100e6
        least = {} if "gradient" in case.op else {"embedding_bag": 1.5, "crops + avg_pool2d + cat": 5.0}
        return Goals(5.0 if few else None, 1 / 0.85 if large else None, least)
    return Goals()


def floor_us(case: Case, bandwidth: float) -> float:
    """Microseconds that the hardware cannot beat."""
    return max(case.bytes / bandwidth, case.flop / MMA, case.exps / EXP) * 1e6


def measure(case: Case, rounds: int, rate: float | None) -> list[dict[str, Any]]:
    """Check and time crop and its peers: one row each."""
    rows, floor = [], floor_us(case, rate) if rate else None
    timed: dict[str, float] = {}
    for name, call in {"crop": case.crop, **forms_of(case), **peers_of(case)}.items():
        row: dict[str, Any] = {
            "op": case.op,
            "shape": case.shape,
            "contender": name,
            "MB": case.bytes / 1e6,
            "floor us": floor,
        }
        row |= {
            "graph warm us": "not measured",
            "graph cold us": "not measured",
            "eager us": "not measured",
            "note": "",
        }
        rows.append(row)
        if isinstance(call, str):
            row["note"] = "not installed"
            continue
        try:
            error = case.error(in_order(case, call()))
        except Exception as reason:
            row["note"] = f"fails: {type(reason).__name__}: {str(reason).splitlines()[0][:80] if str(reason) else ''}"
            continue
        if not error <= (0 if name == "crop" else ROUGH.get(case.op, 0)):  # NaN is wrong, too
            row["note"] = f"wrong: error {error:.3g}"
            continue
        row["note"] = f"error {error:.3g}" if error else ""
        if rate is None:
            row["note"] = ", ".join(filter(None, ["checked on a small shape", row["note"]]))
            continue
        result = graph_times(call, rounds, DEVICE)
        row |= {"graph warm us": result["warm"], "graph cold us": result["cold"], "eager us": result["eager"]}
        timed[name] = result["warm"] or result["eager"] or 0.0
        if floor and result["cold"]:
            row["x floor, cold"] = result["cold"] / floor
    if "crop" in timed:
        rows[0]["note"] = verdict(case, timed, floor or 0.0)
    return rows


def verdict(case: Case, timed: dict[str, float], floor: float) -> str:
    """Which goals the row has met."""
    goal, mine, words = goals(case), timed["crop"], []
    if goal.most_us:
        words.append(f"{'met' if mine <= goal.most_us else 'NOT MET'}: at most {goal.most_us:g} us")
    if goal.most_floors and (floor >= 60 or "pool" in case.op):
        words.append(
            f"{'met' if mine <= goal.most_floors * floor else 'NOT MET'}: at most {goal.most_floors:.3g} floors"
        )
    for peer, least in goal.least.items():
        if peer in timed:
            ratio = timed[peer] / mine
            words.append(f"{'met' if ratio >= least else 'NOT MET'}: {ratio:.2f} x {peer}, goal {least:g}")
    return "; ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--time", type=float, help="begin no case after so many seconds; ends with 124 if some are missing"
    )
    parser.add_argument("--json", type=Path, help="also write the rows here after every case")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(header())
    rate = copy_bandwidth(DEVICE) if GPU else None
    print(f"{'copy:':14}{f'{rate / 1e12:.2f} TB/s' if rate else 'not measured, no GPU'}\n")
    rows: list[dict[str, Any]] = []
    start, complete = time.monotonic(), True
    with torch.no_grad():
        for name in args.only:
            for case in CASES[name](DEVICE, GPU):
                if args.time and time.monotonic() - start > args.time:
                    print(f"out of time at {case.op} {case.shape}")
                    complete = False
                    break
                rows += [{**row, "x floor, cold": row.get("x floor, cold")} for row in measure(case, args.rounds, rate)]
                if args.json and GPU:
                    save(args.json, rows)  # what is measured stays, whatever comes
    print(table(rows))
    if args.json:
        save(args.json, rows)
    bad = [row for row in rows if row["contender"] == "crop" and row["note"].startswith(("wrong", "fails"))]
    if bad:
        raise SystemExit("\n".join(f"{row['op']} {row['shape']}: crop {row['note']}" for row in bad))
    if not complete:
        raise SystemExit(124)


if __name__ == "__main__":
    main()
