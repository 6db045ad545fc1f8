"""Pixels of overlays: cells in their colours, frames, legends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from crop.geometry.layout import PADDING, VisionLayout
from crop.geometry.region import Region

Color = tuple[int, int, int]

REGION: Color = (255, 176, 32)
RING: Color = (64, 196, 255)
EDGE: Color = (255, 255, 255)
PAPER: Color = (250, 250, 248)
INK: Color = (32, 34, 40)
FAINT: Color = (122, 126, 136)
SHORTEST, LONGEST = 448, 1600  # pixels of the longer side that pictures are drawn with
NOTHING, DROPPED, POOLED, WHOLE = range(4)


@dataclass(frozen=True)
class Cells:
    """Fate of every vision token of one image."""

    state: np.ndarray  # (N,) int NOTHING (padding), DROPPED, POOLED or WHOLE
    cell: np.ndarray  # (N,) int number of the pooling cell, -1 where the token is in none

    @property
    def counts(self) -> dict[str, int]:
        """Tokens that reach the last layer whole and pooled, the originals behind the pooled ones, and the dropped."""
        pooled = self.state == POOLED
        return {
            "whole": int(np.count_nonzero(self.state == WHOLE)),
            "pooled": len(np.unique(self.cell[pooled])),
            "members": int(np.count_nonzero(pooled)),
            "dropped": int(np.count_nonzero(self.state == DROPPED)),
        }


def fit(image: Image.Image) -> Image.Image:
    """RGB, at a size to draw on: a small one made larger, a large one smaller."""
    longer = max(image.size)
    size = tuple(max(1, round(side * min(max(longer, SHORTEST), LONGEST) / longer)) for side in image.size)
    if longer >= 2 * LONGEST and image.mode == "RGB":
        image = image.reduce(longer // LONGEST)  # quick; the rest is for the filter
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def owners(layout: VisionLayout, size: tuple[int, int], view: int) -> np.ndarray:
    """(height, width) token of a view that each pixel belongs to, -1 where there is none."""
    width, height = size
    owner = np.full((height, width), -1)
    corners = (layout.cells * (width, height, width, height)).round().astype(int).clip(0)
    for token in np.flatnonzero(((layout.kind != PADDING) & (layout.view == view)).numpy()):
        x0, y0, x1, y1 = corners[token]
        owner[y0:y1, x0:x1] = token
    return owner


def lookup(values: np.ndarray, owner: np.ndarray, fill: int | bool) -> np.ndarray:
    """Value of the token under each pixel, ``fill`` where there is none."""
    return np.append(values, fill)[owner]


def edges(label: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour carries another label."""
    edge = np.zeros(label.shape, dtype=bool)
    edge[:, :-1] |= label[:, 1:] != label[:, :-1]
    edge[:-1] |= label[1:] != label[:-1]
    return edge


def dash(pixels: np.ndarray, inside: np.ndarray, unit: int) -> None:
    """Dashed outline of some pixels: (height, width, 3) uint8 to draw on, (height, width) bool, width of the line."""
    window = ImageFilter.MaxFilter(unit // 2 * 2 + 1)
    edge = np.asarray(Image.fromarray(edges(inside).astype(np.uint8)).filter(window)) > 0
    y, x = np.indices(edge.shape)
    pixels[edge & ((x + y) // (4 * unit) % 2 == 0)] = RING


def paint(pixels: np.ndarray, owner: np.ndarray, fate: Cells) -> np.ndarray:
    """The picture in the colours of what became of its tokens.

    Args:
        pixels: (height, width, 3) uint8. owner: from ``owners``. fate: of the tokens.
    """
    state = lookup(fate.state, owner, NOTHING)
    cell = np.where(state == POOLED, lookup(fate.cell, owner, -1), -1)
    out = pixels.astype(np.float32)

    pooled = cell >= 0
    total = np.bincount(cell[pooled], minlength=1)
    for channel in range(3):
        mean = np.bincount(cell[pooled], pixels[..., channel][pooled], minlength=1) / np.maximum(total, 1)
        out[..., channel][pooled] = mean[cell[pooled]]

    dropped = state == DROPPED
    gray = pixels[dropped].mean(1, keepdims=True)
    out[dropped] = 18 + 0.20 * (0.5 * pixels[dropped] + 0.5 * gray)
    y, x = np.indices(state.shape)
    out[dropped & ((x + y) % 9 == 0)] += 26
    out[state == NOTHING] = 0

    # Thin borders: between cells, and between what stays and what does not.
    border = edges(np.where(pooled, cell, -state - 1))
    shown = border & (pooled | np.roll(pooled, -1, 0) | np.roll(pooled, -1, 1))
    out[shown] = 0.45 * out[shown] + 0.55 * np.array(EDGE)
    return out.clip(0, 255).astype(np.uint8)


def line_width(picture: Image.Image) -> int:
    """Pixels of a line that can be seen."""
    return max(2, round(max(picture.size) / 300))


def frame(picture: Image.Image, region: Region) -> None:
    """Outline of the boxes: orange in a dark casing, so that it reads on any ground."""
    draw, unit = ImageDraw.Draw(picture), line_width(picture)
    width, height = picture.size
    for x0, y0, x1, y1 in region.boxes:
        left, top = min(round(x0 * width), width - 1), min(round(y0 * height), height - 1)
        box = [left, top, max(round(x1 * width) - 1, left), max(round(y1 * height) - 1, top)]
        draw.rectangle(box, outline=(0, 0, 0), width=2 * unit)
        half = max(1, unit // 2)
        inner = [box[0] + half, box[1] + half, box[2] - half, box[3] - half]
        if inner[0] < inner[2] and inner[1] < inner[3]:
            draw.rectangle(inner, outline=REGION, width=unit)


def with_legend(picture: Image.Image, fate: Cells, region: Region | None, ring: int) -> Image.Image:
    """The picture above a strip that explains the colours and counts the tokens."""
    counts = fate.counts
    entries = [("whole", f"{counts['whole']} tokens kept whole")]
    if counts["pooled"]:
        entries.append(("pooled", f"{counts['pooled']} pooled (from {counts['members']})"))
    entries.append(("dropped", f"{counts['dropped']} dropped"))
    if region is not None:
        name = "whole image" if region.is_whole else "region"
        entries.append(("region", f"{name}, confidence {region.confidence:.2f}"))
        if ring and not region.is_whole:
            entries.append(("ring", "ring"))
    size = max(13, round(max(picture.size) / 32))
    font, swatch, gap = ImageFont.load_default(size), size, size // 2
    places, x, line = [], gap, 0
    for kind, text in entries:
        length = swatch + gap + round(font.getlength(text)) + 2 * gap
        if x > gap and x + length > picture.width:
            x, line = gap, line + 1
        places.append((kind, text, x, picture.height + gap + gap // 2 + line * (size + gap)))
        x += length
    out = ImageOps.expand(picture, (0, 0, 0, (line + 1) * (size + gap) + 2 * gap), PAPER)
    draw = ImageDraw.Draw(out)
    for kind, text, x, y in places:
        draw_swatch(out, kind, (x, y, x + swatch, y + swatch))
        draw.text((x + swatch + gap, y + swatch / 2), text, INK, font, "lm")
    return out


def draw_swatch(picture: Image.Image, kind: str, box: tuple[int, int, int, int]) -> None:
    draw = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = box
    if kind == "whole":
        for part, color in enumerate(((236, 92, 72), (250, 200, 60), (70, 150, 230))):
            left = x0 + part * (x1 - x0) // 3
            draw.rectangle((left, y0, x0 + (part + 1) * (x1 - x0) // 3, y1), color)
    elif kind == "pooled":
        draw.rectangle(box, (168, 160, 150), FAINT)
    elif kind == "dropped":
        tile = np.full((y1 - y0 + 1, x1 - x0 + 1, 3), 34, np.uint8)
        y, x = np.indices(tile.shape[:2])
        tile[(x + y) % 5 == 0] = 90
        picture.paste(Image.fromarray(tile), (x0, y0))
    elif kind == "region":
        draw.rectangle(box, None, (0, 0, 0), 4)
        draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), None, REGION, 2)
    else:
        for left in range(x0, x1, 6):
            draw.line((left, y0, min(left + 3, x1), y0), RING, 2)
            draw.line((left, y1, min(left + 3, x1), y1), RING, 2)
