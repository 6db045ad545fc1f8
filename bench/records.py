"""(image, question, boxes) records that localizers are trained on: from JSON lines, or rendered.

One line of a file: {"image": path, "question": text, "boxes": [[x0, y0, x1, y1], ...]} with boxes as fractions of width and
height; the whole image where all of it is needed; "boxes": null where nothing in the image answers. Image paths are
relative to the file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import jsonl
from bench.pictures import draw, named, shown

Record = tuple[Any, str, Any]  # (image or its path, question, boxes or None)


def rendered(first: int, count: int, questions: int) -> Iterator[Record]:
    """Records of rendered pictures; one in each asks for what only another picture shows."""
    before: tuple[Any, ...] = ()
    for seed in range(first, first + count):
        drawn, rng = draw(seed), random.Random(seed)
        known = {question.text for question in drawn.questions}
        for question in rng.sample(drawn.questions, min(questions, len(drawn.questions))):
            yield drawn.image, question.text, question.boxes
        absent = [question.text for question in before if question.text not in known]
        absent = [text for text in absent if named(text) - shown(drawn)]
        if absent:
            yield drawn.image, rng.choice(absent), None
        before = tuple(question for question in drawn.questions if question.local)


def read_jsonl(path: Path) -> Iterator[Record]:
    """Records of a file.

    Raises:
        ValueError: a field that is missing or of another kind; names file, line and field.
    """
    for row in jsonl.rows(path):
        yield row.file("image", path.parent), row.text("question"), row.boxes("boxes")
