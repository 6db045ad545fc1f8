"""The networks of the localizer "ocr": lines read alone or together, on small copies, by the provider that is there."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from crop.localizers.ocr import engine
from crop.localizers.ocr.engine import BATCH, PACKAGES, Engine
from crop.localizers.ocr.reader import Reader

MISSING = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(MISSING), reason=f"extra ocr is not installed: {', '.join(MISSING)}"),
]
TEXTS = ["TOTAL", "17.17", "Super Mart Enterprise", "Date 12/03/2019", "TEA", "4.20", "Thank you, please come again"]
TEXTS += [f"{number}.50" for number in range(10, 20)]  # one width, more than one batch
assert len(TEXTS) > BATCH + 7


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    image = Image.new("RGB", (900, 70 * len(TEXTS)), "white")
    draw = ImageDraw.Draw(image)
    for number, text in enumerate(TEXTS):
        draw.text((40, 20 + 70 * number), text, "black", ImageFont.load_default(36))
    return image


@pytest.fixture(scope="module")
def found(picture: Image.Image) -> np.ndarray:
    return Engine(1).find(picture, picture.width * picture.height)


def test_lines_say_the_same_alone_together_and_in_any_order(picture: Image.Image, found: np.ndarray) -> None:
    networks = Engine(1)
    together = networks.recognize(picture, found)
    assert [text for text, _ in together] == TEXTS
    alone = [networks.recognize(picture, found[line : line + 1])[0] for line in range(len(found))]
    order = np.random.default_rng(0).permutation(len(found))
    mixed = networks.recognize(picture, found[order])
    assert [text for text, _ in alone] == TEXTS == [mixed[place][0] for place in np.argsort(order)]
    assert [score for _, score in alone] == pytest.approx([score for _, score in together], abs=1e-3)


def test_boxes_found_on_a_small_copy_are_those_of_the_picture(picture: Image.Image, found: np.ndarray) -> None:
    quarter = Engine(1).find(picture, picture.width * picture.height // 4)
    assert quarter.shape == found.shape == (len(TEXTS), 4, 2)
    assert np.abs(quarter - found).max() < 12  # six pixels of the copy, a quarter of a line


@pytest.mark.parametrize(
    "size, thick, looks",
    [
        ((1400, 1400), 30, [704]),
        ((1400, 1400), 10, [704, 1024]),
        ((1400, 1400), None, [704, 1024]),  # nothing found
        ((600, 600), 5, [704]),  # as large as it gets
    ],
)
@pytest.mark.parametrize("upright", [True, False])
def test_small_lines_are_looked_at_again(size, thick, looks, upright) -> None:
    reader, seen = Reader(legible=10), []

    def find(image: Image.Image, pixels: int) -> np.ndarray:
        seen.append(round(pixels**0.5))
        if thick is None:
            return np.zeros((0, 4, 2), dtype=np.float32)
        quad = np.float32([(20, 20), (320, 20), (320, 20 + thick), (20, 20 + thick)])
        return np.stack([quad if upright else quad[:, ::-1]] * 3)

    reader._engine = SimpleNamespace(find=find)
    assert len(reader.detect(Image.new("RGB", size))) == (0 if thick is None else 3) and seen == looks


@pytest.mark.parametrize(
    "here, works, first",
    [
        (["CPUExecutionProvider"], None, "CPUExecutionProvider"),
        (["OpenVINOExecutionProvider", "CPUExecutionProvider"], None, "OpenVINOExecutionProvider"),
        (
            ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
            "CPUExecutionProvider",
            "CUDAExecutionProvider",
        ),
    ],
)
def test_the_fastest_installed_provider_runs_the_networks(here, works, first, monkeypatch, tmp_path, recwarn) -> None:
    import onnxruntime

    def start(path, options, providers):
        names = [name for name, _ in providers]
        assert names[0] == first and names[-1] == "CPUExecutionProvider" and set(names) <= set(here)
        assert options.intra_op_num_threads == 2
        return SimpleNamespace(get_providers=lambda: [works or first])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: here)
    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    assert engine.session(tmp_path / "network.onnx", 2).get_providers() == [works or first]
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (works is not None) and all(f"{first} must work where it is installed" in one for one in said)


def test_threads_are_those_of_torch(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    given = []
    monkeypatch.setattr("crop.localizers.ocr.reader.Engine", given.append)
    Reader(), Reader(threads=2)
    assert given == [3, 2]
