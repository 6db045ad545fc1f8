"""The CUDA kernels against their floors and against peers.

    python bench/bench_kernels.py [--only select ...] [--json bench/results/kernels.json]

Times are medians in microseconds of CUDA-graph replay (one call after another in one graph, L2 warm; or each call after a
write of 256 MiB that empties L2, the write's own time taken off: cold) and of eager calls. The floor of a row is what the
hardware cannot beat: bytes over the copy bandwidth measured in the same run, or products and exponentials over the rates of
an H100 (assumed: 798 TFLOP/s, 3.9 T/s). Every contender is checked against the same operation in float64 or against
the definition before it is timed; a wrong one is listed as wrong, one that is off by rounding (logits in bfloat16: up to 5 %) is ranked
with its error, an absent one reads not installed. Losing rows stay; where crop itself is wrong or fails, the run ends with an
error, after the other rows.

Without a GPU the contenders are checked on small shapes on the CPU, and every time reads "not measured".
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import header, save, table
from kernel_cases import CASES, DEVICE, GPU, Case
from peers import Call

FLUSH = 256 << 20


def event_us(call: Call, rounds: int) -> float:
    """Median time of a call on the device."""
    times = []
    for turn in range(rounds + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)


def graph(call: Call, repeat: int) -> Call:
    """A CUDA graph of so many calls; the call has run before."""
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(repeat):
            call()
    return captured.replay


def bandwidth() -> float:
    """Bytes per second of a copy inside the device's memory, read and write."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (event_us(lambda: target.copy_(source), 20) * 1e-6)


def times_of(call: Call, rounds: int) -> dict[str, float | None]:
    """Microseconds of a call: graph replay warm and cold, eager."""
    for _ in range(3):
        call()
    repeat = min(20, max(1, int(2000 / event_us(call, 3))))  # two milliseconds of them
    eager = event_us(lambda: [call() for _ in range(repeat)], rounds) / repeat
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=DEVICE)

    def flushed() -> None:
        flush.zero_()
        call()

    try:
        warm = event_us(graph(call, repeat), rounds) / repeat
        empty, cold = graph(flush.zero_, 5), graph(flushed, 5)
    except RuntimeError:  # it synchronises or allocates in a way that no graph may
        torch.cuda.synchronize()
        return {"warm": None, "cold": None, "eager": eager}
    return {"warm": warm, "cold": max(event_us(cold, rounds) - event_us(empty, rounds), 0.0) / 5, "eager": eager}


def measure(case: Case, rounds: int, rate: float | None) -> list[dict[str, Any]]:
    """Check and time crop and its peers: one row each."""
    rows, floor = [], case.floor(rate) if rate else None
    timed: dict[str, float] = {}
    for name, call in {"crop": case.crop, **case.peers}.items():
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
            error = case.wrong(call())
        except Exception as reason:
            row["note"] = f"fails: {type(reason).__name__}: {str(reason).splitlines()[0][:80] if str(reason) else ''}"
            continue
        if error > (0 if name == "crop" else case.rough):
            row["note"] = f"wrong: error {error:.3g}"
            continue
        row["note"] = f"error {error:.3g}" if error else ""
        if rate is None:
            row["note"] = ", ".join(filter(None, ["checked on a small shape", row["note"]]))
            continue
        result = times_of(call, rounds)
        row |= {"graph warm us": result["warm"], "graph cold us": result["cold"], "eager us": result["eager"]}
        timed[name] = result["warm"] or result["eager"] or 0.0
        if floor and result["cold"]:
            row["x floor, cold"] = result["cold"] / floor
    if "crop" in timed:
        rows[0]["note"] = verdict(case, timed, floor or 0.0)
    return rows


def verdict(case: Case, timed: dict[str, float], floor: float) -> str:
    """Which bars the row has met."""
    mine, words = timed["crop"], []
    if case.most_us:
        words.append(f"{'met' if mine <= case.most_us else 'NOT MET'}: at most {case.most_us:g} us")
    if case.most_floors and (floor >= 60 or "pool" in case.op):
        words.append(
            f"{'met' if mine <= case.most_floors * floor else 'NOT MET'}: at most {case.most_floors:.3g} floors"
        )
    for peer, least in case.least.items():
        if peer in timed:
            ratio = timed[peer] / mine
            words.append(f"{'met' if ratio >= least else 'NOT MET'}: {ratio:.2f} x {peer}, bar {least:g}")
    return "; ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--time", type=float, help="begin no case after so many seconds; ends with 124 if some are missing"
    )
    parser.add_argument("--json", type=Path, help="also write the table here after every case, and as text beside it")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(header())
    rate = bandwidth() if GPU else None
    print(f"{'copy:':14}{f'{rate / 1e12:.2f} TB/s' if rate else 'not measured, no GPU'}\n")
    rows: list[dict[str, Any]] = []
    start, complete = time.monotonic(), True
    with torch.no_grad():
        for name in args.only:
            for case in CASES[name]():
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
