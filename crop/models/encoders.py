"""How a vision tower takes part of the pictures, and where what it encodes lands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Encoding, Pieces
from crop.models.family import Prompt


class TileEncoder:
    """Every tile is an image of its own to the tower: one row of its input and of its output.

    Args:
        find: (prompt, layouts) -> pieces of each image, its tiles in the order of the rows.
    """

    def __init__(self, find: Callable[[Prompt, Sequence[VisionLayout]], list[Pieces]]) -> None:
        self.pieces = find

    def take(self, tower: nn.Module, args: tuple, kwargs: dict, images: Sequence[Encoding]) -> tuple[tuple, dict]:
        """Rows of every tensor that has one per tile.

        Raises:
            RuntimeError: the tower gets another number of tiles.
        """
        taken = torch.cat([image.taken for image in images])
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not tensors or len(tensors[0]) != len(taken):
            got = len(tensors[0]) if tensors else 0
            raise RuntimeError(f"patch: the vision tower must get the {len(taken)} tiles of the prompt, got {got}")
        rows = torch.nonzero(taken).flatten().to(tensors[0].device, non_blocking=True)

        def part(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and value.shape[:1] == taken.shape else value

        return tuple(map(part, args)), {name: part(value) for name, value in kwargs.items()}

    def put(self, output: Any, images: Sequence[Encoding]) -> Any:
        """Rows of every tensor that has one per tile."""
        return put_rows(output, torch.cat([image.taken for image in images]))


def put_rows(output: Any, taken: Tensor) -> Any:
    """A tower's output whose tensors have a row for each that was ``taken``, (rows,) bool, with zeros for the others."""
    if isinstance(output, Tensor):
        if len(output) != int(taken.sum()):
            return output
        rows = torch.nonzero(taken).flatten().to(output.device, non_blocking=True)
        return output.new_zeros(len(taken), *output.shape[1:]).index_copy(0, rows, output)
    if isinstance(output, (tuple, list)):
        return type(output)(put_rows(part, taken) for part in output)
    if hasattr(output, "items"):
        for name, value in list(output.items()):
            output[name] = put_rows(value, taken)
    return output


def equal_tiles(prompt: Prompt, layouts: Sequence[VisionLayout]) -> list[Pieces]:
    """Tiles of equally many tokens in the order of the prompt; the smallest view, of one tile, is that of the whole image."""
    found = []
    for layout in layouts:
        counts = torch.bincount(layout.view)
        view = int(counts.argmin())
        tile = torch.arange(len(layout)) // int(counts[view])
        overview = torch.zeros(int(tile[-1]) + 1, dtype=torch.bool)
        overview[tile[layout.view == view]] = True
        found.append(Pieces(tile[:, None], overview))
    return found


EQUAL_TILES = TileEncoder(equal_tiles)
