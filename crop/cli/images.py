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

    from crop.localizers.pixels import as_rgb

    if isinstance(source, Image.Image):
        return as_rgb(source)
    try:
        with Image.open(source) as image:
            return as_rgb(image).copy()  # the file is closed next
    except FileNotFoundError:
        raise FileNotFoundError(f"open_image: source must be an existing file, got {source}") from None
    except UnidentifiedImageError:
        raise ValueError(f"open_image: source must be a picture, got {source}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"open_image: source must be within Pillow's size limit, got {source}: {error}") from error
    # Decoders of damaged files raise any of these.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise ValueError(f"open_image: source must be readable, got {source}: {error}") from error
