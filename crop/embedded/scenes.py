"""Rendered pictures with questions, answers and the region each answer lives in.

Three kinds of picture, 256 x 256 pixels, drawn with Pillow alone and a pure function of an integer seed: coloured
shapes that carry a digit or a short word, sign boards, and shop receipts. Things sit on the 16-pixel patch grid with a
few pixels of jitter and text is set in cells of 16 pixels, which is what lets a model of a few megabytes learn to read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from crop.embedded.drawing import draw
from crop.embedded.things import PICTURES, Thing, build_receipt, build_shapes, build_signs
from crop.geometry.region import Box, Region

LOCAL_KINDS = tuple("digit word color shape where count sign price item total date shop".split())
GLOBAL_KINDS = ("shapes", "picture", "receipt")
WHOLE = ((0.0, 0.0, 1.0, 1.0),)
UNSEEN = 10_000_000  # the embedded model was trained on pictures of smaller seeds


@dataclass(frozen=True)
class Question:
    """One question about a picture.

    Args:
        kind: one of ``LOCAL_KINDS`` or ``GLOBAL_KINDS``.
        text: the question without a final question mark.
        answer: lower-case words or a number.
        boxes: (x0, y0, x1, y1) each, normalised to the image, half-open: where the answer can be seen.
        local: False where the answer needs the whole picture (``boxes`` is then the whole picture).
    """

    kind: str
    text: str
    answer: str
    boxes: tuple[Box, ...]
    local: bool

    @property
    def region(self) -> Region:
        """The boxes as a region."""
        return Region(self.boxes)


@dataclass(frozen=True)
class Scene:
    """A picture, what is drawn in it and the questions it can answer.

    Args:
        image: RGB, ``SIZE`` x ``SIZE``.
        questions: in random order (a function of the seed).
        picture: one of ``PICTURES``.
        things: what was drawn, in drawing order.
        seed: of the picture.
    """

    image: Image.Image
    questions: tuple[Question, ...]
    picture: str
    things: tuple[Thing, ...]
    seed: int


def scene(seed: int, *, picture: str | None = None, hardness: float = 1.0) -> Scene:
    """Draw the picture of a seed.

    Args:
        seed: any integer >= 0; the same seed gives the same picture and questions.
        picture: one of ``PICTURES``, default: drawn from the seed.
        hardness: in [0, 1]; 0 draws the fewest things without jitter and clutter (for a curriculum), 1 the full range.
    Raises:
        ValueError: unknown picture.
    """
    if picture is not None and picture not in PICTURES:
        raise ValueError(f"scene: picture must be one of {PICTURES}, got {picture!r}")
    rng = random.Random(seed)
    drawn = rng.choices(PICTURES, (5, 2, 4))[0]
    picture = picture or drawn
    build = {"shapes": build_shapes, "sign": build_signs, "receipt": build_receipt}[picture]
    things = build(rng, hardness)
    image = draw(things, picture, rng, hardness)
    questions = list(_questions(things, picture, rng))
    rng.shuffle(questions)
    return Scene(image, tuple(questions), picture, things, seed)


def examples(count: int, seed: int = 0) -> Iterator[tuple[Scene, Question]]:
    """Pictures that the embedded model was not trained on, each with the first of its questions that a part answers.

    Args:
        count: pictures; the kinds take turns. seed: which ones.
    """
    for number in range(count):
        drawn = scene(UNSEEN + 1000 * seed + number, picture=PICTURES[number % len(PICTURES)])
        yield drawn, next(question for question in drawn.questions if question.local)


def _questions(things: tuple[Thing, ...], picture: str, rng: random.Random) -> Iterator[Question]:
    yield Question("picture", "what kind of picture is this", picture, WHOLE, False)
    yield Question("receipt", "is this a receipt", "yes" if picture == "receipt" else "no", WHOLE, False)
    if picture == "shapes":
        yield Question("shapes", "how many shapes are there", str(len(things)), WHOLE, False)
        yield from _shape_questions(things, rng)
    elif picture == "sign":
        yield from _sign_questions(things)
    else:
        yield from _receipt_questions(things)


def _shape_questions(things: tuple[Thing, ...], rng: random.Random) -> Iterator[Question]:
    colors, shapes = [t.color for t in things], [t.shape for t in things]
    for thing in things:
        names = [f"{thing.color} {thing.shape}"]
        if shapes.count(thing.shape) == 1:
            names.append(f"{thing.shape}")
        if colors.count(thing.color) == 1:
            names.append(f"{thing.color} shape")
        kind = "digit" if thing.value else "word"
        yield Question(kind, f"what {kind} is on the {rng.choice(names)}", str(thing.label), (thing.box,), True)
        clue = f"the shape with the {thing.label}"
        if shapes.count(thing.shape) == 1 and rng.random() < 0.4:
            clue = f"the {thing.shape}"
        yield Question("color", f"what color is {clue}", str(thing.color), (thing.box,), True)
        clue = f"has the {thing.label}"
        if colors.count(thing.color) == 1 and rng.random() < 0.4:
            clue = f"is {thing.color}"
        yield Question("shape", f"what shape {clue}", str(thing.shape), (thing.box,), True)
        if thing.where is not None:
            clue = rng.choice([*names, str(thing.label)])
            yield Question("where", f"where is the {clue}", thing.where, (thing.box,), True)
    for name, noun in (("color", "{} shapes"), ("shape", "{}s")):
        for value in sorted({str(getattr(thing, name)) for thing in things}):
            boxes = tuple(thing.box for thing in things if getattr(thing, name) == value)
            yield Question("count", f"how many {noun.format(value)} are there", str(len(boxes)), boxes, True)


def _sign_questions(things: tuple[Thing, ...]) -> Iterator[Question]:
    for thing in things:
        name = "sign" if len(things) == 1 else f"{thing.color} sign"
        yield Question("sign", f"what does the {name} say", str(thing.word), (thing.box,), True)
        yield Question("color", f"what color is the sign with {thing.word}", str(thing.color), (thing.box,), True)
        if thing.where is not None:
            yield Question("where", f"where is the {thing.color} sign", thing.where, (thing.box,), True)


def _receipt_questions(things: tuple[Thing, ...]) -> Iterator[Question]:
    prices = [t.value for t in things if t.kind == "item"]
    for thing in things:
        if thing.kind == "item":
            yield Question("price", f"what is the price of {thing.word}", str(thing.value), (thing.box,), True)
            if prices.count(thing.value) == 1:
                yield Question("item", f"which item costs {thing.value}", str(thing.word), (thing.box,), True)
        elif thing.kind == "date":
            yield Question("date", "what is the date", f"{thing.value} {thing.word}", (thing.box,), True)
        elif thing.kind == "total":
            yield Question("total", "what is the total", str(thing.value), (thing.box,), True)
        else:
            yield Question("shop", "what is the shop", str(thing.word), (thing.box,), True)
