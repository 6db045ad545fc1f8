"""How a vision tower takes part of the pictures, and where what it encodes lands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Copy, Encoding, Pieces
from crop.models.clip import TOWERS, class_tokens, tower_layers
from crop.models.family import Prompt
from crop.ops.transfer import upload


class AtTheInput:
    """What is left out is left out before the first layer, in all models of a family."""

    def fits(self, config: Any) -> bool:
        """Always."""
        return True

    def layers(self, tower: nn.Module) -> Sequence[nn.Module]:
        """None."""
        return ()

    def take_at(self, number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """As they are."""
        return args, kwargs


class TileEncoder(AtTheInput):
    """Every tile is an image of its own to the tower: one row of its input and of its output.

    Args:
        find: (prompt, layouts) -> pieces of each image, its tiles in the order of the rows.
    """

    def __init__(self, find: Callable[[Prompt, Sequence[VisionLayout]], list[Pieces]]) -> None:
        self.pieces = find

    def take(
        self, tower: nn.Module, args: tuple, kwargs: dict, images: Sequence[Encoding]
    ) -> tuple[tuple, dict, Tensor]:
        """Rows of every tensor that has one per tile, and their numbers.

        Raises:
            RuntimeError: the tower gets another number of tiles.
        """
        taken = torch.cat([image.taken for image in images])
        pixels = _first(args, kwargs, len(taken), "tiles")
        (rows,) = upload([torch.nonzero(taken).flatten()], pixels.device)

        def part(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and value.shape[:1] == taken.shape else value

        return tuple(map(part, args)), {name: part(value) for name, value in kwargs.items()}, rows

    def lengths(self, tower: nn.Module, images: Sequence[Encoding]) -> list[list[int]]:
        """A tile is a sequence."""
        tiles = [_of_a_picture(tower)] * sum(int(image.taken.sum()) for image in images)
        return [tiles] * tower.config.num_hidden_layers

    def put(self, tower: nn.Module, output: Any, place: Tensor, images: Sequence[Encoding]) -> Any:
        """Rows of every tensor that has one per tile."""
        return put_rows(output, place, sum(len(image.taken) for image in images))


def _first(args: tuple, kwargs: dict, count: int, what: str) -> Tensor:
    """The first tensor of a call of the tower. RuntimeError: it has another number of rows than ``count``."""
    found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if found is None or len(found) != count:
        got = 0 if found is None else len(found)
        raise RuntimeError(f"patch: the vision tower must get the {count} {what} of the prompt, got {got}")
    return found


def extra_tokens(tower: nn.Module) -> int:
    """Tokens before the patches of a sequence: a class token, or none."""
    names = ("class_embedding", "cls_token")
    return sum(name.rpartition(".")[2] in names for name, _ in tower.named_parameters())


def _of_a_picture(tower: nn.Module) -> int:
    """Tokens that a tower makes of a picture or a tile of fixed size."""
    config = tower.config
    size, side = ([one] * 2 if isinstance(one, int) else one for one in (config.image_size, config.patch_size))
    return (size[0] // side[0]) * (size[1] // side[1]) + extra_tokens(tower)


def put_rows(output: Any, place: Tensor, total: int) -> Any:
    """A tower's output whose tensors have a row for each ``place``, (rows,) int64, as one of ``total`` rows.

    Rows whose place is ``total`` are left out; what has none is zero.
    """
    if isinstance(output, Tensor):
        if len(output) != len(place):
            return output
        place = place.to(output.device, non_blocking=True)  # a tower on several devices may end on another one
        return output.new_zeros(total + 1, *output.shape[1:]).index_copy_(0, place, output)[:total]
    if isinstance(output, (tuple, list)):
        return type(output)(put_rows(part, place, total) for part in output)
    if hasattr(output, "items"):
        for name, value in list(output.items()):
            output[name] = put_rows(value, place, total)
    return output


def equal_tiles(prompt: Prompt, layouts: Sequence[VisionLayout], whole_first: bool = False) -> list[Pieces]:
    """Tiles of equally many tokens in the order of the prompt; the smallest view, of one tile, is that of the whole image.

    Args:
        whole_first: that view precedes the tiles, else it follows them; decides where each tile is a view of its own.
    """
    found = []
    for layout in layouts:
        counts = torch.bincount(layout.view)
        smallest = torch.nonzero(counts == counts.min()).flatten()
        view = int(smallest[0 if whole_first else -1])
        tile = torch.arange(len(layout)) // int(counts[view])
        overview = torch.zeros(int(tile[-1]) + 1, dtype=torch.bool)
        overview[tile[layout.view == view]] = True
        found.append(Pieces(tile[:, None], overview))
    return found


EQUAL_TILES = TileEncoder(equal_tiles)
EQUAL_TILES_WHOLE_FIRST = TileEncoder(partial(equal_tiles, whole_first=True))


class GridEncoder(AtTheInput):
    """Qwen2-VL and its kin: patches of all images in one sequence, merged squarewise into tokens behind the last layer.

    Where layers attend inside windows a piece is a window, elsewhere a token; the last piece is a copy of the picture at low
    resolution, made of its patches, to the tower one more picture. What the tower derives from the grids of whole images is
    handed to it instead: positions, borders of images and windows.

    Args:
        times: how many times smaller the sides of the copy are.
    """

    def __init__(self, times: int = 4) -> None:
        self.times = times

    def pieces(self, prompt: Prompt, layouts: Sequence[VisionLayout]) -> list[Pieces]:
        """Windows in reading order, frame by frame, and the copy."""
        vision = prompt.config.vision_config
        side, found = _window_side(vision, vision.spatial_merge_size), []
        for layout in layouts:
            frames, *tokens = layout.extent
            rows, columns = (-(-count // side) for count in tokens)
            place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2).repeat(frames, 1)
            place = torch.cat([place, torch.full((1, 2), -1)])
            overview = torch.arange(len(place)) == len(place) - 1
            found.append(Pieces(_window(layout, side)[:, None], overview, place, Copy.of(layout, self.times)))
        return found

    def take(
        self, tower: nn.Module, args: tuple, kwargs: dict, images: Sequence[Encoding]
    ) -> tuple[tuple, dict, Tensor]:
        """Patches of the tokens that are taken and of the copies, where they stand, and where the tokens will.

        Raises:
            RuntimeError: the tower gets another number of patches.
        """
        merge, pixels = tower.spatial_merge_size, args[0]
        own = torch.cat([image.own for image in images])
        if len(pixels) != len(own) * merge**2:
            raise RuntimeError(
                f"patch: the vision tower must get the {len(own) * merge**2} patches of the prompt, got {len(pixels)}"
            )
        tokens = torch.nonzero(own).flatten()
        patches = _patches(tokens, merge)
        # What the tower gets, and the pictures that it is of.
        parts = [(image.layout.take(image.own), image.layout) for image in images]
        parts += [(image.copy, image.copy) for image in images if image.copy is not None]
        counts = [torch.bincount(part.view) for part, _ in parts]
        sides = [torch.tensor([1, *(merge * side for side in whole.extent[1:])]) for _, whole in parts]
        grids = [side.expand(int((count > 0).sum()), 3) for side, count in zip(sides, counts, strict=True)]
        given = {
            "grid_thw": torch.cat(grids),  # a row for every sequence
            "position_ids": torch.cat([_positions(part, merge) for part, _ in parts]),
            "cu_seqlens": _borders(torch.cat(counts) * merge**2),
        }
        if hasattr(tower, "window_size"):
            windows = [_window(part, _window_side(tower, merge)) for part, _ in parts]
            given["window_index"], given["cu_window_seqlens"] = _windows(windows, merge)
        if hasattr(tower, "num_grid_per_side"):  # learned positions, interpolated
            from transformers.vision_utils import get_vision_interpolation_indices_and_weights

            frames = [torch.tensor([whole.extent[0], 1, 1]) for _, whole in parts]
            indices, weights = get_vision_interpolation_indices_and_weights(
                torch.stack([count * side for count, side in zip(frames, sides, strict=True)]),
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            shown = torch.cat([patches, torch.arange(len(own) * merge**2, len(indices))])
            given["interp_indices"], given["interp_weights"] = indices[shown], weights[shown]
        place, start = [tokens], 0
        for image in images:
            place.append(torch.where(image.places < 0, len(own), image.places + start))
            start += len(image.layout)
        patches, landing, *values = upload([patches, torch.cat(place), *given.values()], pixels.device)
        chosen = [pixels[patches]]
        for image, whole in zip(images, pixels.split([len(image.layout) * merge**2 for image in images]), strict=True):
            if image.copy is not None:
                chosen.append(_smaller(whole, image.layout.extent, image.copy.extent, tower.config.patch_size, merge))
        return (torch.cat(chosen), *args[1:]), kwargs | dict(zip(given, values, strict=True)), landing

    def lengths(self, tower: nn.Module, images: Sequence[Encoding]) -> list[list[int]]:
        """Frames, or windows of them, of what is taken and of the copies."""
        merge, depth = tower.spatial_merge_size, tower.config.depth
        parts = [image.layout.take(image.own) for image in images]
        parts += [image.copy for image in images if image.copy is not None]

        def counted(numbers: list[Tensor]) -> list[int]:
            return [merge**2 * count for one in numbers for count in torch.bincount(one).tolist() if count]

        frames = counted([part.view for part in parts])
        if not hasattr(tower, "window_size"):
            return [frames] * depth
        windows = counted([_window(part, _window_side(tower, merge)) for part in parts])
        return [frames if layer in tower.fullatt_block_indexes else windows for layer in range(depth)]

    def put(self, tower: nn.Module, output: Any, place: Tensor, images: Sequence[Encoding]) -> Any:
        """Merged tokens, and those of further levels."""
        return put_rows(output, place, sum(len(image.layout) for image in images))


def _window_side(vision: Any, merge: int) -> int:
    """Tokens in a row of a window, of a tower or its configuration; 1 where no layer attends inside windows."""
    return vision.window_size // vision.patch_size // merge if hasattr(vision, "window_size") else 1


def _window(layout: VisionLayout, side: int) -> Tensor:
    """(N,) int64 number of the window of every token, in reading order."""
    _, rows, columns = layout.extent
    rows, columns = -(-rows // side), -(-columns // side)
    return (layout.view.long() * rows + layout.row // side) * columns + layout.col // side


def _smaller(pixels: Tensor, extent: Sequence[int], small: Sequence[int], side: int, merge: int) -> Tensor:
    """Patches of a picture with smaller sides, each pixel the mean of those in its place.

    Args:
        pixels: (patches, channels * side ** 2), those of a token follow each other. extent, small: frames, rows and columns
            of tokens, before and after. side: pixels of a patch. merge: patches in a row of a token.
    """
    frames, rows, columns = extent
    pictures = pixels.view(frames, rows, columns, merge, merge, -1, side, side).permute(0, 5, 1, 3, 6, 2, 4, 7)
    pictures = pictures.reshape(frames, -1, rows * merge * side, columns * merge * side)
    _, rows, columns = small
    pictures = nn.functional.adaptive_avg_pool2d(pictures, (rows * merge * side, columns * merge * side))
    pictures = pictures.view(frames, -1, rows, merge, side, columns, merge, side).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return pictures.reshape(-1, pixels.shape[1])


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


def _windows(windows: Sequence[Tensor], merge: int) -> tuple[Tensor, Tensor]:
    """Tokens in the order of their windows, of several pictures, and the borders of these in patches."""
    order, counts, start = [], [], 0
    for window in windows:
        order.append(window.argsort(stable=True) + start)
        counts.append(torch.bincount(window) * merge**2)
        start += len(window)
    return torch.cat(order), _borders(torch.cat(counts))


GRID = GridEncoder()


class LayerEncoder:
    """CLIP and SigLIP, where every layer attends to the whole image: tokens leave at the input of a late layer.

    Args:
        depth: where in the tower, as a fraction of its layers. The embedded model, whose tower has three, answers at every depth
            as if the encoder saw everything to the end (bench/README.md); deep towers have not been measured, hence a late default.
    """

    KEY = "encoded_tokens"  # argument that carries (index, mask, layers) from the tower's call to its layers

    def __init__(self, depth: float = 0.8) -> None:
        self.depth = depth

    def cut(self, count: int) -> int:
        """The layer of ``count`` at whose input tokens leave."""
        return min(max(round(self.depth * count), 0), count - 1)

    def fits(self, config: Any) -> bool:
        """Not where the tower is Pixtral's."""
        return config.vision_config.model_type in TOWERS

    def pieces(self, prompt: Prompt, layouts: Sequence[VisionLayout]) -> list[Pieces]:
        """Tokens."""
        return [
            Pieces(
                torch.arange(len(layout))[:, None],
                torch.zeros(len(layout), dtype=torch.bool),
                torch.stack([layout.row, layout.col], 1).long(),
            )
            for layout in layouts
        ]

    def take(
        self, tower: nn.Module, args: tuple, kwargs: dict, images: Sequence[Encoding]
    ) -> tuple[tuple, dict, Tensor]:
        """Everything, and which tokens the late layers are to have; where they stand, fillers behind the end.

        Raises:
            RuntimeError: the tower gets another number of pictures.
        """
        pixels = _first(args, kwargs, len(images), "pictures")
        index, extra, mask = _index(tower, images), class_tokens(tower.config), None
        place = torch.where(index >= 0, index, len(images[0].layout) + extra)
        index, place, real = upload([index.clamp(min=0), place, index >= 0], pixels.device)
        if len({int(image.tokens.sum()) for image in images}) > 1:
            mask = real
            if "flash" not in (tower.config._attn_implementation or "eager"):  # whose masks have two dimensions
                mask = mask[:, None, None].expand(-1, 1, mask.shape[1], -1)
        return args, kwargs | {self.KEY: (index, mask, len(self.layers(tower)))}, place

    def lengths(self, tower: nn.Module, images: Sequence[Encoding]) -> list[list[int]]:
        """Pictures, of which late layers see a part, filled up to the longest."""
        every, count = _of_a_picture(tower), tower.config.num_hidden_layers
        most = max(int(image.tokens.sum()) for image in images) + class_tokens(tower.config)
        return [[every if layer < self.cut(count) else most] * len(images) for layer in range(count)]

    def layers(self, tower: nn.Module) -> Sequence[nn.Module]:
        """All of them, because all get what is meant for the late ones."""
        return tower_layers(tower)

    def take_at(self, number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Tokens that are taken; where images have more or less of them, a mask over the fillers."""
        kwargs = dict(kwargs)
        (index, mask, count), (hidden, *rest) = kwargs.pop(self.KEY), args
        if number < self.cut(count):
            return args, kwargs
        if number == self.cut(count):
            hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        if mask is not None:
            additive = mask.dim() == 4  # eager attention adds its mask
            rest = [hidden.new_zeros(mask.shape).masked_fill(~mask, -torch.inf) if additive else mask]
        return (hidden, *rest), kwargs

    def put(self, tower: nn.Module, output: Any, place: Tensor, images: Sequence[Encoding]) -> Any:
        """Hidden states behind the cut, which may be as many as before it where a picture keeps all."""
        cut, total = self.cut(len(self.layers(tower))), len(images[0].layout) + class_tokens(tower.config)

        def full(value: Tensor) -> Tensor:
            found = value.new_zeros(len(value), total + 1, value.shape[2])
            rows = place.to(value.device, non_blocking=True)
            return found.scatter_(1, rows[..., None].expand_as(value), value)[:, :-1]

        output["last_hidden_state"] = full(output["last_hidden_state"])
        if output.get("hidden_states") is not None:
            # What enters layer after layer, and what leaves the last; None where nobody asked.
            states = enumerate(output["hidden_states"])
            output["hidden_states"] = tuple(one if one is None or n <= cut else full(one) for n, one in states)
        return output


def _index(tower: nn.Module, images: Sequence[Encoding]) -> Tensor:
    """(images, most) int64 places of the tokens that are taken, -1 = filler at the end; the class token always is."""
    extra = class_tokens(tower.config)
    taken = [torch.cat([torch.arange(extra), torch.nonzero(image.tokens).flatten() + extra]) for image in images]
    return nn.utils.rnn.pad_sequence(taken, batch_first=True, padding_value=-1)
