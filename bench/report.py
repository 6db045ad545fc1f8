"""A page to look at answers: of a run of ``bench.accuracy``, or of questions asked now with pictures of what was seen.

python -m bench.report page.html --run accuracy-1                 # what the run's journal holds
python -m bench.report page.html --questions 60 --budget 0.11                 # ask now
python -m bench.report page.html --data questions.jsonl --model ID         # a folder of questions
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from bench.accuracy import data
from bench.accuracy.contenders import Job, jobs
from bench.accuracy.data import Item
from bench.accuracy.run import read, region_of, seen
from bench.page import Card, Reply, write_report
from bench.pictures import add_options, ask_model, first_seed
from crop import embedded
from crop.cli.ask import Asker
from crop.cli.visualize import outlined, overlay
from crop.geometry.region import Region
from crop.localizers import BoxLocalizer, Localizer

RIGHT = 0.5  # score from which an answer counts as right


def truth(item: Item) -> str:
    """What would have been right."""
    return " / ".join(item.answers) or f"box {', '.join(f'{side:.3f}' for side in item.box)}"


def from_journal(rows: Sequence[dict], items: Sequence[Item]) -> Iterator[Card]:
    """Cards of the questions that a run has answered, with the region it predicted."""
    answers: dict[str, list[dict]] = defaultdict(list)
    regions: dict[str, Region] = {}
    for row in rows:
        if row["job"] == "region":
            regions[row["item"]] = Region(tuple(map(tuple, row["boxes"])), row["confidence"])
        else:
            answers[row["item"]].append(row)
    for item in items:
        if item.key not in answers:
            continue
        found = sorted(answers[item.key], key=lambda row: not row["job"].startswith("unpruned"))
        replies = []
        for row in found:
            name, budget, counted = row["job"].split("|")
            label = f"{name}, {float(budget):.1%} {counted}" if counted else name
            replies.append(Reply(label, row["answer"], row["score"] >= RIGHT, f"{row['average']:.0f} tokens"))
        region = regions.get(item.key, Region.whole())
        yield Card(f"{item.question}?", truth(item), item.group, outlined(item.picture(), region), replies)


@torch.no_grad()
def from_model(
    asker: Asker, items: Sequence[Item], wanted: Sequence[Job], localizer: Localizer, max_new_tokens: int
) -> Iterator[Card]:
    """Cards of questions asked now, with what every contender got to see."""
    for item in tqdm(items, "asking", disable=None):
        image, replies, region = item.picture(), [], Region.whole()
        for job in wanted:
            predicted = job.contender.region == "predicted"
            given = region_of(job, item, {item.key: localizer(image, item.question)} if predicted else {})
            shown = seen(asker, job, item, given)
            answer = asker.ask(
                shown,
                item.question,
                method=job.method,
                localizer=BoxLocalizer(given),
                max_new_tokens=max_new_tokens,
            )
            region = given if predicted else region
            pruned = job.method is not None
            replies.append(
                Reply(
                    job.contender.name,
                    answer.text,
                    item.score(answer.text) >= RIGHT,
                    f"{answer.tokens.layer_average:.0f} tokens on average",
                    overlay(shown, *answer.images[0].drawing, legend=False) if pruned else None,
                )
            )
        yield Card(f"{item.question}?", truth(item), item.group, outlined(image, region), replies)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, help="HTML file to write")
    parser.add_argument("--run", type=Path, help="folder of a run's journal; default: ask now")
    parser.add_argument("--data", type=Path, help="questions as JSON lines; default: rendered pictures")
    parser.add_argument("--metric", choices=("exact", "anls", "relaxed"), default="exact", help="of --data")
    parser.add_argument("--questions", type=int, default=60, help="about rendered pictures")
    parser.add_argument("--grounding", action=argparse.BooleanOptionalAction, default=True, help="ask for boxes, too")
    parser.add_argument("--localizer", help="default: the model's head, or attention where it has none")
    parser.add_argument("--contenders", nargs="+", default=["both, predicted", "uniform"])
    parser.add_argument("--budget", type=float, default=0.11, help="layer average")
    parser.add_argument("--max-new-tokens", type=int, help="default: as the pictures need it")
    add_options(parser, "1")
    options = parser.parse_args()
    if options.data:
        items = list(data.json_lines(options.data, options.metric))
    else:
        items = list(islice(data.rendered(first_seed(options), grounding=options.grounding), options.questions))
    if options.run:
        cards, note = from_journal(read(options.run), items), f"run in {options.run.name}"
    else:
        asker = ask_model(options.model, "cuda" if torch.cuda.is_available() else "cpu", "auto")
        wanted = jobs(asker.num_layers, (options.budget,), tuple(options.contenders))
        localizer = asker.localizer(options.localizer or asker.default_localizer)
        cards = from_model(asker, items, wanted, localizer, options.max_new_tokens or embedded.LONGEST)
        note = f"{options.model or 'embedded'}, {options.budget:.1%} of the vision tokens on average over the layers"
    print(f"{write_report(options.page, 'Answers', cards, note)} questions in {options.page}")


if __name__ == "__main__":
    main()
