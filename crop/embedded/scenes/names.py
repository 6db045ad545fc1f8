"""The closed vocabularies of the pictures, and words and numbers that no one can guess."""

from __future__ import annotations

import random
from collections.abc import Collection

SIZE = 384
PATCH = 16
GRID = SIZE // PATCH
BLOCKS = 8  # blocks per side in which places are named

COLORS = {  # bright enough for dark letters
    "red": (236, 84, 74), "green": (96, 196, 96), "blue": (100, 150, 250), "yellow": (246, 226, 70),
    "orange": (250, 164, 52), "purple": (176, 124, 236), "pink": (250, 176, 210), "cyan": (84, 220, 228),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
PICTURES = ("shapes", "signs", "receipt", "table", "chart", "form")
DIRECTIONS = ("left", "right", "above", "below")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789."  # tokens of their own
# Those that are drawn: in small print, B is an 8, D an O and that a zero, G a 6, I a 1, S a 5 and Z a 2.
VOWELS, CONSONANTS = "AEUY", "CFHKLMNPRTVX"
LETTERS = VOWELS + CONSONANTS
LABELS = LETTERS + "23456789"

LOCAL_KINDS = ("text", "color", "shape", "price", "item", "total", "date", "shop", "cell", "row", "value", "field")
RELATION_KINDS = ("relation", "compare", "count")  # each needs all the regions it names
GLOBAL_KINDS = ("global",)
BOX_KIND = "box"  # answered by a place in numbers: four digits, xmin ymin xmax ymax in blocks of an 8 x 8 grid


def word(rng: random.Random, length: int) -> str:
    """Capitals that can be pronounced but are in no dictionary, so that no part of them tells the rest."""
    if rng.random() < 0.25:
        return "".join(rng.choices(LETTERS, k=length))
    first = rng.random() < 0.7
    return "".join(rng.choice(CONSONANTS if (i % 2 == 0) == first else VOWELS) for i in range(length))


def few(rng: random.Random, low: int, high: int) -> int:
    """A number of letters; short words are more likely than long ones."""
    return min(rng.randint(low, high), rng.randint(low, high))


def words(rng: random.Random, count: int, low: int, high: int, taken: Collection[str] = ()) -> list[str]:
    """Different words of ``low`` to ``high`` letters, none of those ``taken``."""
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = word(rng, few(rng, low, high))
        if drawn not in taken:
            found[drawn] = None
    return list(found)


def numbers(rng: random.Random, count: int, low: int, high: int) -> list[str]:
    """Different whole numbers, as many with few digits as with many."""
    found: dict[str, None] = {}
    while len(found) < count:
        digits = rng.randint(len(str(low)), len(str(high)))
        first, last = max(low, 10 ** (digits - 1)), min(high, 10**digits - 1)
        found[str(rng.randint(0 if digits == 1 and low == 0 else first, last))] = None
    return list(found)


def plural(noun: str) -> str:
    """Of a shape or a kind of thing."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def vocabulary() -> tuple[str, ...]:
    """Every token of every question and answer, sorted: words in lower case, and text read from pictures by characters."""
    found = set(COLORS) | set(SHAPES) | set(PICTURES) | set(DIRECTIONS) | set(CHARACTERS) | {"?"}
    found |= set(map(plural, SHAPES))
    found |= set(
        "what kind of picture is this a how many are there on the color shape with has written where does sign say "
        "says that which item costs more less price total date shop items rows row in or is larger smaller box bar "
        "bars tallest shortest taller shorter value next to fields field beside stands comes after before and it "
        "table chart form receipt signs shapes columns first last most least yes no".split()
    )
    return tuple(sorted(found))
