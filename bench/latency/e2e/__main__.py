"""Latency and memory of whole models: split, peak, against the unpatched model and FastV in the same run.

    python -m bench.latency.e2e                                                    # smoke test on CPU, the default set on a GPU
    python -m bench.latency.e2e --geometry llava-next-7b --batch 1 8 --keep 0.33 0.22 0.11 --json out.json

Models are unmodified Hugging Face classes of the published sizes with random weights, bfloat16 on a GPU; on CPU float32
and narrower and shallower (--reduce). Each row is a model, a batch and a budget. Keep-all is to give
the unpatched output bit for bit, and every token count is to be the one asked for: where not, the row says so, and the run ends
with an error after the last one. Ours is timed with the localizer in
front, on regions of real questions. With --json, rows go to a file beside it one by one (.jsonl), and the JSON is written
anew after each: a killed run loses at most one row, the same command goes on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.common import header, machine
from bench.latency.e2e.compiled import MODES, compile_layers
from bench.latency.e2e.geometries import GEOMETRIES, Shrink
from bench.latency.e2e.measure import NO_ROOM, measure
from bench.latency.e2e.report import row_title, text
from bench.latency.e2e.workload import Model, make, regions_source

# (geometry, batch), the most telling first: a run that is short of time ends with what it has.
SMOKE = [
    ("llava-1.5-7b", 1), ("llava-next-7b", 1), ("qwen2.5-vl-7b-1k", 1), ("qwen3-vl-8b", 1), ("internvl3-8b", 1),
    ("llava-1.5-7b", 8),
]  # fmt: skip
FULL = [
    ("llava-next-7b", 1), ("llava-next-7b", 8), ("llava-1.5-7b", 1), ("llava-1.5-7b", 8), ("llava-1.5-7b", 32),
    ("qwen2.5-vl-7b-4k", 1),
]  # fmt: skip
LAST = [("qwen2.5-vl-7b-16k", 1)]  # after all others: its windows alone take a minute a row

Job = tuple[str, int, float]


def jobs(chosen: Sequence[tuple[str, int]], keeps: Sequence[float], last: Sequence[tuple[str, int]] = ()) -> list[Job]:
    """(geometry, batch, keep), smallest budgets first, models in one piece within a budget; then ``last`` likewise."""
    return [(geometry, batch, keep) for part in (chosen, last) for keep in sorted(keeps) for geometry, batch in part]


def settings(options: argparse.Namespace, facts: dict[str, str]) -> dict[str, Any]:
    """What rows must agree in to stand in one table."""
    return {
        "full": options.reduce == [1, 1],
        "reduce": options.reduce,
        "device": facts.get("gpu", "cuda") if options.device.startswith("cuda") else "cpu",
        "dtype": str(options.dtype).removeprefix("torch."),
        "localizer": options.localizer,
        "compiled": options.compiled,
        "rounds": options.rounds,
        "regions": regions_source(),
        "commit": facts["commit"],
    }


def measured(path: Path | None, same: dict[str, Any]) -> dict[Job, dict[str, Any]]:
    """Rows of an earlier, killed run of the same settings; the last line may be half written."""
    found = {}
    if path is not None and path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if all(row.get(name) == value for name, value in same.items()):
                found[row["geometry"], row["batch"], row["keep"]] = row
    return found


def run(todo: Sequence[Job], same: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row after another; a model is kept for as long as rows ask for it."""
    started = time.perf_counter()
    for geometry, group in itertools.groupby(tqdm(todo, unit="row", disable=None), key=lambda job: job[0]):
        model, compiled = None, False
        for _, batch, keep in group:
            row = same | {"geometry": geometry, "tokens": GEOMETRIES[geometry].tokens, "batch": batch, "keep": keep}
            if options.time is not None and time.perf_counter() - started > options.time:
                yield row | {"reason": f"not run: the {options.time:g} s of --time were over", "again": True}
                continue
            try:
                model = model or Model.build(
                    GEOMETRIES[geometry], Shrink(*options.reduce), options.device, options.dtype
                )
                if options.compiled and not compiled:
                    compile_layers(model, options.compiled)
                compiled = bool(options.compiled)
                work = make(model, batch)
                yield row | measure(
                    work, keep, options.localizer, rounds=options.rounds, seconds=options.row_seconds,
                    decode=options.decode, twins=options.twins,
                    compiled=compiled,
                )  # fmt: skip
            except NO_ROOM as error:
                yield row | {"reason": f"does not fit: {str(error).splitlines()[0]}"}
            except RuntimeError as error:  # the rows to come must not pay for it; main ends with an error
                yield row | {"reason": f"FAILED: {str(error).splitlines()[0]}", "again": True, "failed": True}
            work = None
            gc.collect()
        del model
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, defaults filled in for the device."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency.e2e", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, help="default: a few, see above")
    parser.add_argument("--batch", type=int, nargs="+", help="of every --geometry (default 1)")
    parser.add_argument("--keep", type=float, nargs="+", help="fractions (GPU: 0.33 0.22 0.11, CPU: 0.11)")
    parser.add_argument("--localizer", choices=("attention", "head", "none"), default="attention")
    parser.add_argument(
        "--reduce", type=int, nargs=2, metavar=("WIDTH", "DEPTH"), help="divisors (GPU: 1 1, CPU: 16 4)"
    )
    parser.add_argument("--rounds", type=int, help="timed rounds (GPU: 5, CPU: 3)")
    parser.add_argument("--row-seconds", type=float, default=10, help="fewer rounds, down to 2, where a row is slow")
    parser.add_argument("--decode", type=int, default=4, help="tokens after the first")
    parser.add_argument("--no-twins", dest="twins", action="store_false", help="leave out ours without kernels")
    parser.add_argument("--compiled", choices=MODES, help="also unpatched and both with compiled layers, or as graphs")
    parser.add_argument("--time", type=float, help="begin no row after so many seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write JSON here, and go on where a run ended")
    options = parser.parse_args(arguments)
    if options.batch and not options.geometry:
        parser.error("--batch needs --geometry")
    gpu = options.device.startswith("cuda")
    if options.compiled == "graphs" and not gpu:
        parser.error(f"--compiled graphs needs a CUDA device, got {options.device}; use --compiled layers")
    options.dtype = torch.bfloat16 if gpu else torch.float32
    options.reduce = options.reduce or ([1, 1] if gpu else [16, 4])
    options.keep = options.keep or ([0.33, 0.22, 0.11] if gpu else [0.11])
    options.rounds = options.rounds or (5 if gpu else 3)
    options.chosen, options.last = (FULL, LAST) if gpu else (SMOKE, [])
    if options.geometry:
        options.chosen, options.last = list(itertools.product(options.geometry, options.batch or [1])), []
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    facts = machine()
    print(header(), flush=True)
    same, log = settings(options, facts), options.json and options.json.with_suffix(".jsonl")
    found, order = measured(log, same), jobs(options.chosen, options.keep, options.last)
    rows: list[dict[str, Any]] = [found[job] for job in order if job in found]
    for row in run([job for job in order if job not in found], same, options):
        found[row["geometry"], row["batch"], row["keep"]] = row
        rows = [found[job] for job in order if job in found]
        if log and not row.get("again"):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(f"\n{json.dumps(row)}")  # a line that was cut off stays apart
        elif "reason" in row:
            tqdm.write(f"{row_title(row)}: {row['reason']}", file=sys.stderr)
        if options.json:
            save(options.json, facts, rows)
    print(f"\n{text(rows)}")
    if options.json:
        save(options.json, facts, rows)
        if log.exists() and not any(row.get("again") for row in rows):
            log.unlink()  # all of it is in the JSON; the next run measures anew
    bad = [f"{row_title(row)}: {row['reason']}" for row in rows if row.get("failed")]
    bad += [f"{row_title(row)}: {problem}" for row in rows for problem in row.get("problems", ())]
    if bad:
        raise SystemExit("\n".join(bad))


def save(path: Path, facts: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """Rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
