"""What a picture is handed out as: the things and runs of text in it, its questions and the regions they need."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from crop.embedded.scenes.names import BLOCKS, SIZE
from crop.geometry.region import Box, Region

Spot = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """A line of text as drawn: its characters, their centres and its box, in pixels."""

    text: str
    spots: tuple[Spot, ...]
    box: Box


@dataclass(frozen=True)
class Thing:
    """A coloured thing: kind ("shape", "sign" or "bar"), names, box in pixels, and the text on it."""

    kind: str
    box: Box
    color: str
    shape: str | None = None
    run: Run | None = None

    @property
    def center(self) -> Spot:
        """Middle of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Question:
    """One question about a picture.

    Args:
        kind: one of ``LOCAL_KINDS``, ``RELATION_KINDS``, ``GLOBAL_KINDS`` or ``BOX_KIND``.
        text: without a final question mark; capitals and digits are text that stands in the picture.
        answer: lower-case words, or what is read off, in capitals and digits.
        boxes: (x0, y0, x1, y1) each, normalised, half-open: everything the answer needs; first the one whose place is asked.
        local: False where the answer needs the whole picture.
        spots: centre in pixels of every character of the answer; empty where the answer is not read off.
        clues: the same for every capital and digit of the question.
    """

    kind: str
    text: str
    answer: str
    boxes: tuple[Box, ...]
    local: bool = True
    spots: tuple[Spot, ...] = ()
    clues: tuple[Spot, ...] = ()

    @property
    def region(self) -> Region:
        """The boxes as a region."""
        return Region(self.boxes)


@dataclass(frozen=True)
class Scene:
    """A picture (RGB, 384 x 384), its kind, its questions in random order, and what is drawn in it."""

    image: Image.Image
    picture: str
    questions: tuple[Question, ...]
    things: tuple[Thing, ...]
    runs: tuple[Run, ...]
    ids: Image.Image  # per pixel: 0, or 1 + the index of the thing that is seen there


def normal(box: Box) -> Box:
    """A box in pixels as fractions of the picture."""
    x0, y0, x1, y1 = (min(max(v / SIZE, 0.0), 1.0) for v in box)
    return x0, y0, x1, y1


def around(*boxes: Box) -> Box:
    """The smallest box around all of them."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def ask(
    kind: str, text: str, answer: str | Run, *needs: Box, clues: tuple[Run, ...] = (), local: bool = True
) -> Question:
    """A question whose regions are given in pixels; an answer that is a ``Run`` is read off there."""
    run = answer if isinstance(answer, Run) else None
    return Question(
        kind,
        text,
        run.text if run else str(answer),
        tuple(map(normal, needs)) if local else ((0.0, 0.0, 1.0, 1.0),),
        local,
        run.spots if run else (),
        tuple(spot for clue in clues for spot in clue.spots),
    )


def place(name: str, box: Box, clues: tuple[Run, ...] = (), *near: Box) -> Question:
    """The question for a thing's place in blocks, inclusive; ``near``: what else it needs."""
    x0, y0, x1, y1 = normal(box)
    low = (int(x0 * BLOCKS), int(y0 * BLOCKS))
    high = tuple(min(BLOCKS - 1, int(v * BLOCKS - 1e-6)) for v in (x1, y1))
    return ask("box", f"what box is {name} in", "".join(map(str, (*low, *high))), box, *near, clues=clues)


def box_region(answer: str) -> Region | None:
    """The region that an answer names, None where it names none.

    Args:
        answer: four digits, spaces aside: xmin, ymin, xmax, ymax in blocks, inclusive.
    Source: the format of regions in CROP (arXiv 2505.21233).
    """
    digits = answer.replace(" ", "")
    if len(digits) != 4 or not digits.isdecimal():
        return None
    x0, y0, x1, y1 = map(int, digits)
    return Region.from_blocks(x0, y0, x1, y1, BLOCKS) if x0 <= x1 < BLOCKS and y0 <= y1 < BLOCKS else None
