"""What callers hand over: regions, sizes, methods. Checked and matched to images before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from crop.geometry.region import Region
from crop.methods.base import POOL_MODES, Method
from crop.patching.masks import windows


def as_regions(region: Region | Sequence[Region | None] | None) -> list[Region] | None:
    """One per image; None in a list is the whole image.

    Raises:
        TypeError: something else than a Region.
    """
    if region is None:
        return None
    given = [region] if isinstance(region, Region) or not isinstance(region, Sequence) else list(region)
    regions = [Region.whole() if entry is None else entry for entry in given]
    for entry in regions:
        if not isinstance(entry, Region):
            raise TypeError(f"patch: region must hold Region objects or None, got {type(entry).__name__}")
    return regions


def as_sizes(image_size: tuple[int, int] | Sequence[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
    """(width, height) per image.

    Raises:
        TypeError, ValueError: no whole pixels.
    """
    if image_size is None:
        return None
    wanted = "patch: image_size must be (width, height) in whole pixels, or one such pair per image"
    if not isinstance(image_size, (tuple, Sequence)):  # a tuple is soon told
        raise TypeError(f"{wanted}, got {image_size!r}")
    pairs = image_size if len(image_size) and isinstance(image_size[0], (tuple, Sequence)) else [image_size]
    for pair in pairs:
        whole = isinstance(pair, (tuple, Sequence)) and all(isinstance(side, (int, Integral)) for side in pair)
        if not whole or len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{wanted}, got {pair!r}")
    return [(int(width), int(height)) for width, height in pairs]


def check_method(method: Method, num_layers: int) -> None:
    """What a method says of itself; a method of the user's own may say anything."""
    last = 0
    for cut in method.cuts:
        layer = cut.layer
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise TypeError(f"patch: layer of a method must be an int, 'auto' or None, got {layer!r}")
        if not last < layer < num_layers:
            raise ValueError(f"patch: layer must be in [{last + 1}, num_layers={num_layers} - 1], got {layer}")
        if cut.rows not in ("text", "last"):
            raise ValueError(f"patch: rows of a method must be one of ('text', 'last'), got {cut.rows!r}")
        last = layer
    if method.pool_mode not in POOL_MODES:
        raise ValueError(f"patch: pool_mode of a method must be one of {POOL_MODES}, got {method.pool_mode!r}")


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """The value, which must be one of ``choices``."""
    if value not in choices:
        raise ValueError(f"patch: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def one_per_image(name: str, given: list, owners: list[int], copies: int) -> list:
    """Match what the caller gave per image to the images of a call.

    Args:
        owners: the sample of each image. copies: how often generate() repeated every sample, for beams and return
            sequences; the entries are repeated with them.
    """
    count = len(owners)
    if len(given) == 1 and (given[0] is None or (isinstance(given[0], Region) and given[0].is_whole)):
        return given * count
    if len(given) == count:
        return given
    if len(given) * copies != count:
        raise ValueError(f"patch: {name} must be given once per image, got {len(given)} for {count} images")
    repeated: list = []
    first = [sample // copies for sample in owners if sample % copies == 0]
    for sample in dict.fromkeys(first):
        repeated += [entry for entry, owner in zip(given, first, strict=True) if owner == sample] * copies
    return repeated


def refuse_short_sight(layers: Sequence[int], config: Any, total: int) -> None:
    """A sliding layer whose window is shorter than the prompt does not see what it would have to score.

    Args:
        layers: where cuts by score are. config: of the language model.
        total: tokens, those of the cache included.
    """
    seen = windows(config)
    for layer in layers:
        window = seen[layer - 1]
        if window is not None and total > window:
            full = [number + 1 for number, width in enumerate(seen[:-1]) if width is None]
            raise ValueError(
                f"patch: layer must follow a layer that sees all {total} tokens, i.e. be one of {full}, got {layer}: "
                f"layer {layer - 1} scores and has a sliding window of {window}"
            )
