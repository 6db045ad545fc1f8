"""Full-size models of real checkpoints, without their weights: patched and planned for one picture with the defaults."""

from __future__ import annotations

import time
from typing import Any

import pytest

import crop
from crop.models import families
from tests.support import published
from tests.support.published import PUBLISHED

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = list(PUBLISHED)
KEEP = 0.11
REGION = crop.Region.box(0.2, 0.3, 0.6, 0.5)


@pytest.mark.fast
def test_every_family_has_published_sizes() -> None:
    missing = set(families()) - set(map(published.model_type, PUBLISHED))
    assert not missing, f"add published sizes to tests/support/published.json: {', '.join(sorted(missing))}"


@pytest.fixture(scope="module", params=NAMES)
def real(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, published.build(request.param)


def test_sizes(real):
    key, model = real
    assert published.parameters(key, model) == pytest.approx(PUBLISHED[key]["parameters"], rel=0.005)


@pytest.mark.parametrize("name", ["crop", "plc", "ilp"])
def test_plan(real, name, monkeypatch):
    key, model = real
    processor = published.image_processor(key)
    t = time.time()
    inputs = published.inputs(key, model.config, processor)
    t1 = time.time()
    estimate = crop.estimate(
        model, inputs, crop.by_name(name, KEEP), REGION, processor=processor, image_size=published.PICTURE
    )
    print(key, t1 - t, time.time() - t1, estimate)
