"""How many answers stay right, under every method and baseline, at equal tokens and at equal time.

    python -m bench.accuracy --questions 300 --time 10                     # the embedded model
    python -m bench.accuracy --set 2                                       # on the second set of pictures
    accelerate launch --num_processes 8 -m bench.accuracy --checkpoint ID --data questions.jsonl --metric anls
    python -m bench.accuracy --receipts DIR --data receipts.jsonl          # convert, then ask
    python -m bench.accuracy --out DIR --summary                           # only count what is there

All rows are asked ``--rest`` questions; ours, with a predicted region, and the best three of every budget all of them. Results are appended to DIR/answers.<process>.jsonl batch by batch, and the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.accuracy import data, summary
from bench.accuracy.contenders import CUT, contenders, default_cut, jobs
from bench.accuracy.run import begin, grid_of, read, run, settings, shard
from bench.accuracy.timing import measure
from bench.common import machine
from bench.methods import OURS
from bench.pictures import BUDGETS, NUM_TOKENS, add_options, ask_model, first_seed
from crop import embedded
from crop.cli.ask import Asker, load
from crop.localizers import WholeLocalizer, localizer_names

WITHOUT = [f"{name}, no region" for name in OURS]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, "1")
    parser.add_argument(
        "--checkpoint", help="another model than the embedded one, a folder or a name on the hub; with --data"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", type=Path, help="questions as JSON lines; default: rendered pictures")
    parser.add_argument("--receipts", type=Path, help="folder of receipts to convert into --data first")
    parser.add_argument("--metric", choices=("exact", "anls", "relaxed"), default="exact", help="of --data")
    parser.add_argument("--questions", type=int, help="default: all of --data, 2400 about rendered pictures")
    parser.add_argument(
        "--rest", type=int, default=800, help="questions for all but ours and the best three of a budget"
    )
    parser.add_argument("--grounding", action=argparse.BooleanOptionalAction, default=True, help="ask for boxes, too")
    parser.add_argument("--localizer", choices=[n for n in localizer_names() if n != "box"],
                        help="default: the model's head, or attention where it has none")  # fmt: skip
    parser.add_argument(
        "--budgets", type=float, nargs="+", help="fractions of the tokens; default: 192, 128, 64 and 32 of 576"
    )
    parser.add_argument(
        "--cut", type=int, default=CUT, help="decoder layer at which the rows that only drop inside it do"
    )
    parser.add_argument("--kept", action="store_true", help="also rows that meet the budget after their last cut only")
    parser.add_argument("--contenders", nargs="+", help="only these rows")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, help="default: as the pictures need it")
    parser.add_argument("--time", type=int, default=0, help="rounds of the timing, 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of the journal; default: accuracy-SET")
    parser.add_argument("--json", type=Path, help="also write the summary here, with plots beside it")
    parser.add_argument("--summary", action="store_true", help="ask nothing, summarise what is there")
    options = parser.parse_args()
    if options.checkpoint and not options.data:
        parser.error("--checkpoint must come with --data: rendered pictures are for the model that knows them")
    if options.out is None:
        options.out = Path(f"accuracy-{options.set}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    budgets = tuple(options.budgets or BUDGETS)
    if not options.summary and not ask(options, budgets):
        return
    times_file = options.out / "times.json"
    timing = json.loads(times_file.read_text()) if times_file.exists() else {}
    times = timing.pop("jobs", {})
    answers = read(options.out)
    rows = summary.summarise(answers, times)
    show(rows, budgets)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        command = {name: str(value) for name, value in vars(options).items() if name not in ("json", "summary", "out")}
        content = {
            "machine": machine(),
            "command": command,
            "commits": sorted({row["commit"] for row in answers}),
            "pictures": {"first seed": first_seed(options), "tokens": NUM_TOKENS},
            "run": settings(options.out),
            "timing": timing,
            "rows": rows,
            "leads": summary.leads(answers, *sides(options.cut)),
            "leads in time": summary.leads(answers, *sides(options.cut), times) if times else [],
            "the region's part": summary.leads(answers, sides(options.cut)[0], WITHOUT),
        }
        options.json.write_text(lines(content))
        for axis in ("average", "time"):
            if axis == "average" or times:
                summary.plot(rows, summary.OVERALL, options.json.with_name(f"{options.json.stem}_{axis}.png"), axis)


def sides(cut: int) -> tuple[list[str], list[str]]:
    """Ours, with a region that was found, and what may be compared with it: nothing that knows the true region."""
    rows = contenders(cut)
    rivals = [row.name for row in rows if not row.ours and row.region in ("none", "predicted")]
    ours = [row.name for row in rows if row.ours and row.name.endswith("predicted")]
    return ours, [*rivals, "trio"]


def ask(options: argparse.Namespace, budgets: tuple[float, ...]) -> bool:
    """Everything that the folder does not hold yet; whether all processes are through."""
    index, count = shard()
    device = f"cuda:{index % torch.cuda.device_count()}" if options.device == "cuda" else options.device
    if options.checkpoint:
        asker = load(options.checkpoint, device, options.dtype)
    else:
        asker = ask_model(options.model, device, options.dtype)
    if options.receipts:
        data.convert_receipts(options.receipts, options.data)
    if options.data:
        items = list(islice(data.json_lines(options.data, options.metric), options.questions))
    else:
        items = list(islice(data.rendered(first_seed(options), grounding=options.grounding), options.questions or 2400))
    names = tuple(options.contenders) if options.contenders else None
    wanted = jobs(asker.num_layers, budgets, names, cut=options.cut, kept=options.kept, model=asker.model)
    if any(item.region is None for item in items):
        wanted = [job for job in wanted if job.contender.region not in ("oracle", "shifted")]
    if grid_of(asker.model) is None:  # what a picture is made smaller for, its processor decides
        wanted = [job for job in wanted if job.contender.prepare is None]
    finder, localizer = None, WholeLocalizer()
    if any(job.contender.region == "predicted" for job in wanted):
        finder = options.localizer or asker.default_localizer
        localizer = asker.localizer(finder)
    begin(options.out, facts(options, asker, finder, items))
    how = {"batch": options.batch, "max_new_tokens": options.max_new_tokens or embedded.LONGEST}
    # Several processes ask everything of everybody: none of them knows who will be best.
    some = items[: options.rest or None] if count == 1 and names is None else items
    run(asker, wanted, some, localizer, options.out, **how)
    last = wanted[-1]
    if len(some) < len(items):
        everybody = {item.key for item in some}
        rows = [row for row in read(options.out) if row["item"] in everybody]
        best = summary.finalists(rows, *sides(options.cut))
        run(asker, [job for job in wanted if job.key in best], items, localizer, options.out, **how)
        last = wanted[0]
    times_file = options.out / "times.json"
    if options.time and index == 0 and not times_file.exists():
        spread = items[:: max(1, len(items) // 7)]
        times = measure(asker, wanted, spread, localizer, rounds=options.time, max_new_tokens=how["max_new_tokens"])
        times_file.write_text(json.dumps({"machine": machine(), "rounds": options.time, "jobs": times}, indent=1))
    asked = len({row["item"] for row in read(options.out) if row["job"] == last.key})
    if asked < len(items):
        print(f"process {index} of {count} is done, {asked} of {len(items)} questions are; --summary counts them")
    return asked >= len(items)


def facts(
    options: argparse.Namespace, asker: Asker, localizer: str | None, items: Sequence[data.Item]
) -> dict[str, Any]:
    """What all answers of a folder have in common; ``localizer``: its name, None where no region is predicted."""
    model = options.checkpoint or digest((options.model or embedded.WEIGHTS) / "model.safetensors")
    picture = hashlib.sha256(items[0].picture().tobytes()).hexdigest()[:16]
    found = {
        "model": model,
        "cut": options.cut,
        "own cut": default_cut(asker.model),
        "first question": items[0].key,
        "first picture": picture,
    }
    if localizer is not None:
        found["localizer"] = localizer
        if asker.head is not None:
            found["head"] = digest(asker.head)
    return found


def digest(path: Path) -> str:
    """The first digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def lines(content: dict[str, Any]) -> str:
    """JSON with a line for each row of a table."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        else:
            text = json.dumps(value)
        parts.append(f"{json.dumps(name)}: {text}")
    return "{" + ",\n".join(parts) + "}\n"


def show(rows: list[dict], budgets: tuple[float, ...]) -> None:
    """Tables: per way of counting, all questions; then by group at the smallest budgets; then at equal time."""
    console = Console(width=160)
    groups = [summary.OVERALL, *sorted({row["group"] for row in rows} - {summary.OVERALL})]
    plain = {row["group"]: row for row in rows if row["contender"] == "unpruned"}
    for counted, title in (("average", "layer average"), ("kept", "after the last cut")):
        for group in groups if counted == "average" else groups[:1]:
            row = plain.get(group)  # what down-sampling gets wrong is another group at every budget
            of = f" ({row['score']:.3f}, n={row['n']})" if row else ""
            table = Table(title=f"{group}: % of the unpruned score{of}, vision tokens by {title}")
            table.add_column("contender")
            for budget in budgets:
                table.add_column(f"{budget:.1%}", justify="right")
            for name, cells in summary.grid(rows, group, counted, budgets).items():
                table.add_row(name, *(_cell(cells.get(budget)) for budget in budgets))
            console.print(table)
    if any(row["time"] for row in rows):
        shares = summary.SHARES
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
