"""The localizer "ocr" on pages whose text is given; one test reads a rendered page with the OCR itself."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from crop.localizers.ocr import engine
from crop.localizers.ocr.features import amounts_of, neighbours
from crop.localizers.ocr.localizer import OCRLocalizer
from crop.localizers.ocr.question import KINDS, OTHER, Question, alike
from crop.localizers.ocr.ranking import choose
from crop.localizers.ocr.reader import Page, Reader

MISSING = [package for module, package in engine.PACKAGES.items() if importlib.util.find_spec(module) is None]
extra = pytest.mark.skipif(bool(MISSING), reason=f"extra ocr is not installed: {', '.join(MISSING)}")
pytestmark = pytest.mark.usefixtures("one_thread")
DATA = Path(os.environ.get("CROP_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
ROWS = [  # (left, text) per column
    ["GREEN LEAF TRADING SDN BHD"], ["NO. 12, JALAN BUKIT 3/4,"], ["TAMAN INDAH, 40150 SHAH ALAM"], ["TEL: 03-7781 8333"],
    ["INVOICE NO", "A-00550388"], ["DATE", "17-06-2018 14:07"], ["CASHIER", "AZIZAH"],
    ["NOODLES", "12.00"], ["TEA", "4.20"], ["SUBTOTAL", "16.20"], ["GST 6%", "0.97"], ["TOTAL", "17.17"], ["CASH", "20.00"],
    ["CHANGE", "2.83"], ["THANK YOU, PLEASE COME AGAIN"],
]  # fmt: skip
SIZE = (600, 30 * len(ROWS) + 40)


def page(rows=ROWS, size=SIZE) -> Page:
    quads, texts = [], {}
    for number, row in enumerate(rows):
        for column, text in enumerate(row):
            x, y = 30 + 350 * column, 20 + 30 * number
            quads.append([(x, y), (x + 11 * len(text), y), (x + 11 * len(text), y + 20), (x, y + 20)])
            texts[len(texts)] = text
    return Page(size, np.float32(quads), texts)


@pytest.fixture(scope="module")
def localizer() -> OCRLocalizer:
    return OCRLocalizer(Reader())


def inside(region, page: Page, text: str) -> bool:
    """Whether the whole line lies in one box."""
    line = next(number for number, said in page.texts.items() if text in said)
    x0, y0, x1, y1 = page.boxes[line]
    return any(b[0] <= x0 and b[1] <= y0 and x1 <= b[2] and y1 <= b[3] for b in region.boxes)


@extra
@pytest.mark.parametrize("question, wanted", [
    ("What is the total amount?", ["17.17"]),
    ("How much did they pay in total?", ["17.17"]),
    ("On which day was this issued?", ["17-06-2018"]),
    ("What is the name of the company?", ["GREEN LEAF"]),
    ("Where is the shop?", ["NO. 12, JALAN", "TAMAN INDAH"]),
    ("What is the phone number?", ["TEL: 03"]),
    ("What is the invoice number?", ["A-00550388"]),
    ("What was the price of the tea?", ["4.20"]),
    ("How much change was given?", ["2.83"]),
])  # fmt: skip
def test_the_answers_lines_are_inside_and_the_region_is_small(question, wanted, localizer):
    given = page()
    region = localizer.locate(given, question)
    assert all(inside(region, given, text) for text in wanted), region
    assert region.area < 0.2 and region.reason.startswith("text: ")


@extra
def test_label_and_value_in_one_line_alone_on_a_page(localizer):
    given = page([["TOTAL 17.17"], ["WELCOME"]], (420, 120))
    region = localizer.locate(given, "What is the total?")
    assert inside(region, given, "TOTAL 17.17") and not inside(region, given, "WELCOME")


@extra
@pytest.mark.parametrize("question", ["What colour is the car?", "Is the man smiling?"])
def test_a_question_no_text_answers_means_the_whole_image_with_the_reason(question, localizer):
    region = localizer.locate(page([["EXIT"], ["GATE 4"]], (600, 400)), question)
    assert region.is_whole and region.confidence < localizer.min_confidence and "no line of text" in region.reason


@extra
def test_what_stands_in_the_box_decides_not_the_order_of_lines(localizer):
    given = page()
    order = np.random.default_rng(0).permutation(len(given))
    mixed = Page(SIZE, given.quads[order], {new: given.texts[old] for new, old in enumerate(order.tolist())})
    question = "What is the total amount?"
    one, other = localizer.locate(given, question), localizer.locate(mixed, question)
    assert np.allclose(sorted(one.boxes), sorted(other.boxes)) and one.confidence == pytest.approx(other.confidence)


@extra
def test_a_rendered_page_is_detected_read_and_remembered(tmp_path, monkeypatch):
    image = Image.new("RGB", (420, 260), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(26)
    for number, (label, value) in enumerate([("DATE", "17-06-2018"), ("TEA", "4.20"), ("TOTAL", "17.17")]):
        draw.text((20, 30 + 75 * number), label, fill="black", font=font)
        draw.text((240, 30 + 75 * number), value, fill="black", font=font)
    first = OCRLocalizer(Reader(folder=tmp_path), unread=0.05)
    region = first(image, "What is the total amount?")
    assert not region.is_whole and region.contains(np_point(290 / 420, 195 / 260)) and "17.17" in region.reason
    assert not region.contains(np_point(290 / 420, 45 / 260))
    [file] = tmp_path.glob("*.json")
    stored = json.loads(file.read_text())["texts"].values()
    assert "17.17" in stored and "17-06-2018" not in stored  # the top of the page was not read for the total
    assert "17-06-2018" in first(image, "What is the date?").reason
    assert "17-06-2018" in json.loads(file.read_text())["texts"].values()

    monkeypatch.setattr(first._reader, "_engine", None)  # nothing can be read again
    region = first(image, "What is the total amount?")  # from memory
    again = Reader(folder=tmp_path)
    monkeypatch.setattr(again, "_engine", None)
    assert OCRLocalizer(again)(image, "What is the total amount?") == region  # from the folder


def np_point(x: float, y: float):
    import torch

    return torch.tensor([[x, y]], dtype=torch.float32)


@extra
def test_what_is_read_first_depends_on_the_question_and_rows_stay_together(localizer):
    given = page()
    lines = {name: localizer.likely(given, f"What is the {name}?") for name in ("company", "date", "total amount")}
    assert 0 in lines["company"] and len(lines["company"]) < len(given) / 2
    values = [line for line, text in given.texts.items() if text in ("17.17", "TOTAL")]
    assert set(values) <= set(lines["total amount"]) and 0 not in lines["total amount"]
    everything = replace(localizer, unread=0.0)
    assert everything.likely(given, "What is the total amount?") == list(range(len(given)))


@extra
def test_where_the_likely_lines_do_not_answer_the_others_are_read(localizer, monkeypatch):
    given, asked = page(), []
    hidden = Page(given.size, given.quads)

    def read(image, page, lines=None):
        asked.append(lines)
        page.texts.update({line: given.texts[line] for line in (lines or range(len(page)))})

    monkeypatch.setattr(localizer.reader, "detect", lambda image: hidden)
    monkeypatch.setattr(localizer.reader, "read", read)
    picture = Image.new("RGB", SIZE)
    assert not localizer(picture, "What is the total amount?").is_whole and len(asked) == 1 < len(given) - len(asked[0])
    assert localizer(picture, "Is the man smiling?").confidence < localizer.enough
    assert asked[2] is None and len(hidden.texts) == len(given)


@extra
def test_real_receipts_with_given_text(localizer):
    """A receipt of the test part of the bench."""
    if not (DATA / "receipts" / "lines.jsonl").is_file():
        pytest.skip(f"no receipts in {DATA}; set CROP_DATA")
    from bench.localizers import receipts

    pages = [receipt for receipt in receipts.load() if not receipt.development][:1]
    for receipt in pages:
        corners = (receipt.boxes * np.tile(receipt.size, 2))[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
        given = Page(receipt.size, np.float32(corners), dict(enumerate(receipt.texts)))
        for asked in receipt.asked:
            region = localizer.locate(given, asked.text)
            x0, y0, x1, y1 = asked.box
            assert region.contains(np_point((x0 + x1) / 2, (y0 + y1) / 2)), (receipt.name, asked)
            assert region.area < 0.2


def test_a_missing_package_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rapidocr" else find(name))
    with pytest.raises(ImportError, match=r'rapidocr must be installed.*pip install "crop-vlm\[ocr\]"'):
        OCRLocalizer()


@pytest.mark.parametrize("question, kind, words", [
    ("What is the address of the company?", "address", ("address", "company")),
    ("When was it bought?", "date", ("bought",)),
    ("How much is the total?", "total", ("total",)),
    ("What is the total number of items?", "number", ("total", "items")),
    ("Что написано?", "other", ("что", "написано")),
])  # fmt: skip
def test_reading_a_question(question, kind, words):
    found = Question.of(question)
    assert found.kind.name == kind and found.words == words


@pytest.mark.parametrize("kind, yes, no", [
    ("date", ["25/12/2018", "DATE: 3 March 2017", "Mar 3, 2017", "20180428/191204"], ["12.50", "TEL 03-77818333"]),
    ("amount", ["RM 9", "1,234.50", "-0.02", "9 .00"], ["12.05.2018", "00550388"]),
    ("contact", ["03-7781 8333", "info@mail.com", "WWW.SHOP.COM"], ["9.00", "TOTAL"]),
])  # fmt: skip
def test_the_look_of_answers(kind, yes, no):
    value = next(entry for entry in KINDS if entry.name == kind).value
    assert all(map(value.search, yes)) and not any(map(value.search, no)) and not OTHER.value.search("anything")


def test_labels_and_blocks():
    given = page([["NAME", "12.00"], ["ADDRESS", "7.00"]])
    beside = neighbours(given.boxes.astype(float), list(given.texts.values()))
    assert beside.left.tolist() == [-1, 0, -1, 2] and beside.above.tolist() == [-1, -1, 0, -1]
    assert np.argwhere(beside.near).tolist() == [[0, 2], [1, 3], [2, 0], [3, 1]]


def test_words_alike():
    assert alike("total", "total") == 1 and alike("total", "totalamount") == 0.9 and alike("total", "subtotal") == 0.7
    assert alike("cashier", "cashler") > 0.6 and alike("date", "rate") == 0 == alike("no", "now")
    assert amounts_of("2 x 1,234.50 = 2 469.00") == [1234.5, 2469.0]


def test_lines_are_taken_until_the_rest_is_worth_little():
    found, area = np.array([0.01, 0.9, 0.05, 0.6, 0.0]), np.full(5, 0.04)
    assert choose(found, area, limit=0.2, tail=0.02, sure=0.25) == [1, 3, 2]
    assert choose(found, area, limit=0.04, tail=0.02, sure=0.25) == [1, 3]
    assert choose(found, area, limit=0.04, tail=0.02, sure=0.7) == [1]
    assert choose(np.zeros(2), area[:2], limit=0.1, tail=0.02, sure=0.5) == [0]


@extra
@pytest.mark.parametrize(
    "change, message", [({"limit": 0.0}, "limit must be in"), ({"margin": (-1.0, 0.0)}, "margin must be")]
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        OCRLocalizer(**change)
    with pytest.raises(ValueError, match="side must be >= 1"):
        Reader(side=0)
    with pytest.raises(FileNotFoundError, match="folder must exist"):
        Reader(folder="/no/such/folder")


@extra
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_page_on_its_side_or_head_is_read_all_the_same(quarters):
    page = Image.new("RGB", (600, 400), "white")
    draw = ImageDraw.Draw(page)
    for number, text in enumerate(
        ["Super Mart Enterprise", "Date 12/03/2019", "Total amount 45.00", "Thank you, come again"]
    ):
        draw.text((40, 30 + 80 * number), text, "black", ImageFont.load_default(36))
    localizer, question = OCRLocalizer(Reader()), "What is the date?"
    upright = localizer(page, question)
    turned = localizer(page.rotate(90 * quarters, expand=True), question)
    assert "12/03/2019" in turned.reason and turned.confidence == pytest.approx(upright.confidence, abs=0.1)
    x0, y0, x1, y1 = turned.boxes[0]
    for _ in range(4 - quarters):  # back upright, counterclockwise
        x0, y0, x1, y1 = y0, 1 - x1, y1, 1 - x0
    assert (x0, y0, x1, y1) == pytest.approx(upright.boxes[0], abs=0.03)


@extra
def test_what_cannot_be_read_in_any_orientation_keeps_its_region(monkeypatch):
    localizer = OCRLocalizer(Reader())
    monkeypatch.setattr(Page, "upright", property(lambda page: False))
    picture = Image.new("RGB", (300, 100), "white")
    ImageDraw.Draw(picture).text((20, 30), "Date 12/03/2019", "black", ImageFont.load_default(30))
    assert "12/03/2019" in localizer(picture, "What is the date?").reason
