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
from bench.training.grounding import box_questions
from crop.embedded import scenes, things

Record = tuple[Any, str, Any]  # (image or its path, question, boxes or None)


def rendered(first: int, count: int, questions: int) -> Iterator[Record]:
    """Records of rendered pictures; one in each asks for what only another picture shows."""
    before: tuple[scenes.Question, ...] = ()
    for seed in range(first, first + count):
        scene, rng = scenes.scene(seed), random.Random(seed)
        known = {question.text for question in scene.questions}
        asked = (*scene.questions, *box_questions(scene))
        for question in rng.sample(asked, min(questions, len(asked))):
            yield scene.image, question.text, question.boxes
        absent = [q.text for q in before if q.text not in known and foreign(q, scene)]
        if absent:
            yield scene.image, rng.choice(absent), None
        before = scene.questions


def foreign(question: scenes.Question, scene: scenes.Scene) -> bool:
    """Whether a question of another picture names a thing that this one surely does not show."""
    if not question.local:
        return False
    shown = {str(value) for thing in scene.things for value in (thing.color, thing.shape, thing.word) if value}
    shown |= {f"{thing.shape}s" for thing in scene.things if thing.shape}
    named = set(question.text.split()) & (
        {*things.COLORS, *things.SHAPES, *things.DRAWN_WORDS} | {f"{s}s" for s in things.SHAPES}
    )
    return bool(named - shown)


def read_jsonl(path: Path) -> Iterator[Record]:
    """Records of a file.

    Raises:
        ValueError: a field that is missing or of another kind; names file, line and field.
    """
    for row in jsonl.rows(path):
        yield row.file("image", path.parent), row.text("question"), row.boxes("boxes")
