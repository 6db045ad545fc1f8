"""What callers hand over: regions, sizes, methods. Checked and matched to images before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from crop.geometry.region import Region


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
        raise ValueError(
            f"patch: {name} must be given once per image, got {len(given)} for {count} images; crops that a processor adds "
            "(do_pan_and_scan) are images, too: leave them out, or give each its own"
        )
    repeated: list = []
    first = [sample // copies for sample in owners if sample % copies == 0]
    for sample in dict.fromkeys(first):
        repeated += [entry for entry, owner in zip(given, first, strict=True) if owner == sample] * copies
    return repeated
