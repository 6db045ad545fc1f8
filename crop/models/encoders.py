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


class GridEncoder:
    """Qwen2-VL and its kin: patches of all images in one sequence, merged squarewise into tokens behind the last layer.

    Where layers attend inside windows a piece is a window, elsewhere a token. What the tower derives from the grids of whole
    images is handed to it instead: positions, borders of images and windows.
    """

    def pieces(self, prompt: Prompt, layouts: Sequence[VisionLayout]) -> list[Pieces]:
        """Windows in reading order, frame by frame."""
        vision = prompt.config.vision_config
        side = 1
        if hasattr(vision, "window_size"):
            side = vision.window_size // vision.patch_size // vision.spatial_merge_size
        found = []
        for layout in layouts:
            frames, *tokens = layout.extent
            rows, columns = (-(-count // side) for count in tokens)
            piece = (layout.view.long() * rows + layout.row // side) * columns + layout.col // side
            place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2).repeat(frames, 1)
            found.append(Pieces(piece[:, None], torch.zeros(len(place), dtype=torch.bool), place))
        return found

    def take(self, tower: nn.Module, args: tuple, kwargs: dict, images: Sequence[Encoding]) -> tuple[tuple, dict]:
        """Patches of the tokens that are taken, and where they stand.

        Raises:
            RuntimeError: the tower gets another number of patches.
        """
        merge, pixels = tower.spatial_merge_size, args[0]
        tokens = torch.cat([image.tokens for image in images])
        if len(pixels) != len(tokens) * merge**2:
            raise RuntimeError(
                f"patch: the vision tower must get the {len(tokens) * merge**2} patches of the prompt, got {len(pixels)}"
            )
        patches = _patches(torch.nonzero(tokens).flatten(), merge)
        counts = [torch.bincount(image.left.view) for image in images]
        given = {
            "position_ids": torch.cat([_positions(image.left, merge) for image in images]),
            "cu_seqlens": _borders(torch.cat(counts) * merge**2),
        }
        if hasattr(tower, "window_size"):
            given["window_index"], given["cu_window_seqlens"] = _windows(images, merge)
        if hasattr(tower, "num_grid_per_side"):  # learned positions, interpolated
            from transformers.vision_utils import get_vision_interpolation_indices_and_weights

            indices, weights = get_vision_interpolation_indices_and_weights(
                kwargs["grid_thw"].cpu(),
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            given["interp_indices"], given["interp_weights"] = indices[patches], weights[patches]
        given = {name: value.to(pixels.device, non_blocking=True) for name, value in given.items()}
        pixels = pixels[patches.to(pixels.device, non_blocking=True)]
        return (pixels, *args[1:]), kwargs | given

    def put(self, output: Any, images: Sequence[Encoding]) -> Any:
        """Merged tokens, and those of further levels."""
        return put_rows(output, torch.cat([image.tokens for image in images]))


def _patches(tokens: Tensor, merge: int) -> Tensor:
    """Places of the patches of some tokens: those of a token follow each other."""
    return (tokens[:, None] * merge**2 + torch.arange(merge**2)).flatten()


def _positions(layout: VisionLayout, merge: int) -> Tensor:
    """(patches, 2) row and column of every patch of the tokens of a layout."""
    corner = torch.stack([layout.row, layout.col], 1).long() * merge
    inside = torch.cartesian_prod(torch.arange(merge), torch.arange(merge)).view(-1, 2)
    return (corner[:, None] + inside).flatten(0, 1)


def _borders(counts: Tensor) -> Tensor:
    """Where sequences of these lengths begin and end; empty ones are left out."""
    return nn.functional.pad(counts[counts > 0].cumsum(0), (1, 0)).int()


def _windows(images: Sequence[Encoding], merge: int) -> tuple[Tensor, Tensor]:
    """Tokens that are taken in the order of their windows, and the borders of these in patches."""
    order, counts, start = [], [], 0
    for image in images:
        window = image.pieces.of_token[image.tokens, 0]
        order.append(window.argsort(stable=True) + start)
        counts.append(torch.bincount(window) * merge**2)
        start += len(window)
    return torch.cat(order), _borders(torch.cat(counts))


GRID = GridEncoder()
