"""Localizers made of localizers."""

from __future__ import annotations

import pytest
from PIL import Image

from crop.geometry.region import Region
from crop.localizers import BoxLocalizer, CascadeLocalizer, UnionLocalizer

pytestmark = pytest.mark.fast

PICTURE = Image.new("RGB", (8, 8))
SURE, UNSURE = Region.box(0, 0, 0.5, 0.5, 0.9), Region.box(0.5, 0.5, 1, 1, 0.3)
WHOLE = Region.whole(0.4, "nothing found")


def members(*regions):
    return tuple(map(BoxLocalizer, regions))


@pytest.mark.parametrize("regions, expected", [((UNSURE, WHOLE, SURE), SURE), ((SURE, UNSURE), SURE)])
def test_cascade_returns_the_first_that_is_sure_and_asks_no_further(regions, expected):
    def never(image, question):
        raise AssertionError("asked")

    assert CascadeLocalizer((*members(*regions), never))(PICTURE, "?") == expected


def test_cascade_of_the_unsure_is_the_whole_image_with_every_reason():
    region = CascadeLocalizer(members(UNSURE, WHOLE))(PICTURE, "?")
    assert region.is_whole and region.confidence == 0.4
    assert region.reason == "box: confidence 0.30; box: nothing found"
    assert CascadeLocalizer(members(UNSURE, WHOLE), min_confidence=0.2)(PICTURE, "?") == UNSURE


def test_union_joins_what_was_found_and_leaves_out_who_abstains():
    region = UnionLocalizer(members(UNSURE, WHOLE, SURE))(PICTURE, "?")
    assert region.boxes == UNSURE.boxes + SURE.boxes and region.confidence == 0.9
    nothing = UnionLocalizer(members(WHOLE, WHOLE))(PICTURE, "?")
    assert nothing.is_whole and nothing.confidence == 0.4 and "nothing found" in nothing.reason


def test_without_members_or_with_a_wrong_confidence():
    for kind in (CascadeLocalizer, UnionLocalizer):
        with pytest.raises(ValueError, match="at least one localizer"):
            kind(())
    with pytest.raises(ValueError, match="min_confidence must be in"):
        CascadeLocalizer(members(SURE), min_confidence=2)
