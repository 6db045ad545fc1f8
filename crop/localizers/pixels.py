"""Pictures of any mode as 8-bit RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def as_rgb(image: Image) -> Image:
    """An image of any mode as the models see it: upright, 8-bit RGB, what is transparent on white.

    Args:
        image: returned as it is where nothing is to be done.
    """
    from PIL import Image, ImageOps

    if image.mode == "RGB" and not image.getexif() and "transparency" not in image.info:
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image) -> Image:
    """Grey of more than 8 bits; Pillow's own conversion would clip at 255."""
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    # Floats in 0..1 or in the range of the fitting integers: Pillow keeps no other hint of the scale.
    top = next((limit for limit in (1.0, 255.0, 65535.0) if values.max(initial=0) <= limit), max(values.max(), 1.0))
    if image.mode != "F":
        top = max(top, 65535.0 if image.mode.startswith("I;16") else 255.0)
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
