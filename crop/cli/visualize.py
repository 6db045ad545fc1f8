"""Pictures of what pruning did: which vision tokens stayed, were pooled, were dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from crop.geometry.layout import PADDING, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Color = tuple[int, int, int]

REGION: Color = (255, 176, 32)
RING: Color = (64, 196, 255)
EDGE: Color = (255, 255, 255)
PAPER: Color = (250, 250, 248)
INK: Color = (32, 34, 40)
FAINT: Color = (122, 126, 136)
SHORTEST = 448  # pixels of the longer side to which small pictures are enlarged
NOTHING, DROPPED, POOLED, WHOLE = range(4)


@dataclass(frozen=True)
class Cells:
    """Fate of every vision token of one image.

    Args:
        state: (N,) int NOTHING (padding), DROPPED, POOLED or WHOLE.
        cell: (N,) int number of the pooling cell, -1 where the token is in none.
    """

    state: np.ndarray
    cell: np.ndarray

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


def trace(layout: VisionLayout, plan: PoolPlan | None, kept: Tensor | None) -> Cells:
    """What became of each token.

    Args:
        layout: the N tokens of one image before pruning.
        plan: its pooling, None where there was none.
        kept: (K,) int64 tokens that reach the last layer (of pooled cells the leaders), as in ``PruneStats.kept``;
            None: all.
    Returns:
        Cells.
    Raises:
        ValueError: the plan is for another number of tokens, or an index is out of range.
    """
    plan = PoolPlan.identity(len(layout)) if plan is None else plan
    if plan.num_tokens != len(layout):
        raise ValueError(f"trace: plan.num_tokens must be N={len(layout)}, got {plan.num_tokens}")
    kept = plan.leader.long() if kept is None else kept
    if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < len(layout):
        raise ValueError(f"trace: kept must be in [0, N={len(layout)}), got {kept.tolist()}")
    cell = plan.inverse.numpy()
    alive = np.zeros(plan.num_out + 1, dtype=bool)  # the last entry serves tokens in no cell
    alive[cell[kept.numpy()]] = True
    alive[-1] = False
    single = np.append(plan.counts.numpy() == 1, False)
    state = np.where(alive[cell], np.where(single[cell], WHOLE, POOLED), DROPPED)
    state[(layout.kind == PADDING).numpy()] = NOTHING
    return Cells(state, cell)


def overlay(
    image: Image.Image,
    layout: VisionLayout,
    plan: PoolPlan | None = None,
    kept: Tensor | None = None,
    region: Region | None = None,
    *,
    ring: int = 1,
    legend: bool = True,
    view: int | None = None,
) -> Image.Image:
    """The image as the language model gets to see it.

    Tokens kept whole show the image as it is, pooled cells their mean colour inside their merged outline, dropped
    tokens are dark and hatched; what the processor cropped away is black. The region is drawn in orange, its ring
    dashed in blue.

    Args:
        image: the original, any mode and size; small ones are enlarged.
        layout, plan, kept: as in ``trace``.
        region: what the localizer found; None draws none.
        ring: tokens around the region to outline, 0 for none.
        legend: whether to add a strip below that explains the colours and counts the tokens.
        view: which view of the image to show where the model gets several (base view, tiles); None: the last, which is
            the finest.
    Returns:
        RGB picture.
    Raises:
        ValueError: see ``trace``.
    """
    fate = trace(layout, plan, kept)
    canvas = _enlarge(image)
    owner = _owners(layout, canvas.size, layout.extent[0] - 1 if view is None else view)
    pixels = _paint(np.asarray(canvas), owner, fate)
    unit = max(2, round(max(canvas.size) / 300))
    if region is not None:
        level = layout.levels(region, ring).numpy()
        if ring and not region.is_whole:
            edge = _thicken(_edges(_lookup(level < 2, owner, False)), unit // 2)
            y, x = np.indices(edge.shape)
            pixels[edge & ((x + y) // (4 * unit) % 2 == 0)] = RING
    picture = Image.fromarray(pixels)
    if region is not None:
        _frame(picture, region, unit)
    return _with_legend(picture, fate, region, ring) if legend else picture


def outlined(image: Image.Image, region: Region) -> Image.Image:
    """The original with the region drawn on it, enlarged like ``overlay``.

    Args:
        image: the original.
        region: boxes to draw.
    Returns:
        RGB picture.
    """
    picture = _enlarge(image)
    _frame(picture, region, max(2, round(max(picture.size) / 300)))
    return picture


def layer_figure(
    image: Image.Image,
    layout: VisionLayout,
    plan: PoolPlan | None = None,
    kept: Mapping[int, Tensor | None] | None = None,
    region: Region | None = None,
    *,
    num_layers: int | None = None,
    ring: int = 1,
    title: str = "",
) -> Figure:
    """What the decoder sees, layer by layer: the image with its region, then one panel per run of layers.

    Args:
        image, layout, plan, region, ring: as in ``overlay``; several views make as many rows.
        kept: first layer of the run -> (K,) int64 tokens that it sees, as ``PruneStats.kept_at`` gives them; None: all
            that pooling left. Default: one run, everything.
        num_layers: of the decoder, for the panels' headings.
        title: above the figure.
    Returns:
        matplotlib Figure; ``savefig`` writes it as PDF, SVG (text stays text) or PNG.
    Raises:
        ValueError: see ``trace``; runs that do not begin at layer 0.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kept = {0: None} if kept is None else dict(sorted(kept.items()))
    if 0 not in kept:
        raise ValueError(f"layer_figure: kept must begin at layer 0, got layers {list(kept)}")
    views, starts = layout.extent[0], list(kept)
    width, height = image.size
    side = 2.7
    figure = Figure(
        figsize=(side * (1 + len(starts)), side * views * height / width + 1.1), layout="constrained", dpi=200
    )
    axes = figure.subplots(views, 1 + len(starts), squeeze=False)
    shown = outlined(image, region) if region is not None else _enlarge(image)
    states = set()
    for row in range(views):
        panels = [("image" if views == 1 else f"image, view {row + 1} of {views}", shown, f"{len(layout)} tokens")]
        for start, stop in zip(starts, [*starts[1:], num_layers], strict=True):
            fate = trace(layout, plan, kept[start])
            states |= set(fate.state.tolist())
            here = Cells(fate.state[layout.view.numpy() == row], fate.cell[layout.view.numpy() == row])
            counts = here.counts if views > 1 else fate.counts
            picture = overlay(image, layout, plan, kept[start], region, ring=ring, legend=False, view=row)
            panels.append((_layers(start, stop), picture, _counted(counts)))
        for place, (heading, picture, below) in zip(axes[row], panels, strict=True):
            place.imshow(np.asarray(picture))
            place.set_title(heading, fontsize=9)
            place.set_xlabel(below, fontsize=8)
            place.set_xticks([])
            place.set_yticks([])
            for spine in place.spines.values():
                spine.set_linewidth(0.5)
    handles = [Patch(facecolor="white", edgecolor="black", label="kept whole (shown as it is)")]
    if POOLED in states:
        handles.append(Patch(facecolor="#b9b0a4", edgecolor="white", label="pooled (mean colour of a cell)"))
    if DROPPED in states:
        handles.append(Patch(facecolor="#222222", edgecolor="#777777", hatch="///", label="dropped"))
    if region is not None and not region.is_whole:
        handles.append(Patch(facecolor="none", edgecolor=np.divide(REGION, 255), linewidth=2, label="region"))
        if ring:
            handles.append(Patch(facecolor="none", edgecolor=np.divide(RING, 255), linestyle="--", label="ring"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _layers(start: int, stop: int | None) -> str:
    if stop is None:
        return f"from layer {start}"
    return f"layer {start}" if stop == start + 1 else f"layers {start} to {stop - 1}"


def _counted(counts: dict[str, int]) -> str:
    parts = [f"{counts['whole']} whole"] if counts["whole"] or not counts["pooled"] else []
    if counts["pooled"]:
        parts.append(f"{counts['pooled']} pooled of {counts['members']}")
    if counts["dropped"]:
        parts.append(f"{counts['dropped']} dropped")
    return f"{counts['whole'] + counts['pooled']} tokens\n" + ", ".join(parts)


def contact_sheet(rows: Sequence[tuple[Sequence[Image.Image], str, str]], *, columns: int = 2) -> Image.Image:
    """Several examples on one sheet.

    Args:
        rows: (pictures side by side, headline, line below it) per example.
        columns: examples per line of the sheet.
    Returns:
        RGB picture.
    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("contact_sheet: rows must hold at least one example, got none")
    blocks = [_block(*row) for row in rows]
    width, height = (max(block.size[axis] for block in blocks) for axis in (0, 1))
    gap = 28
    lines = -(-len(blocks) // columns)
    columns = min(columns, len(blocks))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, lines * (height + gap) + gap), PAPER)
    for number, block in enumerate(blocks):
        line, column = divmod(number, columns)
        sheet.paste(block, (gap + column * (width + gap), gap + line * (height + gap)))
    return sheet


# Painting


def _enlarge(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    factor = SHORTEST / max(image.size)
    if factor <= 1:
        return image.copy()
    size = (max(1, round(side * factor)) for side in image.size)
    return image.resize(tuple(size), Image.Resampling.LANCZOS)


def _owners(layout: VisionLayout, size: tuple[int, int], view: int) -> np.ndarray:
    """(height, width) token of a view that each pixel belongs to, -1 where there is none."""
    width, height = size
    owner = np.full((height, width), -1)
    corners = (layout.cells * (width, height, width, height)).round().astype(int).clip(0)
    for token in np.flatnonzero(((layout.kind != PADDING) & (layout.view == view)).numpy()):
        x0, y0, x1, y1 = corners[token]
        owner[y0:y1, x0:x1] = token
    return owner


def _lookup(values: np.ndarray, owner: np.ndarray, fill: int | bool) -> np.ndarray:
    """Value of the token under each pixel."""
    return np.append(values, fill)[owner]


def _edges(label: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour carries another label."""
    edge = np.zeros(label.shape, dtype=bool)
    edge[:, :-1] |= label[:, 1:] != label[:, :-1]
    edge[:-1] |= label[1:] != label[:-1]
    return edge


def _thicken(mask: np.ndarray, by: int) -> np.ndarray:
    for _ in range(2):
        grown = mask.copy()
        for step in range(1, by + 1):
            grown[step:] |= mask[:-step]
            grown[:-step] |= mask[step:]
        mask = grown.T
    return mask


def _paint(pixels: np.ndarray, owner: np.ndarray, fate: Cells) -> np.ndarray:
    state = _lookup(fate.state, owner, NOTHING)
    cell = np.where(state == POOLED, _lookup(fate.cell, owner, -1), -1)
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
    border = _edges(np.where(pooled, cell, -state - 1))
    shown = border & (pooled | np.roll(pooled, -1, 0) | np.roll(pooled, -1, 1))
    out[shown] = 0.45 * out[shown] + 0.55 * np.array(EDGE)
    return out.clip(0, 255).astype(np.uint8)


def _frame(picture: Image.Image, region: Region, unit: int) -> None:
    """Outline of the boxes: orange in a dark casing, so that it reads on any ground."""
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    for x0, y0, x1, y1 in region.boxes:
        box = [round(x0 * width), round(y0 * height), round(x1 * width) - 1, round(y1 * height) - 1]
        draw.rectangle(box, outline=(0, 0, 0), width=2 * unit)
        half = max(1, unit // 2)
        inner = [box[0] + half, box[1] + half, box[2] - half, box[3] - half]
        if inner[0] < inner[2] and inner[1] < inner[3]:
            draw.rectangle(inner, outline=REGION, width=unit)


# Text


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _with_legend(picture: Image.Image, fate: Cells, region: Region | None, ring: int) -> Image.Image:
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
    font, swatch, gap = _font(size), size, size // 2
    lines: list[list[tuple[str, str, int]]] = [[]]
    x = gap
    for kind, text in entries:
        length = swatch + gap + round(font.getlength(text)) + 2 * gap
        if lines[-1] and x + length > picture.width:
            lines.append([])
            x = gap
        lines[-1].append((kind, text, x))
        x += length
    height = len(lines) * (size + gap) + 2 * gap
    out = Image.new("RGB", (picture.width, picture.height + height), PAPER)
    out.paste(picture)
    draw = ImageDraw.Draw(out)
    for number, line in enumerate(lines):
        y = picture.height + gap + gap // 2 + number * (size + gap)
        for kind, text, x in line:
            _swatch(out, kind, (x, y, x + swatch, y + swatch))
            draw.text((x + swatch + gap, y + swatch / 2), text, INK, font, "lm")
    return out


def _swatch(picture: Image.Image, kind: str, box: tuple[int, int, int, int]) -> None:
    draw = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = box
    if kind == "whole":
        for part, color in enumerate(((236, 92, 72), (250, 200, 60), (70, 150, 230))):
            left = x0 + part * (x1 - x0) // 3
            draw.rectangle((left, y0, x0 + (part + 1) * (x1 - x0) // 3, y1), color)
    elif kind == "pooled":
        draw.rectangle(box, (168, 160, 150), (255, 255, 255))
        draw.rectangle(box, None, FAINT)
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


def _block(pictures: Sequence[Image.Image], headline: str, line: str) -> Image.Image:
    gap, big, small = 10, 22, 17
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    height = max(picture.height for picture in pictures) + 2 * gap + big + small + 8
    block = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), headline, INK, _font(big))
    draw.text((0, big + 8), line, FAINT, _font(small))
    x = 0
    for picture in pictures:
        block.paste(picture, (x, big + small + 8 + 2 * gap))
        x += picture.width + gap
    return block
