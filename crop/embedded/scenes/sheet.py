"""A canvas that remembers what it draws: where every character lies and which pixels a coloured thing covers."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from crop.embedded.scenes.faces import FACES, PAD, cap_height, glyph, width
from crop.embedded.scenes.names import COLORS, SIZE
from crop.embedded.scenes.records import Box, Run, Thing

Ink = tuple[int, int, int]
DARK = (26, 26, 34)


def outline(shape: str, box: Box) -> list[tuple[float, float]]:
    """Corners of a shape inside a box; a circle has none."""
    if shape == "square":
        unit = [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)]
    elif shape == "triangle":
        unit = [(0.5, 0), (1, 0.97), (0, 0.97)]
    elif shape == "diamond":
        unit = [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]
    elif shape == "cross":
        a, b = 0.3, 0.7
        unit = [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    else:
        turns = [(i, 0.52 if i % 2 == 0 else 0.24) for i in range(10)]
        unit = [(0.5 + r * math.sin(i * math.pi / 5), 0.52 - r * math.cos(i * math.pi / 5)) for i, r in turns]
    x0, y0, x1, y1 = box
    return [(x0 + (x1 - x0) * u, y0 + (y1 - y0) * v) for u, v in unit]


class Sheet:
    """A picture in the making.

    Args:
        rng: the picture's random numbers; hardness: in [0, 1], see ``scenes.scene``.
    """

    def __init__(self, rng: random.Random, hardness: float) -> None:
        self.rng, self.hardness = rng, hardness
        tint = np.array([rng.randint(150, 235) for _ in range(3)], np.float32)
        slope = np.array([[rng.uniform(-20, 20) for _ in range(3)] for _ in range(2)], np.float32) * hardness
        ramp = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
        ground = tint + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]
        self.image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
        self.ids = Image.new("L", (SIZE, SIZE))
        self.pen, self.marker = ImageDraw.Draw(self.image), ImageDraw.Draw(self.ids)
        self.things: list[Thing] = []
        self.runs: list[Run] = []
        self.taken: list[Box] = []
        for _ in range(rng.randint(0, round(6 * hardness))):
            ends = [rng.randint(0, SIZE) for _ in range(4)]
            self.pen.line(ends, tuple(rng.randint(110, 250) for _ in range(3)), rng.choice((1, 1, 2)))

    def scale(self, low: float = 0.4, high: float = 1.5) -> float:
        """A size factor, even on a logarithmic scale; the small end comes with hardness."""
        low = low + (1 - self.hardness) * 0.5 * (high - low)
        return math.exp(self.rng.uniform(math.log(low), math.log(high)))

    def face(self) -> str:
        """One of the faces."""
        return self.rng.choice(FACES)

    def place(self, wide: float, high: float, gap: float = 8) -> tuple[float, float] | None:
        """Upper left corner, in whole pixels, of a free place; None if a few tries find none."""
        if wide > SIZE - 4 or high > SIZE - 4:
            return None
        for _ in range(60):
            x, y = self.rng.randint(2, int(SIZE - 2 - wide)), self.rng.randint(2, int(SIZE - 2 - high))
            if all(x > c + gap or x + wide < a - gap or y > d + gap or y + high < b - gap for a, b, c, d in self.taken):
                self.taken.append((x, y, x + wide, y + high))
                return x, y
        return None

    def write(
        self,
        text: str,
        x: float,
        y: float,
        face: str,
        size: int,
        ink: Ink = DARK,
        *,
        anchor: str = "l",
        rim: Ink | None = None,
    ) -> Run:
        """Draw a line of text with its capitals' middle at height y; x is its left, middle or right by ``anchor``."""
        wide, tall = width(text, face, size), cap_height(face, size)
        start = x - {"l": 0, "m": wide / 2, "r": wide}[anchor]
        top = round(y + tall / 2) - size - PAD
        spots, cursor, marks = [], start, []
        for character in text:
            mask, left, advance = glyph(face, size, character)
            marks.append((round(cursor + left), mask))
            spots.append((cursor + advance / 2, y))
            cursor += advance
        if rim is not None:  # the colour of the shape around letters that reach beyond its edge
            for at, mask in marks:
                for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                    self.image.paste(rim, (at + dx, top + dy), mask)
        for at, mask in marks:
            self.image.paste(ink, (at, top), mask)
        run = Run(text, tuple(spots), (start, y - tall / 2 - 2, cursor, y + tall / 2 + 2))
        self.runs.append(run)
        return run

    def shade(self, color: str) -> Ink:
        """A colour, a little off."""
        reach = 14 * self.hardness
        return tuple(max(0, min(255, c + round(self.rng.uniform(-reach, reach)))) for c in COLORS[color])

    def paint(
        self, kind: str, box: Box, color: str, shape: str | None = None, text: str = "", face: str = "", size: int = 0
    ) -> Thing:
        """Draw a coloured thing, with text in its middle if there is some."""
        fill, number, edge = self.shade(color), len(self.things) + 1, (60, 60, 60)
        x0, y0, x1, y1 = box
        if shape == "circle":
            self.pen.ellipse(box, fill, edge)
            self.marker.ellipse(box, number)
        elif shape is not None:
            self.pen.polygon(outline(shape, box), fill, edge)
            self.marker.polygon(outline(shape, box), number)
        elif kind == "sign":
            radius = self.rng.choice((0, 4, (y1 - y0) / 2.5))
            self.pen.rounded_rectangle(box, radius, fill, edge, 2)
            self.marker.rounded_rectangle(box, radius, number)
        else:
            self.pen.rectangle(box, fill, edge)
            self.marker.rectangle(box, number)
        run = None
        if text:
            middle = (y0 + y1) / 2 + (0.12 * (y1 - y0) if shape == "triangle" else 0)
            run = self.write(text, (x0 + x1) / 2, middle, face, size, anchor="m", rim=fill if kind == "shape" else None)
        self.things.append(Thing(kind, box, color, shape, run))
        return self.things[-1]

    def paper(self, box: Box) -> None:
        """A light page under text."""
        self.pen.rectangle(box, (self.rng.randint(236, 255),) * 3, (150,) * 3)

    def finish(self) -> Image.Image:
        """The picture, with its noise."""
        noise = np.random.default_rng(self.rng.getrandbits(32)).standard_normal((SIZE, SIZE, 1), np.float32)
        noisy = np.asarray(self.image, np.float32) + noise * (4 * self.hardness)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
