"""Odd pictures and odd questions: a clear error, or the whole image with a reason; never a crash or a wrong box in silence."""

from __future__ import annotations

import importlib.util
import io
import random
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import crop
from crop.cli import main as cli
from crop.cli.ask import load
from crop.cli.images import open_image, upright_size
from crop.localizers import OCRLocalizer, get_localizer
from crop.localizers.ocr.engine import PACKAGES
from crop.localizers.ocr.reader import Page, Reader

MISSING = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
extra = pytest.mark.skipif(bool(MISSING), reason=f"extra ocr is not installed: {', '.join(MISSING)}")
pytestmark = pytest.mark.usefixtures("one_thread")
GREY = (np.arange(12).reshape(3, 4) * 20).astype(np.uint8)
QUESTIONS = ["", "   ", "?!", "what " * 3000 + "total", "合計はいくらですか", "Сколько всего?", "🧾💰❓", "a\x00b\nc"]
SIZES = [(1, 1), (1, 50), (3, 2), (12000, 200), (200, 12000)]


@pytest.fixture(scope="module")
def asker():
    return load("embedded", "cpu", "auto")


@pytest.fixture(scope="module")
def ocr():
    return OCRLocalizer(Reader())


# ------------------------------------------------------------------------------------------------ pictures
@pytest.mark.parametrize("mode, ending", [
    ("1", "png"), ("L", "png"), ("LA", "png"), ("P", "gif"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("YCbCr", "jpg"),
    ("I;16", "png"), ("I", "tiff"), ("F", "tiff"), ("RGB", "webp"),
])  # fmt: skip
def test_every_mode_opens_as_the_same_rgb(mode, ending, tmp_path):
    grey = Image.fromarray(GREY)
    wide = {"I;16": (np.uint16, 257), "I": (np.int32, 257), "F": (np.float32, 1 / 255)}
    if mode in wide:
        kind, scale = wide[mode]
        picture = Image.fromarray((GREY.astype(np.float64) * scale).astype(kind))
    else:
        picture = grey.convert(mode)
    file = tmp_path / f"picture.{ending}"
    picture.save(file, **({"quality": 100} if ending in ("jpg", "webp") else {}))
    found = open_image(file)
    assert found.mode == "RGB" and found.size == (4, 3)
    if mode != "1":  # dithered
        assert np.abs(np.asarray(found)[:, :, 1].astype(int) - GREY).max() <= 12
    assert np.array_equal(np.asarray(open_image(found)), np.asarray(found))


def test_what_is_transparent_is_white_and_cameras_are_turned_upright(tmp_path):
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    upright = Image.fromarray(GREY).convert("RGB")
    exif = upright.getexif()
    exif[0x112] = 6  # turn by 90 degrees
    upright.save(tmp_path / "camera.png", exif=exif.tobytes())
    turned = open_image(tmp_path / "camera.png")
    assert turned.size == (3, 4) and np.array_equal(np.asarray(turned), np.rot90(np.asarray(upright), -1))


def exif(rng: random.Random, orientation: int) -> bytes:
    """Metadata of a camera: the orientation among tags whose types, counts and offsets are damaged."""
    end, tags = rng.choice("<>"), [0x110, 0x11A, 0x132, 0x8769, 0x8825, 0x927C]
    entries = [
        struct.pack(end + "HHI", rng.choice(tags), rng.randrange(14), rng.choice([0, 1, 5, 1000, 1 << 31]))
        + rng.randbytes(4)
        for _ in range(3)
    ]
    entries.insert(rng.randrange(3), struct.pack(end + "HHIHH", 0x112, 3, 1, orientation, 0))
    head = {"<": b"II", ">": b"MM"}[end] + struct.pack(end + "HI", 42, 8)
    return b"Exif\0\0" + head + struct.pack(end + "H", 4) + b"".join(entries) + bytes(4)


@pytest.mark.filterwarnings("ignore")  # Pillow's about these tags
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_damaged_metadata_leave_the_picture_and_its_orientation(ending, tmp_path):
    rng, upright = random.Random(0), Image.fromarray(GREY.repeat(8, 0).repeat(8, 1)).convert("RGB")
    for trial in range(100):
        file = tmp_path / f"{trial}.{ending}"
        upright.save(file, exif=exif(rng, 6), quality=100)
        turned = open_image(file)
        assert turned.size == upright_size(file) == (24, 32)
        assert np.abs(np.asarray(turned).astype(int) - np.rot90(np.asarray(upright), -1)).max() < 16
        assert open_image(turned) is turned


def test_no_other_place_opens_pictures():
    """Elsewhere transparency, orientation and deep greys would be lost."""
    root = Path(crop.__file__).parents[1]
    # These draw, draw on what they are given, or show what vLLM's model sees.
    drawn = ("painting.py", "page.py", "processor.py", "stages.py")
    for file in (*root.glob("crop/**/*.py"), *root.glob("bench/**/*.py")):
        text = file.read_text(encoding="utf-8")
        assert "Image.open(" not in text or file.name == "images.py", file
        converts = re.findall(r"(\w+)\(?\)?\.convert\(\"RGB\"\)", text)
        assert not converts or file.name in ("pixels.py", "images.py", "workload.py", *drawn), file


def png16(values: np.ndarray, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG file of 16 bits per channel: (height, width) grey or (height, width, 3), which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    clear = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + clear + data + chunk(b"IEND", b"")


def test_sixteen_bits_keep_their_levels_and_what_is_transparent_is_white():
    grey = np.array([[0, 1000, 65535], [300, 40000, 20000]])
    for values, clear in ((grey, (300,)), (np.stack([grey] * 3, -1), (300,) * 3)):
        found = np.asarray(open_image(io.BytesIO(png16(values, clear))))[..., 1].astype(int)
        assert np.abs(found - np.where(grey == 300, 255, grey / 257)).max() <= 1
    assert np.abs(np.asarray(open_image(io.BytesIO(png16(grey))))[..., 0] - grey / 257).max() <= 1


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_fewer_bits_in_sixteen_are_as_bright_as_they_mean(bits):
    top = 2**bits - 1
    found = np.asarray(open_image(io.BytesIO(png16(np.array([[0, top // 2, top]])))))[0, :, 0].astype(int)
    assert np.abs(found - [0, 127, 255]).max() <= 1


@pytest.mark.parametrize("ending", ["gif", "webp", "tiff", "png"])
def test_of_an_animation_the_first_frame_counts(ending, tmp_path):
    first, second = Image.new("RGB", (5, 4), "red"), Image.new("RGB", (5, 4), "blue")
    first.save(tmp_path / f"moving.{ending}", save_all=True, append_images=[second])
    red, _, blue = open_image(tmp_path / f"moving.{ending}").getpixel((2, 2))
    assert red > 200 and blue < 60


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "tiff"])
def test_a_file_cut_short_is_an_error_that_names_it(ending, share, tmp_path):
    file = tmp_path / f"cut.{ending}"
    Image.effect_noise((64, 64), 90).save(file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=f"open_image: source must be .*cut.{ending}"):
        open_image(file)


def test_a_picture_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    Image.new("L", (400, 400)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70_000)
    with pytest.raises(ValueError, match="Pillow's size limit"):
        open_image(tmp_path / "bomb.png")


# ----------------------------------------------------------------------------- localizers on odd pictures and questions
def check(region) -> None:
    assert 0 <= region.confidence <= 1
    assert not region.is_whole or region.confidence >= 0.5 or region.reason


@pytest.mark.parametrize("name", ["attention", "head"])
@pytest.mark.parametrize(
    "size, question", [*((size, "what is the total") for size in SIZES), *(((64, 48), text) for text in QUESTIONS)]
)
def test_the_models_own_localizers(name, size, question, asker):
    """An answer, or an error in words: a question longer than the model's context, say."""
    try:
        check(asker.localizer(name)(Image.new("RGB", size, "white"), question))
    except ValueError as error:
        assert str(error)


@extra
@pytest.mark.parametrize(
    "size, color", [((1, 1), "black"), ((1, 50), "white"), ((3, 2), "white"), ((12000, 200), "white")]
)
def test_ocr_that_finds_nothing_is_the_whole_image_with_the_reason(size, color, ocr):
    region = ocr(Image.new("RGB", size, color), "What is the total?")
    assert region.is_whole and region.confidence == 0 and region.reason == "no text found in the image"


@extra
@pytest.mark.parametrize("question", QUESTIONS)
def test_ocr_takes_any_question(question, ocr):
    page = Page(
        (100, 100),
        np.float32([[[5, 5], [90, 5], [90, 15], [5, 15]], [[5, 30], [60, 30], [60, 40], [5, 40]]]),
        {0: "TOTAL 9.00", 1: ""},
    )
    region = ocr.locate(page, question)
    check(region)
    if not any(letter.isalnum() for letter in question):
        assert ocr(Image.new("RGB", (50, 50)), question).reason == "the question has no words"


@extra
def test_ocr_that_reads_nothing_is_the_whole_image_with_the_reason(ocr):
    page = Page((100, 100), np.float32([[[5, 5], [90, 5], [90, 15], [5, 15]]]), {0: "..."})
    assert ocr.locate(page, "What is the total?").reason == "no text could be read in the image"


@extra
@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_ocr_takes_every_mode(mode, ocr):
    assert ocr(Image.new("RGB", (40, 40), "white").convert(mode), "What is the total?").is_whole


# ---------------------------------------------------------------------------------------------- the command line
@pytest.mark.parametrize("question", ["", "🧾", "合計はいくらですか", "what " * 500])
def test_ask_takes_any_question(question, tmp_path, capsys):
    file = tmp_path / "picture.png"
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(file)
    try:
        assert cli.main(["ask", str(file), question, "--json", "--max-new-tokens", "1"]) == 0
    except SystemExit as stop:
        assert stop.code == 2 and "error:" in capsys.readouterr().err


def test_ask_without_the_extra_names_it(tmp_path, capsys, monkeypatch):
    file = tmp_path / "picture.png"
    Image.new("RGB", (30, 20)).save(file)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
    )
    with pytest.raises(SystemExit):
        cli.main(["ask", str(file), "what is the total", "--localizer", "ocr"])
    assert 'pip install "crop-vlm[ocr]"' in capsys.readouterr().err


def test_cascade_and_union_by_name(asker, monkeypatch):
    monkeypatch.setattr("crop.localizers.ocr.localizer.installed", lambda: None)
    cascade = asker.localizer("cascade", min_confidence=0.3)
    assert len(cascade.members) == 2 and cascade.min_confidence == 0.3
    assert len(asker.localizer("union").members) == 2
    with pytest.raises(ValueError, match="model must be given for 'cascade'"):
        get_localizer("cascade")
