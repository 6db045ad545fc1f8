"""Pictures of any mode as 8-bit RGB."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112  # the one EXIF tag that matters
RANGES = tuple(float((1 << bits) - 1) for bits in (8, 10, 12, 14, 16))  # of what sensors and scanners write


def as_rgb(image: Image) -> Image:
    """An image of any mode as the models see it: upright, 8-bit RGB, what is transparent on white.

    Args:
        image: returned as it is where nothing is to be done.
    """
    from PIL import Image

    flip = Image.Transpose
    turns = {2: flip.FLIP_LEFT_RIGHT, 3: flip.ROTATE_180, 4: flip.FLIP_TOP_BOTTOM, 5: flip.TRANSPOSE}
    turns |= {6: flip.ROTATE_270, 7: flip.TRANSVERSE, 8: flip.ROTATE_90}
    turn = turns.get(orientation(image))
    if image.mode == "RGB" and turn is None and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # of a picture with 16 bits per channel, of which Pillow reads 8
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # which says how it was to be turned
    return image


def orientation(image: Image) -> int:
    """How a camera was held: 1 (upright) to 8, as in EXIF; damage to other tags does not matter."""
    found = image.getexif().get(ORIENTATION)
    if not isinstance(found, int):
        found = _scan(image.info.get("exif", b""))
    return found if found in range(1, 9) else 1


def _scan(exif: bytes) -> int | None:
    """The orientation in the first directory; Pillow gives up at the first tag whose data is not there."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif[:2] == b"II" else ">"
    if len(exif) < 10:
        return None
    start = struct.unpack_from(order + "I", exif, 4)[0]
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
        if (tag, kind) == (ORIENTATION, 3):
            return value
    return None


def _eight_bits(image: Image) -> Image:
    """Grey of more than 8 bits, scaled by the smallest usual range that holds it; Pillow would clip it at 255."""
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    brightest = values.max(initial=0.0)
    limits = ((1.0,) if image.mode == "F" else ()) + RANGES
    top = next((limit for limit in limits if brightest <= limit), brightest)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        values[values == clear] = top
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
