"""What the embedded model makes of real receipts, which it has never seen: its own questions, photographed pages.

    python -m bench.accuracy.real --json bench/results/real.json     # CROP_DATA holds receipts/

Asked for shop, date and total, in the words that the model knows. Three views: the whole page squeezed to the model's square, the
page with its shape kept, and the part with the answer at a size of letters that the model knows. An answer is compared in capitals,
digits and full stops, which is all that it writes; of a date, day and month ("25.12"). A shop can hardly be right as a whole: most
names are longer than the twelve characters of an answer, and hold letters that the model's pictures never show. "others'" scores
the same answers against the same field of another page: what a guess is worth. "characters" is one minus the edit distance over
the longer text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from bench import jsonl
from bench.accuracy.asking import Reply, answers, begin, option_parser
from bench.accuracy.data import Item
from bench.accuracy.metrics import Box, edit_distance
from bench.common import data_folder
from crop.cli.images import open_image
from crop.geometry.region import Region
from crop.methods import DiverseCompression, Method

QUESTIONS = {"company": "what is the shop", "date": "what is the date", "total amount": "what is the total"}
LETTERS = 22  # pixels per line of text in the part with the answer, of 384
View = tuple[Image.Image, Region]  # the picture that is asked about, and where its answer is


def squeezed(image: Image.Image, box: Box, side: int) -> View:
    """The page as the processor makes it a square."""
    return image, Region.from_pixels(box, image.size)


def shaped(image: Image.Image, box: Box, side: int) -> View:
    """The page on a square as long as its longer side."""
    longer = max(image.size)
    canvas = Image.new("RGB", (longer, longer), (200, 200, 200))
    canvas.paste(image)
    return canvas, Region.from_pixels(box, canvas.size)


def near(image: Image.Image, box: Box, side: int) -> View:
    """A square part of the page around the answer, in which a line of it is ``LETTERS`` pixels of 384 high, or smaller if it is long."""
    x0, y0, x1, y1 = box
    part = max(384 * (y1 - y0) / LETTERS, 1.1 * (x1 - x0))
    left, top = (x0 + x1 - part) / 2, (y0 + y1 - part) / 2
    canvas = image.transform((side, side), Image.Transform.EXTENT, (left, top, left + part, top + part),
                             Image.Resampling.BICUBIC, fillcolor=(200, 200, 200))  # fmt: skip
    inside = [(value - start) / part for value, start in zip(box, (left, top, left, top), strict=True)]
    return canvas, Region((tuple(inside),))


VIEWS: dict[str, Callable[[Image.Image, Box, int], View]] = {
    "whole page": squeezed,
    "whole page, its shape kept": shaped,
    "part with the answer": near,
}


def spoken(text: str) -> str:
    """What is left of a text in the model's letters."""
    return re.sub(r"[^A-Z0-9.]", "", text.upper())


def wanted(field: str, text: str) -> str:
    """What the model would have to say."""
    if field == "date" and (found := re.match(r"\D*(\d{1,2})[/.\-](\d{1,2})\b", text)):
        return ".".join(part.zfill(2) for part in found.groups())
    return spoken(text)


def alike(one: str, other: str) -> float:
    """1 for equal texts, 0 for texts that share nothing."""
    return 1 - edit_distance(one, other) / max(len(one), len(other), 1)


def questions(folder: Path, view: str, side: int) -> Iterator[Item]:
    """The questions of the receipts that the model knows, each about its own picture."""
    for row in jsonl.rows(folder / "questions.jsonl"):
        fields = row.fields
        if fields["field"] not in QUESTIONS:
            continue
        path = folder / "images" / Path(fields["image"]).name
        show = partial(_view, view, path, tuple(fields["box"]), side)
        yield Item(
            key=f"{path.name} {fields['field']}", image=path.name, question=QUESTIONS[fields["field"]],
            answers=(wanted(fields["field"], fields["answer"]),), group=fields["field"], metric="verbatim",
            region=show()[1], picture=lambda show=show: show()[0],
        )  # fmt: skip


def _view(view: str, path: Path, box: Box, side: int) -> View:
    return VIEWS[view](open_image(path), box, side)


def figures(items: list[Item], replies: list[Reply]) -> Iterator[dict[str, Any]]:
    """One row per field, and one for all."""
    fields: dict[str, list[tuple[float, float, float]]] = {}
    for field in dict.fromkeys(item.group for item in items):
        pairs = [
            (spoken(reply.text), item.answers[0])
            for item, reply in zip(items, replies, strict=True)
            if item.group == field
        ]
        truths = [truth for _, truth in pairs]
        fields[field] = [
            (float(said == truth), alike(said, truth), alike(said, other))
            for (said, truth), other in zip(pairs, [*truths[1:], *truths[:1]], strict=True)
        ]
    for field, scores in (*fields.items(), ("all", [score for of in fields.values() for score in of])):
        yield {
            "field": field,
            "n": len(scores),
            **dict(zip(("exact", "characters", "others'"), map(mean, zip(*scores, strict=True)), strict=True)),
        }


def main() -> None:
    parser = option_parser("real", __doc__, questions=300)
    parser.add_argument("--budgets", type=float, nargs="+", default=(0.2222, 0.1111))
    options = parser.parse_args()
    run = begin(options)
    side = run.asker.model.config.vision_config.image_size
    methods: dict[str, Method | None] = {"unpruned": None}
    methods |= {f"diverse, {budget:.0%}, true region": DiverseCompression(budget) for budget in options.budgets}
    rows = []
    for view in VIEWS:
        items = list(islice(questions(data_folder() / "receipts", view, side), options.questions))
        for name, method in run.bar(list(methods.items()), view):
            replies = answers(run, items, method, [item.region for item in items])
            rows += [{"view": view, "pruned": name, **row} for row in figures(items, replies)]
    run.finish(rows, {})


if __name__ == "__main__":
    main()
