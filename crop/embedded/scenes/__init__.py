"""Rendered documents and scenes with free placement: pictures, questions, answers and the regions these need.

Six kinds of picture, 384 x 384 pixels, drawn with Pillow in four faces as a pure function of an integer seed:
coloured shapes, sign boards, receipts, tables, bar charts and forms. Nothing is aligned to the patch grid, text runs
over several patches, and words are made up, so that half of one does not tell the other half.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from crop.embedded.scenes import chart, form, receipt, shapes, signs, table
from crop.embedded.scenes.names import (
    BLOCKS,
    BOX_KIND,
    CHARACTERS,
    COLORS,
    GLOBAL_KINDS,
    GRID,
    LOCAL_KINDS,
    PATCH,
    PICTURES,
    RELATION_KINDS,
    SHAPES,
    SIZE,
    plural,
    vocabulary,
)
from crop.embedded.scenes.records import Question, Run, Scene, Thing, ask, box_region
from crop.embedded.scenes.sheet import Sheet

__all__ = [
    "BLOCKS",
    "BOX_KIND",
    "CHARACTERS",
    "COLORS",
    "GLOBAL_KINDS",
    "GRID",
    "LOCAL_KINDS",
    "PATCH",
    "PICTURES",
    "RELATION_KINDS",
    "SHAPES",
    "SIZE",
    "UNSEEN",
    "Question",
    "Run",
    "Scene",
    "Thing",
    "box_region",
    "examples",
    "scene",
    "plural",
    "vocabulary",
]

BUILDERS = dict(
    zip(PICTURES, (shapes.build, signs.build, receipt.build, table.build, chart.build, form.build), strict=True)
)
SHARES = (4, 3, 3, 3, 2, 3)
UNSEEN = 60_000_000  # the embedded model and its head were trained and tuned on pictures of smaller seeds


def scene(seed: int, *, picture: str | None = None, hardness: float = 1.0) -> Scene:
    """Draw the picture of a seed.

    Args:
        seed: any integer >= 0; the same seed gives the same picture and questions.
        picture: one of ``PICTURES``, default: drawn from the seed.
        hardness: in [0, 1]; 0 draws few and large things without noise (for a curriculum), 1 the full range.
    Raises:
        ValueError: unknown picture.
    """
    if picture is not None and picture not in PICTURES:
        raise ValueError(f"scene: picture must be one of {PICTURES}, got {picture!r}")
    rng = random.Random(seed)
    drawn = rng.choices(PICTURES, SHARES)[0]
    picture = picture or drawn
    sheet = Sheet(rng, hardness)
    questions = list(BUILDERS[picture](sheet))
    questions.append(ask("global", "what kind of picture is this", picture, local=False))
    image = sheet.finish()
    rng.shuffle(questions)
    return Scene(image, picture, tuple(questions), tuple(sheet.things), tuple(sheet.runs), sheet.ids)


def examples(count: int, seed: int = 0) -> Iterator[tuple[Scene, Question]]:
    """Pictures that the embedded model was not trained on, each with the first of its questions that one box answers.

    Args:
        count: pictures; the kinds take turns. seed: which ones.
    """
    for number in range(count):
        drawn = scene(UNSEEN + 1000 * seed + number, picture=PICTURES[number % len(PICTURES)])
        yield drawn, next(q for q in drawn.questions if q.kind in LOCAL_KINDS and len(q.boxes) == 1)
