"""Pictures of what pruning did: which vision tokens stayed, were pooled, were dropped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from crop.cli.painting import (
    DROPPED,
    FAINT,
    INK,
    NOTHING,
    PAPER,
    POOLED,
    WHOLE,
    Cells,
    dash,
    fit,
    frame,
    line_width,
    lookup,
    owners,
    paint,
    with_legend,
)
from crop.geometry.layout import PADDING, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region


def trace(layout: VisionLayout, plan: PoolPlan | None, kept: Tensor | None) -> Cells:
    """What became of each token.

    Args:
        layout: the N tokens of one image before pruning.
        plan: its pooling, None where there was none.
        kept: (K,) int64 tokens that reach the last layer (of pooled cells the leaders), as in ``PruneStats.kept``;
            None: all.
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
        image: the original, any mode and size; drawn with 448 to 1600 pixels on the longer side.
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
    canvas = fit(image)
    owner = owners(layout, canvas.size, layout.extent[0] - 1 if view is None else view)
    pixels = paint(np.asarray(canvas), owner, fate)
    if region is not None and ring and not region.is_whole:
        near = layout.levels(region, ring).numpy() < 2
        dash(pixels, lookup(near, owner, False), line_width(canvas))
    picture = Image.fromarray(pixels)
    if region is not None:
        frame(picture, region)
    return with_legend(picture, fate, region, ring) if legend else picture


def outlined(image: Image.Image, region: Region) -> Image.Image:
    """The original with the region drawn on it, RGB, at the size of ``overlay``."""
    picture = fit(image)
    frame(picture, region)
    return picture


def beside(pictures: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Pictures side by side, as wide as all together and as high as the highest."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    sheet, x = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER), 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + gap
    return sheet


def example_block(pictures: Sequence[Image.Image], headline: str, line: str) -> Image.Image:
    """Two lines of text, and pictures side by side below them."""
    gap, big, small = 10, 22, 17
    row, top = beside(pictures, gap), big + small + 8 + 2 * gap
    block = Image.new("RGB", (row.width, top + row.height), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), headline, INK, ImageFont.load_default(big))
    draw.text((0, big + 8), line, FAINT, ImageFont.load_default(small))
    block.paste(row, (0, top))
    return block


def contact_sheet(rows: Sequence[tuple[Sequence[Image.Image], str, str]], *, columns: int = 2) -> Image.Image:
    """Several examples on one RGB sheet.

    Args:
        rows: (pictures side by side, headline, line below it) per example.
        columns: examples per line of the sheet.
    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("contact_sheet: rows must hold at least one example, got none")
    blocks = [example_block(*row) for row in rows]
    width, height = (max(block.size[axis] for block in blocks) for axis in (0, 1))
    gap = 28
    lines = -(-len(blocks) // columns)
    columns = min(columns, len(blocks))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, lines * (height + gap) + gap), PAPER)
    for number, block in enumerate(blocks):
        line, column = divmod(number, columns)
        sheet.paste(block, (gap + column * (width + gap), gap + line * (height + gap)))
    return sheet
