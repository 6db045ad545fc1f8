"""Stages of the first token: all are measured, of a narrow model."""

from __future__ import annotations

import pytest

from bench.latency.e2e.geometries import Shrink
from bench.latency.stages import CONTENDERS, STAGES, Meter, Work

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("memory", [False, True])
def test_every_stage_is_measured(memory):
    work = Work.of("qwen2.5-vl-7b-1k", Shrink(32, 32))
    for name, method in CONTENDERS.items():
        meter = Meter(memory)
        work.first_token(name, meter)
        stages = STAGES if name == "all" else STAGES[1:]
        assert tuple(meter.found) == stages and min(meter.found.values()) >= 0
        assert sum(meter.found.values()) > 0 and (method is None) == (name == "unpruned")
    assert 0.2 < work.encoded() < 0.5  # a tenth, its ring, whole windows, a sixteenth for the copy
