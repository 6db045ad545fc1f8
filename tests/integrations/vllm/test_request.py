"""What a request may ask for, and that everything else is refused with one error that names requirement and value."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crop.geometry.region import Region
from crop.integrations.vllm.request import KEYS, MOST_BOXES, ImageRequest, own_keys, parse, without_own
from crop.integrations.vllm.settings import Settings
from crop.methods.plc import PreLLMCompression

pytestmark = pytest.mark.fast

BOX, OTHER = [0.1, 0.2, 0.5, 0.6], [0.5, 0.5, 1.0, 1.0]
SERVER = Settings(keep=0.2, mode="mean")


def asked(count: int, settings: Settings = SERVER, **wishes) -> list[tuple | None]:
    """(keep, mode, boxes) of each image."""
    request = parse({f"crop_{name}": value for name, value in wishes.items()}, count, settings)
    return [
        None if one is None else (one.method.keep, one.method.mode, one.region and list(map(list, one.region.boxes)))
        for one in request.images
    ]


def test_a_box_serves_the_only_image_or_one_each():
    assert asked(1, region=BOX) == [(0.2, "mean", [BOX])]
    assert asked(1, region=[BOX]) == asked(1, region=tuple(BOX)) == asked(1, region=BOX)
    assert asked(1, region=[[BOX, OTHER]], keep=7) == [(7, "mean", [BOX, OTHER])]
    assert asked(2, region=[BOX, None], keep=0.5, mode="max") == [(0.5, "max", [BOX]), (0.5, "max", [[0, 0, 1, 1]])]
    assert asked(2, region=[[OTHER], [BOX, OTHER]]) == [(0.2, "mean", [OTHER]), (0.2, "mean", [BOX, OTHER])]


def test_without_a_wish_nothing_is_pruned():
    assert asked(2) == [None, None] and asked(0) == []
    assert asked(2, mode="max") == [None, None]
    assert asked(2, keep=0.11) == [(0.11, "mean", [[0, 0, 1, 1]])] * 2
    assert asked(1, region=BOX, keep=1.0) == [None]
    assert asked(1, region=BOX, keep=2) == [(2, "mean", [BOX])]  # tokens
    assert parse({"max_pixels": 3}, 1, SERVER).images == (None,)


def test_whole_numbers_are_sides_too_and_boxes_are_clipped():
    assert asked(1, region=[0, 0, 1, 1]) == [(0.2, "mean", [[0, 0, 1, 1]])]
    assert asked(1, region=[-0.5, 0.2, 0.5, 3]) == [(0.2, "mean", [[0, 0.2, 0.5, 1]])]


def test_a_localizer_is_asked_where_the_request_or_the_server_says_so():
    server = Settings(localizer="ocr")
    for settings, wishes in ((SERVER, {"crop_localizer": "ocr", "crop_question": "total?"}), (server, {})):
        request = parse(wishes, 2, settings)
        assert request.localizer == "ocr" and [one.region for one in request.images] == [None, None]
        assert request.question == wishes.get("crop_question")
        found = request.located(lambda number: Region.box(0, 0, 1, 0.5 + number / 4))
        assert [one.region.boxes[0][3] for one in found.images] == [0.5, 0.75] and found.localizer is None
    for wishes in ({"crop_region": BOX}, {"crop_keep": 0.5}, {"crop_keep": 1.0}):
        assert parse(wishes, 1, server).localizer is None  # the request says something
    assert parse({}, 0, server) == parse({}, 0, SERVER)


WRONG = [
    (1, {"region": "left"}, r"crop_region must be \[x0, y0, x1, y1\].*got 'left'"),
    (1, {"region": 3}, "crop_region must be .*got 3"),
    (1, {"region": {}}, "crop_region must be .*got {}"),
    (1, {"region": []}, "one entry per image, got 0 for 1"),
    (1, {"region": [[]]}, r"crop_region must be .*got \[\]"),
    (1, {"region": [0.1, 0.2, 0.3]}, r"crop_region must be .*got \[0.1, 0.2, 0.3\]"),
    (1, {"region": [0.5, 0.2, 0.1, 0.6]}, "x0 < x1 and y0 < y1"),
    (1, {"region": [2, 2, 3, 3]}, r"must overlap the image"),
    (1, {"region": [0.1, 0.2, math.nan, 0.6]}, "must be finite"),
    (1, {"region": [0.1, 0.2, math.inf, 0.6]}, "must be finite"),
    (1, {"region": [0, 0, 10**400, 1]}, "crop_region"),
    (1, {"region": [True, 0.2, 0.3, 0.6]}, "crop_region must be .*got"),
    (1, {"region": ["0", "0", "1", "1"]}, "crop_region must have one entry per image, got 4"),
    (1, {"region": [["0", "0", "1", "1"]]}, "crop_region must be .*got"),
    (1, {"region": [[BOX, "x"]]}, "crop_region must be .*got"),
    (1, {"region": [[[BOX]]]}, "crop_region must be .*got"),
    (1, {"region": [[BOX] * (MOST_BOXES + 1)]}, f"at most {MOST_BOXES} boxes per image, got {MOST_BOXES + 1}"),
    (2, {"region": BOX}, "one entry per image, got 1 for 2 images"),
    (1, {"region": [BOX, OTHER]}, "one entry per image, got 2 for 1 images"),
    (0, {"region": BOX}, "images must come with crop_region"),
    (0, {"keep": 0.5}, "images must come with"),
    (1, {"keep": 0}, r"crop_keep as a token count must be >= 1, got 0"),
    (1, {"keep": 1}, "crop_keep must be not the integer 1, which JSON writers make of 1.0, too: .*; got 1"),
    (1, {"keep": -3}, r"crop_keep as a token count must be >= 1, got -3"),
    (1, {"keep": 1.5}, r"crop_keep as a fraction must be in \(0, 1\], got 1.5"),
    (1, {"keep": math.nan}, r"crop_keep as a fraction must be in \(0, 1\], got nan"),
    (1, {"keep": 10**5000}, r"crop_keep as a token count must be in \[1, 16777216\], got a value of type int"),
    (1, {"region": [0, 0, 10**5000, 1]}, "crop_region"),
    (1, {"keep": "0.5"}, r"crop_keep must be a float in \(0, 1\] or an int >= 1, got '0.5'"),
    (1, {"keep": True}, "crop_keep must be .*got True"),
    (1, {"keep": [0.1]}, r"crop_keep must be .*got \[0.1\]"),
    (1, {"keep": 0.5, "mode": "sum"}, "crop_mode must be one of .*got 'sum'"),
    (1, {"mode": [[10**39] * 6] * 6}, r"crop_mode must be one of .*\.\.\."),
    (1, {"mode": ["mean"]}, "crop_mode must be one of"),
    (1, {"mode": None}, "crop_mode must be one of"),
    (1, {"localizer": "attention"}, "crop_localizer must be one of .*got 'attention'"),
    (1, {"localizer": 5}, "crop_localizer must be one of"),
    (1, {"localizer": "ocr", "region": BOX}, "crop_region must come without crop_localizer"),
    (1, {"question": 5}, "crop_question must be a text of 1 to 4096 characters, got 5"),
    (1, {"question": ""}, "crop_question must be a text"),
    (1, {"question": "a" * 5000}, "crop_question must be a text"),
    (1, {"regoin": BOX}, "arguments must be among crop_region, .*got 'crop_regoin'"),
    (1, {"region": BOX, "keep": 1.0, "mode": 3}, "crop_mode"),
    (1, {"region": "x", "keep": 1.0}, "crop_region must be"),
]  # fmt: skip


@pytest.mark.parametrize("count,wishes,error", WRONG)
def test_what_is_malformed_is_refused(count, wishes, error):
    with pytest.raises(ValueError, match=error) as caught:
        asked(count, **wishes)
    assert len(str(caught.value)) < 400 and str(caught.value).startswith("crop: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=24,
)


@given(st.dictionaries(st.sampled_from([*KEYS, "crop_", "crop_x", "size"]), json_values, max_size=4), st.integers(0, 3))
def test_whatever_is_sent_is_a_request_or_a_value_error(arguments, count):
    try:
        request = parse(arguments, count, SERVER)
    except ValueError as error:
        assert str(error).startswith("crop: ") and len(str(error)) < 400
    else:
        assert len(request.images) == count


def test_a_server_keeps_no_integer_1_either():
    with pytest.raises(ValueError, match="crop: keep must be not the integer 1, .*; got 1"):
        Settings(keep=1)
    assert Settings(keep=1.0).keep == 1.0 and Settings(keep=2).keep == 2


def test_identity_tells_plans_apart():
    def identity(keep=0.2, mode="distinct", boxes=((0.0, 0.0, 0.5, 0.5),)):
        return ImageRequest(PreLLMCompression(keep=keep, mode=mode), Region(boxes)).identity

    moved, two = ((0.0, 0.0, 0.5, 0.6),), ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0))
    found = [identity(), identity(keep=1), identity(mode="mean"), identity(boxes=moved), identity(boxes=two)]
    found.append(identity(boxes=two[::-1]))
    assert len(set(found)) == len(found) and identity() == identity()
    assert json.loads(identity())[0] == "0.2" and identity(keep=1) != identity(keep=1.0)


def test_own_keys_and_those_of_the_processor_are_told_apart():
    given = {"crop_keep": 0.1, "max_pixels": 5, "crop_size": 3}
    assert own_keys(given) == {"crop_keep": 0.1} and without_own(given) == {"max_pixels": 5, "crop_size": 3}
