"""What the vision encoder makes of the pictures of a sample for the oracle: all of them, a part, small copies beside it."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.batches import Sample
from tests.support.decision import smaller
from tests.support.families.entry import PATCH, Family
from tests.support.masked_tower import attending_to


def vision_rows(
    model: Any, family: Family, prompt: Sample, encoded: tuple, copied: tuple, cut: int | None
) -> tuple[Tensor, list[Tensor], list[tuple[int, Tensor]]]:
    """(tokens,) which rows stand for an image or a video; rows for them, in prompt order, and those of every further level
    that the decoder adds between its layers; (token, row) of markers between tiles.

    encoded, copied: as in `Decision`. cut: layer of the tower from which on it attends to what is encoded alone.
    """
    inputs, base, streams, markers = prompt.inputs(), model.model, [], []
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels not in inputs:
            continue
        encode = getattr(base, f"get_{name}_features")
        wanted = [*inspect.signature(encode).parameters, "image_sizes"]
        mine = [
            (len(span), own)
            for image, span, own in zip(prompt.images, prompt.spans(), encoded, strict=False)
            if pixels in image.arguments
        ]
        with attending_to(getattr(base, family.tower), mine, inputs.get(f"{name}_grid_thw"), cut):
            out = encode(**{one: value for one, value in inputs.items() if one in wanted}, return_dict=True)
        marks = getattr(out, "visual_indicator_features", None)  # what markers between tiles are to Ovis2
        if marks is not None:
            markers = list(zip(model.config.visual_indicator_token_ids, marks, strict=True))
        levels = _levels(out)
        _put_copies(levels, encode, prompt, name, pixels, copied)
        token = getattr(model.config, f"{name}_token_id")
        if token not in prompt.ids:  # image tokens stand for GLM's frames
            token = model.config.image_token_id
        streams.append((inputs["input_ids"][0] == token, levels))
    is_vision = sum((here for here, _ in streams), torch.zeros(len(prompt.ids), dtype=torch.bool))
    levels = [torch.zeros(len(prompt.ids), level.shape[1]) for level in streams[0][1]] if streams else []
    for here, found in streams:
        levels = [full.index_put((here,), level) for full, level in zip(levels, found, strict=True)]
    return is_vision, [level[is_vision] for level in levels], markers


def _put_copies(levels: list[Tensor], encode: Any, prompt: Sample, name: str, pixels: str, copied: tuple) -> None:
    """Write rows of small copies, each a picture in a call of its own, in the places of those that they stand for."""
    start = 0
    for image, layout, own in zip(prompt.images, prompt.layouts(), copied, strict=False):
        if pixels not in image.arguments:
            continue
        if own:
            merge = math.isqrt(len(image.arguments[pixels]) // len(layout))
            grid = [layout.extent[0], *(merge * side for side in smaller(layout))]
            small = small_copy(image.arguments[pixels], layout.extent, smaller(layout), merge)
            out = encode(**{pixels: small, f"{name}_grid_thw": torch.tensor([grid])}, return_dict=True)
            for level, rows in zip(levels, _levels(out), strict=True):
                for place, token in own:
                    level[start + place] = rows[token]
        start += len(layout)


def _levels(out: Any) -> list[Tensor]:
    """(tokens, hidden) that the encoder makes for the language model's input, and that this adds after its first layers."""
    return [_rows(level) for level in [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]]


def _rows(features: Any) -> Tensor:
    """Features as (tokens, hidden), whatever list or batch of images they came in."""
    if not isinstance(features, Tensor):
        return torch.cat([_rows(part) for part in features])
    return features.reshape(-1, features.shape[-1])


def small_copy(pixels: Tensor, extent: Sequence[int], small: Sequence[int], merge: int, patch: int = PATCH) -> Tensor:
    """Patches of a picture with `small` rows and columns of tokens: every pixel is the mean of those that it covers.

    pixels: (patches, channels * patch ** 2) of frames, rows and columns of tokens as in `extent`, token by token.
    """
    frames, rows, columns = extent
    side, found = merge * patch, []
    for frame in pixels.view(frames, -1, pixels.shape[1]):
        picture, spots = (
            torch.zeros(pixels.shape[1] // patch**2, rows * side, columns * side),
            _spots(rows, columns, merge),
        )
        for row, (y, x) in zip(frame, spots, strict=True):
            picture[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = row.view(-1, patch, patch)
        shrunk = torch.zeros(len(picture), small[0] * side, small[1] * side)
        for y in range(shrunk.shape[1]):
            for x in range(shrunk.shape[2]):
                covered = [
                    slice(math.floor(n * old / new), math.ceil((n + 1) * old / new))
                    for n, old, new in zip((y, x), picture.shape[1:], shrunk.shape[1:], strict=True)
                ]
                shrunk[:, y, x] = picture[:, covered[0], covered[1]].double().mean((1, 2))
        found += [
            shrunk[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].flatten()
            for y, x in _spots(*small, merge)
        ]
    return torch.stack(found)


def _spots(rows: int, columns: int, merge: int) -> list[tuple[int, int]]:
    """Row and column of every patch, token by token."""
    tokens = itertools.product(range(rows), range(columns), range(merge), range(merge))
    return [(row * merge + down, column * merge + across) for row, column, down, across in tokens]
