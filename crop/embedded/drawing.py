"""Drawing things with Pillow, from the font that Pillow carries."""

from __future__ import annotations

import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crop.embedded.things import COLORS, PATCH, SIZE, Thing


@lru_cache(maxsize=256)
def _glyph(character: str, size: int, bold: bool) -> Image.Image:
    """Coverage mask of a character, centred in a cell of 20 x 20 pixels."""
    font = ImageFont.load_default(size)
    mask = Image.new("L", (PATCH + 4, PATCH + 4))
    _, top, _, bottom = font.getbbox("H", anchor="ls")
    place = ((PATCH + 4) / 2, (PATCH + 4 - (bottom - top)) / 2 - top)
    ImageDraw.Draw(mask).text(place, character, 255, font, "ms", stroke_width=0.4 if bold else 0)
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


def draw(things: tuple[Thing, ...], picture: str, rng: random.Random, hardness: float) -> Image.Image:
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


def _draw_thing(
    image: Image.Image, draw: ImageDraw.ImageDraw, thing: Thing, rng: random.Random, hardness: float
) -> None:
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
