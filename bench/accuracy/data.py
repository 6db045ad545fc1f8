"""Questions to ask: held-out rendered pictures, or any data set as JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from PIL import Image

from bench import jsonl
from bench.accuracy.metrics import TEXT_METRICS, Box, iou, parse_box
from bench.pictures import GROUNDING, GROUPS, TEXT, blocks, draw
from crop.cli.images import open_image, upright_size
from crop.embedded.scenes import Question
from crop.geometry.region import Region


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        key: unique in its set and the same in every run. image: of the picture, the same for all its questions.
        question, answers: text; any of the answers is right. Empty answers: a grounding question.
        group: kind of question, a row of the table.
        metric: what ``score`` reports: "verbatim", "exact", "anls", "relaxed" or "iou".
        region: where the answer can be seen, or None where nobody knows.
        picture: loads the image, RGB.
        box: the truth of a grounding question, normalised, in what the model is asked to say.
        read_box: answer -> box.
    """

    key: str
    image: str
    question: str
    answers: tuple[str, ...]
    group: str
    metric: str
    region: Region | None
    picture: Callable[[], Image.Image]
    box: Box | None = None
    read_box: Callable[[str], Box | None] = parse_box

    def score(self, answer: str, back: Callable[[Box], Box] = lambda box: box) -> float:
        """Of the answer, in [0, 1]; ``back``: box in what the model saw -> box in the picture."""
        if self.metric == "iou":
            found = self.read_box(answer)
            return iou(back(found), self.box) if found is not None else 0.0
        return TEXT_METRICS[self.metric](answer, self.answers)


def rendered(first: int, *, grounding: bool = True, whole: bool = True) -> Iterator[Item]:
    """Questions about rendered pictures from seed ``first`` on, about five or six each, without an end.

    Per picture, drawn by its seed: two about text and one of every other group that it has.

    Args:
        grounding: ask where something is, too. whole: ask what only the whole picture answers, too.
    """
    for seed in count(first):
        rng, drawn = random.Random(seed), draw(seed)
        pools: dict[str, list[Question]] = {}
        for question in drawn.questions:
            group = GROUPS[question.kind]
            if (grounding or group != GROUNDING) and (whole or question.local):
                pools.setdefault(group, []).append(question)
        for group, pool in sorted(pools.items()):
            for number, question in enumerate(rng.sample(pool, min(2 if group == TEXT else 1, len(pool)))):
                is_box = group == GROUNDING
                yield Item(
                    key=f"{seed} {group} {number}",
                    image=str(seed),
                    question=question.text,
                    answers=(question.answer,),
                    group=group,
                    metric="iou" if is_box else "verbatim",
                    region=question.region,
                    picture=lambda seed=seed: draw(seed).image,
                    box=blocks(question.answer) if is_box else None,
                    read_box=blocks,
                )


def json_lines(path: Path, metric: str) -> Iterator[Item]:
    """Questions of a file: one JSON object a line, or an array of them, with ``image`` (path beside the file), ``question``,
    ``answers`` (one or several, text or numbers).

    Optional: ``box`` (x0, y0, x1, y1 in pixels: where the answer is; without answers: what is asked for), ``group``.

    Args:
        metric: for questions with answers.
    Raises:
        ValueError: a field that is missing or of another kind; names file, line and field.
    """
    for row in jsonl.rows(path):
        question, answers, box = row.text("question"), row.texts("answers"), row.box("box")
        if not answers and box is None:
            raise row.refuse("answers", "text, unless there is a box")
        place, region = row.file("image", path.parent), None
        if box:
            try:
                region = Region.from_pixels(box, upright_size(place))
            except ValueError as error:
                raise ValueError(f"{row.place}: box: {error}") from error
        yield Item(
            key=f"{path.stem} {row.number}",
            image=str(place),
            question=question,
            answers=answers,
            group=row.text("group") if row.fields.get("group") is not None else "all" if answers else "grounding",
            metric=metric if answers else "iou",
            region=region,
            picture=lambda place=place: open_image(place),
            box=region.boxes[0] if region is not None and not answers else None,
        )


def convert_receipts(folder: Path, out: Path) -> int:
    """Write the receipts' questions as JSON lines that ``json_lines`` reads.

    Args:
        folder: holds ``questions.jsonl`` and ``images/``. out: file to write; images are named by absolute path.
    Returns:
        Number of questions.
    """
    rows = []
    for row in (entry.fields for entry in jsonl.rows(folder / "questions.jsonl")):
        rows.append(
            {
                "image": str((folder / "images" / Path(row["image"]).name).resolve()),
                "question": row["question"],
                "answers": [row["answer"]],
                "box": row["box"],
                "group": row["field"],
            }
        )
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)
