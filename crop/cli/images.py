"""The one place where pictures are opened: files, standard input, addresses, pages of PDF files."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crop.localizers.pixels import as_rgb, orientation

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 64 << 20  # of a picture from an address
MAX_SECONDS = 30.0
PDF_DPI, PDF_SIDE = 150, 4096  # of rendered pages; the longer side is at most so many pixels

Source = Any  # str | os.PathLike[str] | BinaryIO | PIL.Image.Image


def open_image(source: Source, name: str | None = None) -> Image:
    """A picture as the models see it: upright, 8-bit RGB, what is transparent on white, the first frame of an animation.

    Args:
        source: file name, an open binary file, or a Pillow image of any mode (returned as it is where nothing is to be
            done).
        name: what errors call it; default: the source.
    Returns:
        RGB image of the size of the upright picture.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no picture, is damaged, or is larger than Pillow's limit against decompression bombs.
    """
    with _opened(source, name) as image:
        return as_rgb(image) if image is source else as_rgb(image).copy()  # the file is closed next


def upright_size(source: Source) -> tuple[int, int]:
    """(width, height) of what ``open_image`` returns, without decoding it; raises as that does."""
    with _opened(source) as image:
        width, height = image.size
        return (height, width) if orientation(image) >= 5 else (width, height)


@contextmanager
def _opened(source: Any, name: str | None = None) -> Iterator[Image]:
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        yield source
        return
    name = str(source) if name is None else name
    try:
        with Image.open(source) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"open_image: source must be an existing file, got {name}") from None
    except UnidentifiedImageError:
        raise ValueError(f"open_image: source must be a picture, got {name}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"open_image: source must be within Pillow's size limit, got {name}: {error}") from error
    # Decoders of damaged files raise any of these.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise ValueError(f"open_image: source must be readable, got {name}: {error}") from error


def read_pictures(sources: Sequence[str], *, allow_url: bool = False, pages: Sequence[int] = ()) -> list[Image]:
    """The pictures that a command line names.

    Args:
        sources: file names, "-" for standard input, addresses; PDF files count as their pages.
        allow_url: whether addresses are fetched, up to ``MAX_BYTES`` and for ``MAX_SECONDS``.
        pages: of PDF files, from 1 on; none: the only one.
    Returns:
        RGB images in order.
    Raises:
        OSError, ValueError: as ``open_image``; an address that is not allowed or does not answer; a page that is not there.
        ImportError: a PDF file, and the extra ``pdf`` is not installed.
    """
    found, documents = [], 0
    for source in sources:
        if source == "-":
            data: Any = io.BytesIO(sys.stdin.buffer.read())
            name = "standard input"
        elif re.match(r"https?://", source):
            if not allow_url:
                raise ValueError(f"read_pictures: {source} is an address: give --allow-url to fetch it")
            data, name = io.BytesIO(_fetch(source)), source
        else:
            data = name = source
        if _is_pdf(data):
            found += _pdf_pages(data, name, pages)
            documents += 1
        else:
            found.append(open_image(data, name))
    if pages and not documents:
        raise ValueError("read_pictures: pages must come with a PDF file, got pictures alone")
    return found


def _fetch(address: str) -> bytes:
    """What an http(s) address serves, with limits on size and time."""
    from urllib.request import HTTPHandler, HTTPSHandler, Request, build_opener

    data, end = b"", time.monotonic() + MAX_SECONDS
    try:
        request = Request(address, headers={"User-Agent": "crop"})
        with build_opener(HTTPHandler, HTTPSHandler).open(request, timeout=MAX_SECONDS) as answer:
            while part := answer.read1(1 << 16):
                data += part
                if len(data) > MAX_BYTES:
                    raise ValueError(f"read_pictures: {address} must serve at most {MAX_BYTES >> 20} MiB, got more")
                if time.monotonic() > end:
                    raise OSError(f"no end after {MAX_SECONDS:.0f} s")
    except OSError as error:  # URLError, HTTPError, timeouts
        raise OSError(f"read_pictures: {address} cannot be fetched: {error}") from error
    return data


def _is_pdf(source: str | io.BytesIO) -> bool:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:1024].lstrip().startswith(b"%PDF-")
    if not Path(source).is_file():
        return False
    with open(source, "rb") as file:
        return file.read(1024).lstrip().startswith(b"%PDF-")


def _pdf_pages(source: str | io.BytesIO, name: str, pages: Sequence[int]) -> list[Image]:
    try:
        import pypdfium2
    except ImportError:
        raise ImportError(f'{name} is a PDF file, which needs pypdfium2: pip install "crop-vlm[pdf]"') from None
    try:
        document = pypdfium2.PdfDocument(source)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"read_pictures: {name} must be a readable PDF file without a password: {error}") from error
    count = len(document)
    if not pages and count != 1:
        raise ValueError(f"read_pictures: {name} has {count} pages: choose with --pages, e.g. --pages 1,3-5")
    missing = [page for page in pages if not 1 <= page <= count]
    if missing:
        raise ValueError(f"read_pictures: pages of {name} must be in [1, {count}], got {missing[0]}")
    found = []
    for number in pages or (1,):
        page = document[number - 1]
        scale = min(PDF_DPI / 72, PDF_SIDE / max(page.get_size()))
        found.append(page.render(scale=scale).to_pil().convert("RGB"))
    return found
