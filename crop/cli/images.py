"""The one place where pictures are opened."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def open_image(source: str | os.PathLike[str] | Image) -> Image:
    """A picture as the models see it: upright, 8-bit RGB, what is transparent on white, the first frame of an animation.

    Args:
        source: file name, or a Pillow image of any mode (returned as it is where nothing is to be done).
    Returns:
        RGB image of the size of the upright picture.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no picture, is damaged, or is larger than Pillow's limit against decompression bombs.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return _rgb(source)
    try:
        with Image.open(source) as image:
            return _rgb(image).copy()  # the file is closed next
    except FileNotFoundError:
        raise FileNotFoundError(f"open_image: source must be an existing file, got {source}") from None
    except UnidentifiedImageError:
        raise ValueError(f"open_image: source must be a picture, got {source}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"open_image: source must be within Pillow's size limit, got {source}: {error}") from error
    # Decoders of damaged files raise any of these.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise ValueError(f"open_image: source must be readable, got {source}: {error}") from error


def _rgb(image: Image) -> Image:
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
