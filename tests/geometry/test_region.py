"""Regions: boxes in the original image. Hand-computed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crop.geometry.region import Region

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "boxes",
    [
        (),
        ((0.2, 0.2, 0.2, 0.5),),
        ((0.5, 0.2, 0.3, 0.5),),
        ((0.1, 0.6, 0.3, 0.5),),
        ((math.nan, 0.0, 1.0, 1.0),),
        ((-math.inf, 0.0, 1.0, 1.0),),
        ((1.0, 0.0, 1.5, 1.0),),
        ((-0.5, 0.0, 0.0, 1.0),),
        ((0.0, 1.2, 1.0, 1.4),),
        ((0.0, 0.0, 1.0),),
        (0.0, 0.0, 1.0, 1.0),
        ((0.1, 0.1, 0.2, 0.2), (0.3, 0.3, 0.3, 0.4)),
    ],
)
def test_bad_boxes_raise(boxes):
    with pytest.raises(ValueError, match="Region: "):
        Region(boxes)


@pytest.mark.parametrize("confidence", [-0.1, 1.1, math.nan])
def test_bad_confidence_raises(confidence):
    with pytest.raises(ValueError, match="confidence must be in"):
        Region.whole(confidence)


def test_boxes_are_clipped_compared_and_hashed_by_value():
    region = Region([[-0.5, 0.25, 0.5, 2.0]], 0.5)
    assert region.boxes == ((0.0, 0.25, 0.5, 1.0),)
    assert region == Region.box(0.0, 0.25, 0.5, 1.0, 0.5)
    assert len({region, Region.box(0.0, 0.25, 0.5, 1.0, 0.5), Region.whole()}) == 2


def test_from_blocks_is_inclusive():
    assert Region.from_blocks(2, 3, 2, 4).boxes == ((0.25, 0.375, 0.375, 0.625),)
    assert Region.from_blocks(0, 0, 7, 7).is_whole
    assert Region.from_blocks(1, 0, 1, 0, grid=2).boxes == ((0.5, 0.0, 1.0, 0.5),)


@pytest.mark.parametrize("blocks", [(0, 0, 8, 0), (-1, 0, 1, 1), (3, 0, 2, 0), (0, 5, 0, 4)])
def test_from_blocks_raises(blocks):
    with pytest.raises(ValueError, match="from_blocks: blocks must"):
        Region.from_blocks(*blocks)


def test_from_pixels():
    assert Region.from_pixels((50, 20, 100, 60), (200, 80)).boxes == ((0.25, 0.25, 0.5, 0.75),)
    two = Region.from_pixels([[0, 0, 20, 8], np.array([100, 40, 300, 80])], (200, 80), 0.25)
    assert two == Region(((0.0, 0.0, 0.1, 0.1), (0.5, 0.5, 1.0, 1.0)), 0.25)
    for boxes, size in (((0, 0, 1), (2, 2)), ([[0, 0, 1]], (2, 2)), ((0, 0, 1, 1), (0, 2))):
        with pytest.raises(ValueError, match="from_pixels: "):
            Region.from_pixels(boxes, size)


@pytest.mark.parametrize(
    ("boxes", "area", "is_whole"),
    [
        (((0.0, 0.0, 0.5, 0.5),), 0.25, False),
        (((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0)), 0.75, False),
        (((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)), 0.5, False),
        (((0.0, 0.0, 1 / 3, 1.0), (1 / 3, 0.0, 1.0, 0.7), (0.1, 0.7, 1.0, 1.0)), 1.0, True),
        (((-1.0, -1.0, 2.0, 2.0),), 1.0, True),
        (((0.0, 0.0, 1.0, 0.999),), 0.999, False),
    ],
)
def test_area_of_the_union(boxes, area, is_whole):
    region = Region(boxes)
    assert region.area == pytest.approx(area, abs=1e-12)
    assert region.is_whole is is_whole


def test_whole_contains_every_centre_of_the_image():
    last = np.nextafter(np.float32(1), np.float32(0))
    values = torch.tensor([0.0, 1e-45, 0.5, float(last)])
    assert Region.whole().contains(torch.cartesian_prod(values, values)).all()
    assert not Region.whole().contains(torch.tensor([[1.0, 0.5], [0.5, -1e-6]])).any()


def test_contains_is_half_open_in_the_precision_of_the_centres():
    # float32(0.7) < 0.7: compared in float64 the centre would leave the box it borders.
    center = torch.tensor([[0.7, 0.5], [0.2, 0.5]])
    assert Region.box(0.7, 0, 1, 1).contains(center).tolist() == [True, False]
    assert Region.box(0, 0, 0.7, 1).contains(center).tolist() == [False, True]
    assert Region.box(0, 0.5, 1, 1).contains(center).all()
    assert not Region.box(0, 0, 1, 0.5).contains(center).any()


def test_dilate_and_union():
    region = Region.box(0.25, 0.5, 0.5, 0.75, 0.5)
    assert region.dilate(0.25) == Region.box(0.0, 0.25, 0.75, 1.0, 0.5)
    assert region.dilate(0.0) == region
    assert region.union(Region.whole(0.25)).boxes == (*region.boxes, *Region.whole().boxes)
    assert region.union(Region.whole(0.25)).confidence == 0.25
    for margin in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin must be"):
            region.dilate(margin)


def test_distance_is_signed():
    center = torch.tensor([[0.5, 0.5], [0.3, 0.5], [0.25, 0.5], [1.0, 0.5], [1.0, 1.0], [0.6, 0.5]])
    expected = [-0.25, -0.05, 0.0, 0.25, math.sqrt(0.125), -0.15]
    box = Region.box(0.25, 0.25, 0.75, 0.75)
    torch.testing.assert_close(box.distance(center), torch.tensor(expected))
    nearer = box.union(Region.box(0.9, 0.0, 1.0, 1.0)).distance(center)
    torch.testing.assert_close(nearer[3:5], torch.tensor([0.0, 0.0]))
