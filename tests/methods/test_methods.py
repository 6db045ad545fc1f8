"""What all methods share, and both stages together: budgets, names, real regions."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods import (
    Compose,
    DiverseCompression,
    EncoderPruning,
    InnerLLMPruning,
    Method,
    PreLLMCompression,
    by_name,
    register_method,
    registry,
)
from crop.methods.base import Features
from crop.methods.registry import POOL_SHARE
from tests.methods.test_ilp import kept_by
from tests.support.layouts import (
    QUESTION_REGIONS,
    layouts,
    regions,
)

pytestmark = pytest.mark.fast

quick = settings(max_examples=80)


@pytest.mark.parametrize("make", [lambda keep: PreLLMCompression(keep=keep), InnerLLMPruning])
@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (True, TypeError, r"keep must be a float in \(0, 1\] or an int >= 1, got True"),
        ("0.5", TypeError, "keep must be a float"),
        (0, ValueError, "keep as a token count must be >= 1, got 0"),
        (-3, ValueError, "keep as a token count must be >= 1, got -3"),
        (0.0, ValueError, r"keep as a fraction must be in \(0, 1\], got 0.0"),
        (-0.5, ValueError, "keep as a fraction"),
        (64.0, ValueError, "keep as a fraction"),
        (1.5, ValueError, "keep as a fraction"),
        (math.nan, ValueError, "keep as a fraction"),
        (math.inf, ValueError, "keep as a fraction"),
    ],
)
def test_bad_keep_raises(make, keep, error, message):
    with pytest.raises(error, match=message):
        make(keep)


@pytest.mark.parametrize(
    ("keep", "budget"),
    [(1, 1), (7, 7), (0.5, 18), (0.11, 4), (1e-9, 1), (35, 35), (0.98, 35)],
)
def test_keep_is_a_count_or_a_fraction(keep, budget):
    layout, region = VisionLayout.grid(6, 6), Region.box(0.2, 0.2, 0.6, 0.7)
    assert PreLLMCompression(keep=keep).plan(layout, region).num_out == budget
    assert InnerLLMPruning(keep).select(layout, region).num_keep == budget


@pytest.mark.parametrize("keep", [1.0, 36, 0.99])
def test_keep_all_is_none(keep):
    layout, region = VisionLayout.grid(6, 6), Region.box(0.2, 0.2, 0.6, 0.7)
    assert PreLLMCompression(keep=keep).plan(layout, region) is None
    assert InnerLLMPruning(keep).select(layout, region) is None


def test_one_token_and_all_tokens_are_not_confused():
    # 1 == 1.0 in Python, also as a key of a cache.
    layout, region = VisionLayout.grid(3, 3), Region.whole()
    assert PreLLMCompression(keep=1).plan(layout, region).num_out == 1
    assert PreLLMCompression(keep=1.0).plan(layout, region) is None
    assert PreLLMCompression(keep=1).plan(layout, region).num_out == 1
    assert InnerLLMPruning(1).select(layout, region).num_keep == 1
    assert InnerLLMPruning(1.0).select(layout, region) is None


def test_more_tokens_than_the_image_had_raise():
    layout = VisionLayout.grid(4, 4)
    message = "keep as a token count must be <= num_original=16, got 17"
    with pytest.raises(ValueError, match=f"PreLLMCompression: {message}"):
        PreLLMCompression(keep=17).plan(layout, Region.whole())
    with pytest.raises(ValueError, match=f"InnerLLMPruning: {message}"):
        InnerLLMPruning(17).select(layout, Region.whole())


def test_method_keeps_everything():
    layout = VisionLayout.grid(2, 2)
    assert Method().plan(layout, Region.whole()) is None
    assert Method().select(layout, Region.whole()) is None
    assert Method.layer is None


def test_compose_takes_each_stage_from_its_method():
    plc, ilp = PreLLMCompression(mode="max"), InnerLLMPruning(0.1, layer=3, rows="last")
    both = Compose(plc, ilp)
    assert (both.layer, both.rows, both.pool_mode) == (3, "last", "max")
    layout, region = VisionLayout.grid(8, 8), Region.box(0.1, 0.1, 0.4, 0.3)
    assert torch.equal(both.plan(layout, region).members, plc.plan(layout, region).members)
    assert torch.equal(both.select(layout, region).priority, ilp.select(layout, region).priority)
    with pytest.raises(TypeError, match="Compose: ilp must be a Method, got 3"):
        Compose(plc, 3)


@given(layouts, regions, st.floats(0.05, 1.0))
@quick
def test_both_stages_end_with_keep_of_the_original_tokens(layout, region, keep):
    method = by_name("crop", keep)
    assert method.layer == "auto" and method.with_layer(3).layer == 3
    plan = method.plan(layout, region)
    if plan is not None:
        assert plan.num_out == max(1, round(keep**POOL_SHARE * len(layout)))
        leader = plan.decide(Features(torch.randn(len(layout), 4), torch.randn(2, 4)), *plan.given).leader
        assert len(leader) == plan.num_out and (leader.diff() > 0).all()
        layout = layout.take(leader)
    selection = method.select(layout, region)
    left = len(layout) if selection is None else selection.num_keep
    assert left == max(1, round(keep * layout.num_original))
    assert len(kept_by(selection, [0.0] * len(layout))) == left


def test_a_stage_before_the_encoder_by_name():
    stage = EncoderPruning()
    assert by_name("crop", 0.0625, encoder=True) == replace(by_name("crop", 0.0625), encoder=stage)
    assert by_name("none", 0.5, encoder=True) == stage
    assert by_name("plc", 0.5, encoder=True) == Compose(PreLLMCompression(keep=0.5), encoder=stage)
    for name in ("ilp", "pyramiddrop", "divprune"):
        made = by_name(name, 0.5, 12, encoder=True)
        assert made.encoder == stage and by_name(name, 0.5, 12) in (made.plc, made.ilp)
    with pytest.raises(ValueError, match="'visionzip' does not compose .*: Compose: plc must not observe the encoder"):
        by_name("visionzip", 0.5, encoder=True)
    register_method("tiles", lambda keep, num_layers: stage)
    try:
        with pytest.raises(
            ValueError, match="'tiles' prunes before the encoder by itself, got encoder=True; leave it out"
        ):
            by_name("tiles", 0.5, encoder=True)
    finally:
        del registry._builds["tiles"]


def test_names_of_the_package_stay_its_own():
    with pytest.raises(ValueError, match="register_method: name must be none of crop, plc, .*got 'fastv'"):
        register_method("fastv", lambda keep, layers: None)
    with pytest.raises(ValueError, match="got ''"):
        register_method("", lambda keep, layers: None)
    with pytest.raises(TypeError, match="build must be a function of keep and num_layers, got str"):
        register_method("mine", "plc")
    assert by_name("fastv", 0.5) == InnerLLMPruning(0.5, rows="last", ring=0)


def test_by_name():
    assert by_name("none", 0.5) is None
    assert by_name("plc", 0.5) == PreLLMCompression(keep=0.5)
    assert by_name("ilp", 0.5) == InnerLLMPruning(0.5)
    assert by_name("crop", 0.0625) == Compose(DiverseCompression(0.125), InnerLLMPruning(0.0625))
    layout, region = VisionLayout.grid(6, 6), Region.box(0.0, 0.0, 0.5, 0.5)
    for name in ("crop", "plc", "ilp"):
        assert by_name(name, 1.0).plan(layout, region) is None
        assert by_name(name, 1.0).select(layout, region) is None
    assert by_name("fastv", 0.5) == InnerLLMPruning(0.5, rows="last", ring=0)
    with pytest.raises(ValueError, match=r"name must be one of .* got 'slowv'"):
        by_name("slowv", 0.5)
    with pytest.raises(ValueError, match="num_layers must be given for 'pyramiddrop'"):
        by_name("pyramiddrop", 0.5)
    with pytest.raises(ValueError, match="keep as a fraction"):
        by_name("none", 1.5)
    with pytest.raises(TypeError, match="by_name: keep must be a float"):
        by_name("plc", 64)


@pytest.mark.skipif(not QUESTION_REGIONS.is_file(), reason=f"needs {QUESTION_REGIONS}")
@pytest.mark.parametrize("keep", [64, 128, 192])
def test_real_regions_meet_the_budget(keep):
    layout = VisionLayout.grid(24, 24)
    plc, ilp = PreLLMCompression(keep=keep), InnerLLMPruning(keep)
    larger = 0
    real = [json.loads(line)["box"] for line in QUESTION_REGIONS.read_text().splitlines()[::97]]
    real = [box for box in real if box[0] < box[2] and box[1] < box[3]]
    for box in real:
        region = Region((box,))
        inside = layout.inside(region)
        plan = plc.plan(layout, region)
        assert plan.num_out == keep and (plan.inverse >= 0).all()
        kept = kept_by(ilp.select(layout, region), layout.center[:, 1].tolist())
        assert len(kept) == keep
        within = int(inside[kept].sum())
        assert within == min(keep, int(inside.sum()))
        larger += int(inside.sum()) > keep
        if inside.sum() <= keep - 12:  # the rest fits into twelve cells at stride 16
            assert (plan.counts[plan.inverse[inside].long()] == 1).all()
    assert 0 < larger < len(real) / 2
