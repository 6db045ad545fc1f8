"""How many answers stay right, under every method and baseline, at equal tokens and at equal time.

    python -m bench.accuracy --scenes 60 --time 10                         # the embedded model
    accelerate launch --num_processes 8 -m bench.accuracy --model ID --data questions.jsonl --metric anls
    python -m bench.accuracy --receipts DIR --data receipts.jsonl          # convert, then ask
    python -m bench.accuracy --out DIR --summary                           # only count what is there

Results are appended to DIR/answers.<process>.jsonl batch by batch, and the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.accuracy import data, summary
from bench.accuracy.contenders import BUDGETS, contenders, jobs
from bench.accuracy.run import read, run, shard
from bench.accuracy.timing import measure
from bench.common import machine
from crop.cli.ask import EMBEDDED, load
from crop.localizers import localizer_names
from crop.models import family_of


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=EMBEDDED, help="embedded, a folder or a name on the hub")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", type=Path, help="questions as JSON lines; default: rendered pictures")
    parser.add_argument("--receipts", type=Path, help="folder of receipts to convert into --data first")
    parser.add_argument("--metric", choices=("exact", "anls", "relaxed"), default="exact", help="of --data")
    parser.add_argument("--limit", type=int, help="first questions of --data only")
    parser.add_argument("--scenes", type=int, default=60, help="rendered pictures, about five questions each")
    parser.add_argument("--grounding", action=argparse.BooleanOptionalAction, default=False, help="ask for boxes, too")
    parser.add_argument("--first", type=int, default=10_900_000, help="seed of the first picture")
    parser.add_argument("--localizer", choices=[n for n in localizer_names() if n != "box"], default="attention")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--contenders", nargs="+", help="only these rows")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=5)
    parser.add_argument("--time", type=int, default=0, help="rounds of the timing, 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("accuracy-run"), help="folder of the journal")
    parser.add_argument("--json", type=Path, help="also write the summary here, with plots beside it")
    parser.add_argument("--summary", action="store_true", help="ask nothing, summarise what is there")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    times_file = options.out / "times.json"
    if options.receipts:
        data.convert_receipts(options.receipts, options.data)
    if not options.summary:
        index, count = shard()
        device = f"cuda:{index % torch.cuda.device_count()}" if options.device == "cuda" else options.device
        asker = load(options.model, device, options.dtype)
        if options.data:
            items = list(data.json_lines(options.data, options.metric))[: options.limit]
        else:
            items = list(data.rendered(options.first, options.scenes, grounding=options.grounding))
        depth = len(family_of(asker.model).language_model(asker.model).layers)
        names = tuple(options.contenders) if options.contenders else None
        wanted = jobs(depth, tuple(options.budgets), names)
        if any(item.region is None for item in items):
            wanted = [job for job in wanted if job.contender.region != "oracle"]
        localizer = asker.localizer(options.localizer)
        run(asker, wanted, items, localizer, options.out, batch=options.batch, max_new_tokens=options.max_new_tokens)
        if options.time and index == 0 and not times_file.exists():
            some = items[:: max(1, len(items) // 7)]
            times = measure(asker, wanted, some, localizer, rounds=options.time, max_new_tokens=options.max_new_tokens)
            times_file.write_text(json.dumps({"machine": machine(), "jobs": times}, indent=1))
        asked = len({row["item"] for row in read(options.out) if row["job"] == wanted[-1].key})
        if asked < len(items):
            print(f"process {index} of {count} is done, {asked} of {len(items)} questions are; --summary counts them")
            return
    times = json.loads(times_file.read_text())["jobs"] if times_file.exists() else {}
    answers = read(options.out)
    rows = summary.summarise(answers, times)
    show(rows, tuple(options.budgets))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        command = {name: str(value) for name, value in vars(options).items() if name not in ("json", "summary", "out")}
        commits = sorted({row["commit"] for row in answers})
        rivals = [row.name for row in contenders() if not row.ours]
        ours = [row.name for row in contenders() if row.ours and row.name.endswith("predicted")]
        content = {"machine": machine(), "command": command, "commits": commits, "rows": rows}
        content["leads"] = summary.leads(answers, ours, rivals)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
        for axis in ("average", "time"):
            if axis == "average" or times:
                summary.plot(rows, summary.OVERALL, options.json.with_name(f"{options.json.stem}_{axis}.png"), axis)


def show(rows: list[dict], budgets: tuple[float, ...]) -> None:
    """Tables: per way of counting, all questions; then by group at the smallest budgets; then at equal time."""
    console = Console(width=160)
    groups = [summary.OVERALL, *sorted({row["group"] for row in rows} - {summary.OVERALL})]
    plain = {row["group"]: row for row in rows if row["contender"] == "unpruned"}
    for counted, title in (("average", "layer average"), ("kept", "after the last cut")):
        for group in groups if counted == "average" else groups[:1]:
            n, score = plain[group]["n"], plain[group]["score"]
            table = Table(title=f"{group}: % of the unpruned score ({score:.3f}, n={n}), vision tokens by {title}")
            table.add_column("contender")
            for budget in budgets:
                table.add_column(f"{budget:.1%}", justify="right")
            for name, cells in summary.grid(rows, group, counted, budgets).items():
                table.add_row(name, *(_cell(cells.get(budget)) for budget in budgets))
            console.print(table)
    if any(row["time"] for row in rows):
        shares = (1.0, 0.9, 0.8, 0.7, 0.6)
        table = Table(title="best % of the unpruned score within a share of the unpruned time")
        table.add_column("contender")
        for share in shares:
            table.add_column(f"{share:.0%}", justify="right")
        for row in summary.at_time(rows, summary.OVERALL, shares):
            cells = (row[f"{share:g}"] for share in shares)
            table.add_row(row["contender"], *("-" if cell is None else f"{100 * cell:.1f}" for cell in cells))
        console.print(table)


def _cell(row: dict | None) -> str:
    if row is None or row["relative"] is None:
        return "-"
    return f"{100 * row['relative']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f})"


if __name__ == "__main__":
    main()
