"""Questions about where things are in the rendered pictures, answered by blocks of an 8 x 8 grid."""

from __future__ import annotations

import random
from collections.abc import Iterator

from crop.embedded.scenes import Question, Scene
from crop.embedded.things import GRID
from crop.geometry.region import Region

BOX_KIND = "box"
BLOCKS = 8  # per side


def box_questions(scene: Scene) -> tuple[Question, ...]:
    """One question per thing of a picture; apart from ``scene.questions``, which ask what can be seen."""
    # Random numbers of their own, so that the other questions do not depend on these.
    return tuple(_questions(scene, random.Random(f"boxes {scene.seed}")))


def _questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for thing in scene.things:
        if thing.kind == "shape":
            name = rng.choice((f"{thing.color} {thing.shape}", str(thing.label)))
        elif thing.kind == "sign":
            name = rng.choice((f"{thing.color} sign", str(thing.word)))
        else:
            name = str(thing.word) if thing.kind == "item" else thing.kind
        x0, y0, x1, y1 = thing.cells
        side = GRID // BLOCKS
        blocks = (x0 // side, y0 // side, (x1 - 1) // side, (y1 - 1) // side)
        yield Question(BOX_KIND, f"what box is the {name} in", "".join(map(str, blocks)), (thing.box,), True)


def box_region(answer: str) -> Region | None:
    """The region that an answer names, None where it names none.

    Args:
        answer: four digits, spaces aside: xmin, ymin, xmax, ymax, inclusive.
    Source: the format of regions in CROP (arXiv 2505.21233).
    """
    digits = answer.replace(" ", "")
    if len(digits) != 4 or not digits.isdecimal():
        return None
    x0, y0, x1, y1 = map(int, digits)
    return Region.from_blocks(x0, y0, x1, y1, BLOCKS) if x0 <= x1 < BLOCKS and y0 <= y1 < BLOCKS else None
