"""Glyphs of four faces: subsets of DejaVu that lie beside this file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FILES = sorted((Path(__file__).parent / "faces").glob("*.ttf"))
FACES = tuple(path.stem for path in FILES)
NARROWEST = 0.8  # least advance in em: letters are spaced widely
SMALLEST = 20  # pixels; then a patch holds the centre of one character at most
PAD = 3


@lru_cache(maxsize=512)
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """A face at a size in pixels."""
    path = Path(__file__).parent / "faces" / f"{face}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=512)
def cap_height(face: str, size: int) -> float:
    """Height of a capital in pixels."""
    _, top, _, bottom = font(face, size).getbbox("H", anchor="ls")
    return bottom - top


@lru_cache(maxsize=32768)
def glyph(face: str, size: int, character: str) -> tuple[Image.Image, float, float]:
    """Coverage mask of a character with its baseline ``size + PAD`` below the top, the free width on its left, its advance."""
    drawn = font(face, size)
    length = drawn.getlength(character)
    advance = max(length, NARROWEST * size) + max(0.5, 0.02 * size)
    mask = Image.new("L", (round(length) + 2 * PAD + size // 4, round(1.35 * size) + 2 * PAD))
    ImageDraw.Draw(mask).text((PAD, size + PAD), character, 255, drawn, "ls")
    return mask, (advance - length) / 2 - PAD, advance


def width(text: str, face: str, size: int) -> float:
    """Width of a line of text in pixels."""
    return sum(glyph(face, size, c)[2] for c in text)
