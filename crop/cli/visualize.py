"""Pictures of what pruning did: which vision tokens stayed, were pooled, were dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from crop.cli.painting import (
    DROPPED,
    NOTHING,
    PAPER,
    POOLED,
    REGION,
    RING,
    WHOLE,
    Cells,
    edges,
    example_block,
    fit,
    frame,
    lookup,
    owners,
    paint,
    thicken,
    with_legend,
)
from crop.geometry.layout import PADDING, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    unit = max(2, round(max(canvas.size) / 300))
    if region is not None:
        level = layout.levels(region, ring).numpy()
        if ring and not region.is_whole:
            edge = thicken(edges(lookup(level < 2, owner, False)), unit // 2)
            y, x = np.indices(edge.shape)
            pixels[edge & ((x + y) // (4 * unit) % 2 == 0)] = RING
    picture = Image.fromarray(pixels)
    if region is not None:
        frame(picture, region, unit)
    return with_legend(picture, fate, region, ring) if legend else picture


def outlined(image: Image.Image, region: Region) -> Image.Image:
    """The original with the region drawn on it, at the size of ``overlay``.

    Args:
        image: the original.
        region: boxes to draw.
    Returns:
        RGB picture.
    """
    picture = fit(image)
    frame(picture, region, max(2, round(max(picture.size) / 300)))
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
    shown = outlined(image, region) if region is not None else fit(image)
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


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, as wide as all together and as high as the highest."""
    if len(pictures) == 1:
        return pictures[0]
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), PAPER)
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width
    return sheet


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
