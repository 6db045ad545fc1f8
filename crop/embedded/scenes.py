"""Rendered pictures with questions, answers and the region each answer lives in.

Three kinds of picture, 256 x 256 pixels, drawn with Pillow alone and a pure function of an integer seed: coloured shapes that carry a
digit or a short word, sign boards, and shop receipts. Things sit on the 16-pixel patch grid with a few pixels of jitter and
text is set in cells of 16 pixels, which is what lets a model of a few megabytes learn to read it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from crop.region import Region

SIZE = 256
PATCH = 16
GRID = SIZE // PATCH
JITTER = 2  # pixels; below half a patch, so that a thing always covers the same patch centres

COLORS = {
    "red": (214, 40, 40), "green": (38, 150, 60), "blue": (40, 80, 220), "yellow": (240, 206, 30),
    "orange": (244, 130, 24), "purple": (140, 50, 170), "black": (28, 28, 28), "cyan": (40, 190, 200),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "star")
SHAPE_WORDS = tuple("cat dog sun cup hat bus key egg fox owl pie jar map net box zip".split())
SIGN_WORDS = tuple(
    "stop exit open taxi bank park hotel cafe pizza music police school market museum garden bridge slow push pull "
    "danger ticket coffee beach zoo".split()
)
ITEMS = tuple("milk bread eggs tea rice fish soap apple juice cheese pasta salt honey lemon butter onion".split())
SHOPS = tuple("alma nova metro daily sunny corner bonus royal".split())
MONTHS = tuple("jan feb mar apr may jun jul aug sep oct nov dec".split())
DRAWN_WORDS = (*SHAPE_WORDS, *SIGN_WORDS, *ITEMS, *SHOPS, *MONTHS, "total")

LOCAL_KINDS = ("digit", "word", "color", "shape", "where", "count", "sign", "price", "item", "total", "date", "shop")
GLOBAL_KINDS = ("shapes", "picture", "receipt")
PICTURES = ("shapes", "sign", "receipt")


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
    boxes: tuple[tuple[float, float, float, float], ...]
    local: bool

    @property
    def region(self) -> Region:
        """The boxes as a ``crop.region.Region``."""
        from crop.region import Region

        return Region(self.boxes)


@dataclass(frozen=True)
class Thing:
    """One drawn thing: a shape, a sign board or a line of a receipt.

    Args:
        kind: "shape", "sign", "shop", "date", "item" or "total".
        cells: (x0, y0, x1, y1) patches, half-open.
        offset: (x, y) jitter in pixels.
        text: (x, y, character) per drawn character, in patches.
        color, shape, word: names, or None. value: a number in digits, or None.
    """

    kind: str
    cells: tuple[int, int, int, int]
    offset: tuple[int, int]
    text: tuple[tuple[int, int, str], ...]
    color: str | None = None
    shape: str | None = None
    word: str | None = None
    value: str | None = None

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Normalised box, clipped to the picture."""
        dx, dy = self.offset
        x0, y0, x1, y1 = (PATCH * c + d for c, d in zip(self.cells, (dx, dy, dx, dy), strict=True))
        return max(x0, 0) / SIZE, max(y0, 0) / SIZE, min(x1, SIZE) / SIZE, min(y1, SIZE) / SIZE

    @property
    def label(self) -> str | None:
        """The text on a shape: its digit or its word."""
        return self.word or self.value

    @property
    def where(self) -> str | None:
        """Position in words, None if the centre is too close to a border between thirds to say."""
        names = []
        for low, high, words in (
            (self.cells[1], self.cells[3], ("top", "middle", "bottom")),
            (self.cells[0], self.cells[2], ("left", "center", "right")),
        ):
            third = (low + high) / 2 * 3 / GRID
            if abs(third - 1) < 0.12 or abs(third - 2) < 0.12:
                return None
            names.append(words[int(third)])
        return " ".join(names)


@dataclass(frozen=True)
class Scene:
    """A picture, what is drawn in it and the questions it can answer.

    Args:
        image: RGB, ``SIZE`` x ``SIZE``.
        questions: in random order (a function of the seed).
        picture: one of ``PICTURES``.
        things: what was drawn, in drawing order.
    """

    image: Image.Image
    questions: tuple[Question, ...]
    picture: str
    things: tuple[Thing, ...]


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
    build = {"shapes": _build_shapes, "sign": _build_signs, "receipt": _build_receipt}[picture]
    things = build(rng, hardness)
    image = _draw(things, picture, rng, hardness)
    questions = list(_questions(things, picture, rng))
    rng.shuffle(questions)
    return Scene(image, tuple(questions), picture, things)


def _jitter(rng: random.Random, hardness: float) -> tuple[int, int]:
    reach = round(JITTER * hardness)
    return rng.randint(-reach, reach), rng.randint(-reach, reach)


def _place(rng: random.Random, width: int, height: int, taken: list[tuple[int, int, int, int]]) -> tuple | None:
    """A free place with at least one patch to every other thing, None if a few tries find none."""
    for _ in range(60):
        x, y = rng.randint(0, GRID - width), rng.randint(0, GRID - height)
        if all(x > c or x + width < a or y > d or y + height < b for a, b, c, d in taken):
            taken.append((x, y, x + width, y + height))
            return taken[-1]
    return None


def _letters(text: str, x: int, y: int) -> tuple[tuple[int, int, str], ...]:
    return tuple((x + i, y, c) for i, c in enumerate(text.upper()) if c != " ")


def _build_shapes(rng: random.Random, hardness: float) -> tuple[Thing, ...]:
    count = rng.randint(2 if hardness < 0.5 else 3, round(2 + 4 * hardness))
    # Few colours or few kinds of shape in some pictures, else the answer to a counting question is nearly always one.
    palette = rng.sample(sorted(COLORS), rng.choice((2, 3, 8)))
    outlines = rng.sample(SHAPES, rng.choice((2, 5, 5)))
    pairs = rng.sample([(c, s) for c in palette for s in outlines], min(count, len(palette) * len(outlines)))
    digits, words = rng.sample(range(10), len(pairs)), rng.sample(SHAPE_WORDS, len(pairs))
    taken: list[tuple[int, int, int, int]] = []
    things = []
    for (color, shape), digit, word in zip(pairs, digits, words, strict=True):
        cells = _place(rng, 3, 3, taken)
        if cells is None:
            continue
        x, y = cells[0], cells[1] + 1
        if rng.random() < 0.5:
            label = {"value": str(digit), "text": _letters(str(digit), x + 1, y)}
        else:
            label = {"word": word, "text": _letters(word, x, y)}
        things.append(Thing("shape", cells, _jitter(rng, hardness), color=color, shape=shape, **label))
    return tuple(things)


def _build_signs(rng: random.Random, hardness: float) -> tuple[Thing, ...]:
    count = rng.choice((1, 2, 2))
    taken: list[tuple[int, int, int, int]] = []
    things = []
    for color, word in zip(rng.sample(sorted(COLORS), count), rng.sample(SIGN_WORDS, count), strict=True):
        cells = _place(rng, len(word) + 2, 3, taken)
        if cells is not None:
            text = _letters(word, cells[0] + 1, cells[1] + 1)
            things.append(Thing("sign", cells, _jitter(rng, hardness), text, color=color, word=word))
    return tuple(things)


def _build_receipt(rng: random.Random, hardness: float) -> tuple[Thing, ...]:
    rows = rng.randint(3 if hardness > 0.5 else 2, round(3 + 2 * hardness))
    while True:
        prices = [rng.choice((rng.randint(1, 9), rng.randint(10, 39))) for _ in range(rows)]
        if sum(prices) <= 99:
            break
    width, x, y = 11, rng.randint(0, GRID - 11), rng.randint(0, GRID - rows - 5)
    offset = _jitter(rng, hardness)

    def line(kind: str, row: int, word: str, value: str | None, text: str, start: int) -> Thing:
        cells = (x, y + row, x + width, y + row + 1)
        return Thing(kind, cells, offset, _letters(text, x + start, y + row), word=word, value=value)

    shop, month, day = rng.choice(SHOPS), rng.choice(MONTHS), str(rng.randint(1, 28))
    things = [line("shop", 0, shop, None, shop, 1), line("date", 1, month, day, f"{day:>2} {month}", 1)]
    body = [("item", word, str(price)) for word, price in zip(rng.sample(ITEMS, rows), prices, strict=True)]
    for i, (kind, word, price) in enumerate([*body, ("total", "total", str(sum(prices)))]):
        # Row 2 and the row above the total stay blank: dashed rules are drawn there.
        things.append(line(kind, 3 + i + (kind == "total"), word, price, f"{word:<7}{price:>2}", 1))
    return tuple(things)


@lru_cache(maxsize=256)
def _glyph(character: str, size: int, bold: bool) -> Image.Image:
    """Coverage mask of a character, centred in a cell of 20 x 20 pixels."""
    font = ImageFont.load_default(size)
    mask = Image.new("L", (PATCH + 4, PATCH + 4))
    left, top, right, bottom = font.getbbox("H", anchor="ls")
    draw = ImageDraw.Draw(mask)
    draw.text(((PATCH + 4) / 2, (PATCH + 4 - (bottom - top)) / 2 - top), character, 255, font, "ms", stroke_width=0.4 if bold else 0)
    return mask


def _outline(shape: str, x: float, y: float, size: float) -> list[tuple[float, float]]:
    """Polygon of a shape in the square at (x, y)."""
    if shape == "square":
        unit = [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
    elif shape == "triangle":
        unit = [(0.5, 0), (1, 0.96), (0, 0.96)]
    elif shape == "diamond":
        unit = [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]
    else:
        turns = [(i, 0.5 if i % 2 == 0 else 0.24) for i in range(10)]
        unit = [(0.5 + r * math.sin(i * math.pi / 5), 0.5 - r * math.cos(i * math.pi / 5)) for i, r in turns]
    return [(x + size * u, y + size * v) for u, v in unit]


def _draw(things: tuple[Thing, ...], picture: str, rng: random.Random, hardness: float) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32))
    tint = np.array([rng.randint(150, 235) for _ in range(3)], np.float32)
    slope = np.array([[rng.uniform(-20, 20) for _ in range(3)] for _ in range(2)], np.float32) * hardness
    ramp = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    ground = tint + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, round(6 * hardness))):
        ends = [rng.randint(0, SIZE) for _ in range(4)]
        draw.line(ends, tuple(rng.randint(90, 255) for _ in range(3)), rng.choice((1, 1, 2)))
    if picture == "receipt":
        _draw_paper(draw, things, rng)
    for thing in things:
        _draw_thing(image, draw, thing, rng, hardness)
    speckle = noise.standard_normal((SIZE, SIZE, 1), np.float32) * (4 * hardness)
    return Image.fromarray((np.asarray(image, np.float32) + speckle).clip(0, 255).astype(np.uint8))


def _draw_paper(draw: ImageDraw.ImageDraw, things: tuple[Thing, ...], rng: random.Random) -> None:
    (x0, y0, x1, _), (dx, dy) = things[0].cells, things[0].offset
    y1 = things[-1].cells[3]
    paper = rng.randint(238, 255)
    draw.rectangle((PATCH * x0 + dx, PATCH * y0 + dy - 3, PATCH * x1 + dx - 1, PATCH * y1 + dy + 2), (paper,) * 3)
    for row in (y0 + 2, y1 - 2):
        for x in range(PATCH * x0 + dx + 12, PATCH * x1 + dx - 12, 8):
            draw.line((x, PATCH * row + dy + 8, x + 4, PATCH * row + dy + 8), (120,) * 3)


def _draw_thing(image: Image.Image, draw: ImageDraw.ImageDraw, thing: Thing, rng: random.Random, hardness: float) -> None:
    x, y = PATCH * thing.cells[0] + thing.offset[0], PATCH * thing.cells[1] + thing.offset[1]
    width, height = (PATCH * (thing.cells[i + 2] - thing.cells[i]) for i in (0, 1))
    ink, rim = (30, 30, 40), None
    if thing.color is not None:
        shade = tuple(max(0, min(255, c + round(rng.randint(-14, 14) * hardness))) for c in COLORS[thing.color])
        ink, rim = (255, 255, 255), (0, 0, 0)
        if thing.kind == "sign":
            draw.rounded_rectangle((x + 2, y + 2, x + width - 3, y + height - 3), 8, shade, (60, 60, 60), 2)
        elif thing.shape == "circle":
            draw.ellipse((x, y, x + width - 1, y + height - 1), shade, (60, 60, 60))
        else:
            draw.polygon(_outline(thing.shape or "", x, y, width - 1), shade, (60, 60, 60))
    size = 20 if thing.kind == "shape" and thing.value else 16
    for column, row, character in thing.text:
        left, top = PATCH * column + thing.offset[0] - 2, PATCH * row + thing.offset[1] - 2
        mask = _glyph(character, size, thing.color is not None)
        if rim is not None:  # white on a dark rim reads on every colour, and beyond the edge of a star
            for shift in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                image.paste(rim, (left + shift[0], top + shift[1]), mask)
        image.paste(ink, (left, top), mask)


def _questions(things: tuple[Thing, ...], picture: str, rng: random.Random) -> Iterator[Question]:
    whole = ((0.0, 0.0, 1.0, 1.0),)
    yield Question("picture", "what kind of picture is this", picture, whole, False)
    yield Question("receipt", "is this a receipt", "yes" if picture == "receipt" else "no", whole, False)
    if picture == "shapes":
        yield Question("shapes", "how many shapes are there", str(len(things)), whole, False)
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
    for values, values_of in ((sorted(set(map(str, colors))), "color"), (sorted(set(map(str, shapes))), "shape")):
        for value in values:
            boxes = tuple(t.box for t in things if getattr(t, values_of) == value)
            noun = f"{value} shapes" if values_of == "color" else f"{value}s"
            yield Question("count", f"how many {noun} are there", str(len(boxes)), boxes, True)


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


def vocabulary() -> tuple[str, ...]:
    """Every word of every question and answer, sorted; digits one by one."""
    words = set(DRAWN_WORDS) | set(COLORS) | set(SHAPES) | set(PICTURES) | set("0123456789?")
    words |= set("top middle bottom left center right yes no shapes sign receipt".split())
    words |= {f"{shape}s" for shape in SHAPES}
    words |= set(
        "what kind of picture is this a how many are there digit word on the color shape with has where does say "
        "price which item costs date shop an it in".split()
    )
    return tuple(sorted(words))
