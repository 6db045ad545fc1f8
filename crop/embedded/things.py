"""What the rendered pictures show: the closed vocabularies and the things in a picture, placed on the patch grid."""

from __future__ import annotations

import random
from dataclasses import dataclass

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
    "stop exit open taxi bank park hotel cafe pizza music police school market museum garden bridge slow "
    "push pull danger ticket coffee beach zoo".split()
)
ITEMS = tuple("milk bread eggs tea rice fish soap apple juice cheese pasta salt honey lemon butter onion".split())
SHOPS = tuple("alma nova metro daily sunny corner bonus royal".split())
MONTHS = tuple("jan feb mar apr may jun jul aug sep oct nov dec".split())
DRAWN_WORDS = (*SHAPE_WORDS, *SIGN_WORDS, *ITEMS, *SHOPS, *MONTHS, "total")

PICTURES = ("shapes", "sign", "receipt")


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


def build_shapes(rng: random.Random, hardness: float) -> tuple[Thing, ...]:
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


def build_signs(rng: random.Random, hardness: float) -> tuple[Thing, ...]:
    count = rng.choice((1, 2, 2))
    taken: list[tuple[int, int, int, int]] = []
    things = []
    for color, word in zip(rng.sample(sorted(COLORS), count), rng.sample(SIGN_WORDS, count), strict=True):
        cells = _place(rng, len(word) + 2, 3, taken)
        if cells is not None:
            text = _letters(word, cells[0] + 1, cells[1] + 1)
            things.append(Thing("sign", cells, _jitter(rng, hardness), text, color=color, word=word))
    return tuple(things)


def build_receipt(rng: random.Random, hardness: float) -> tuple[Thing, ...]:
    rows = rng.randint(3 if hardness > 0.5 else 2, round(3 + 2 * hardness))
    while True:
        prices = [rng.choice((rng.randint(1, 9), rng.randint(10, 79))) for _ in range(rows)]
        if sum(prices) <= 99:
            break
    width, x, y = 11, rng.randint(0, GRID - 11), rng.randint(0, GRID - rows - 5)
    offset = _jitter(rng, hardness)

    def line(kind: str, row: int, word: str, value: str | None, text: str) -> Thing:
        cells = (x, y + row, x + width, y + row + 1)
        return Thing(kind, cells, offset, _letters(text, x + 1, y + row), word=word, value=value)

    shop, month, day = rng.choice(SHOPS), rng.choice(MONTHS), str(rng.randint(1, 28))
    things = [line("shop", 0, shop, None, shop), line("date", 1, month, day, f"{day:>2} {month}")]
    body = [("item", word, str(price)) for word, price in zip(rng.sample(ITEMS, rows), prices, strict=True)]
    for i, (kind, word, price) in enumerate([*body, ("total", "total", str(sum(prices)))]):
        # Row 2 and the row above the total stay blank: dashed rules are drawn there.
        things.append(line(kind, 3 + i + (kind == "total"), word, price, f"{word:<7}{price:>2}"))
    return tuple(things)
