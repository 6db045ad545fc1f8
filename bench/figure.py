"""A figure of what the decoder sees, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from crop.cli.painting import DROPPED, POOLED, REGION, RING, Cells, fit
from crop.cli.visualize import outlined, overlay, trace
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region


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
    """
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
