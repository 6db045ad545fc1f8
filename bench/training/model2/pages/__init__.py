"""Rendered documents and scenes with free placement: pictures, questions, answers and the regions these need.

Six kinds of picture, 384 x 384 pixels, drawn with Pillow in four faces as a pure function of an integer seed:
coloured shapes, sign boards, receipts, tables, bar charts and forms. Nothing is aligned to the patch grid, text runs
over several patches, and words are made up, so that half of one does not tell the other half.
"""

from __future__ import annotations

import random

from bench.training.model2.pages import chart, form, receipt, shapes, signs, table
from bench.training.model2.pages.labels import HEADS, box_mask, patch_labels, patch_of
from bench.training.model2.pages.names import (
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
    vocabulary,
)
from bench.training.model2.pages.records import Question, Run, Scene, Thing, ask
from bench.training.model2.pages.sheet import Sheet

__all__ = [
    "BLOCKS",
    "BOX_KIND",
    "CHARACTERS",
    "COLORS",
    "GLOBAL_KINDS",
    "GRID",
    "HEADS",
    "LOCAL_KINDS",
    "PATCH",
    "PICTURES",
    "RELATION_KINDS",
    "SHAPES",
    "SIZE",
    "Question",
    "Run",
    "Scene",
    "Thing",
    "box_mask",
    "patch_labels",
    "patch_of",
    "scene",
    "vocabulary",
]

BUILDERS = dict(
    zip(PICTURES, (shapes.build, signs.build, receipt.build, table.build, chart.build, form.build), strict=True)
)
SHARES = (4, 3, 3, 3, 2, 3)


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
