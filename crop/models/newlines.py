"""Tokens of an image that show none of it: newlines behind rows, markers around a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from crop.geometry.layout import NEWLINE, PADDING, PATCH, VisionLayout


def markers(count: int) -> VisionLayout:
    """A view of ``count`` tokens that show nothing."""
    layout = VisionLayout.grid(count, 1)
    return replace(layout, kind=torch.full_like(layout.kind, NEWLINE))


def with_newlines(center: Tensor, rows: int, columns: int, ending: Sequence[int]) -> VisionLayout:
    """A grid of patches with newlines behind the rows ``ending``."""
    patches = VisionLayout.grid(rows, columns)
    ending = torch.tensor(ending, dtype=torch.int32)
    ends = center[ending * columns].clone()
    ends[:, 0] += columns * (center[columns - 1, 0] - center[0, 0]) / max(columns - 1, 1)
    kind = torch.where(((center < 0) | (center >= 1)).any(1), PADDING, PATCH)
    row, col = torch.cat([patches.row, ending]), torch.cat([patches.col, torch.full_like(ending, columns)])
    order = (row * (columns + 1) + col).argsort()
    return VisionLayout(
        position=torch.arange(len(order)),
        center=torch.cat([center, ends])[order].float(),
        row=row[order],
        col=col[order],
        view=torch.zeros_like(row),
        kind=torch.cat([kind, torch.full((len(ending),), NEWLINE)])[order].to(torch.uint8),
        num_original=len(order),
    )


def with_breaks(layout: VisionLayout) -> VisionLayout:
    """Add the single tokens that stand between the rows of a grid: they go with the row that they end."""
    _, rows, columns = layout.extent
    last = torch.arange(1, rows) * columns - 1
    last = last[layout.position[last + 1] - layout.position[last] == 2]
    if len(last) == 0:
        return layout
    position, order = torch.cat([layout.position, layout.position[last] + 1]).sort()
    center = layout.center[last]
    center[:, 0] += 1 / columns
    return VisionLayout(
        position=position,
        center=torch.cat([layout.center, center])[order],
        row=torch.cat([layout.row, layout.row[last]])[order],
        col=torch.cat([layout.col, layout.col[last] + 1])[order],
        view=torch.cat([layout.view, layout.view[last]])[order],
        kind=torch.cat([layout.kind, torch.full_like(layout.kind[last], NEWLINE)])[order],
        num_original=len(position),
    )
