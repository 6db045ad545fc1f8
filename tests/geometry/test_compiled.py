"""Planning in compiled code against its twins in numpy: not a bit apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crop import backend
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.geometry.strides import plan_by_budget, plan_by_strides
from crop.patching.pool_step import PoolStep, pool_images
from tests.support.layouts import layouts, regions

pytestmark = [pytest.mark.fast, pytest.mark.skipif(backend.native is None, reason="nothing was compiled")]

ARRAYS = ("members", "offsets", "leader", "level")
GEOMETRY = ("center", "row", "col", "view", "kind")
STEP = ("kept_index", "slot_of", "source", "alone", "real")


def same(one: object, other: object, names: tuple[str, ...]) -> None:
    for name in names:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, msg=name)


def planned(layout: VisionLayout, region: Region, ring: int, budget: int, strides: tuple[int, int, int]) -> tuple:
    """Cells by budget and by strides; levels of the layout and of what is left of it, which is a layout, too."""
    cells = plan_by_budget(layout, region, ring, budget)
    left = layout.pool(cells, torch.arange(cells.num_out))
    again = plan_by_budget(left, region, ring, max(1, budget // 2))
    return [cells, plan_by_strides(layout, region, ring, strides), again], left, [layout.levels(region, ring), left.levels(region, ring)]  # fmt: skip


@given(layouts, regions, st.integers(0, 3), st.data())
@settings(max_examples=300, deadline=None)
def test_cells_levels_and_pooled_layouts(layout, region, ring, data):
    budget = data.draw(st.integers(1, len(layout)))
    strides = tuple(sorted(data.draw(st.integers(1, 16)) for _ in range(3)))
    plans, left, levels = planned(layout, region, ring, budget, strides)
    with backend.use_backend("twin"):
        wanted, wanted_left, wanted_levels = planned(layout, region, ring, budget, strides)
    for one, other in zip(plans, wanted, strict=True):
        same(one, other, ARRAYS)
    same(left, wanted_left, GEOMETRY)
    assert all(torch.equal(one, other) for one, other in zip(levels, wanted_levels, strict=True))


@given(st.lists(st.tuples(layouts, regions, st.floats(0.05, 1), st.booleans()), min_size=1, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_a_batch(images, data):
    """Images of one sample each, some left whole; padding on either side, text around."""
    rows, placed, plans = [], [], []
    for sample, (layout, region, keep, pooled) in enumerate(images):
        before, after, padding = (data.draw(st.integers(0, 4)) for _ in range(3))
        real = torch.ones(before + len(layout) + after, dtype=torch.bool)
        left = data.draw(st.booleans())
        rows.append(torch.cat([real.new_zeros(padding * left), real, real.new_zeros(padding * (not left))]))
        placed.append((sample, layout.at(torch.arange(len(layout)) + before + padding * left)))
        plans.append(plan_by_budget(layout, region, 1, max(1, int(keep * len(layout)))) if pooled else None)
    plans[0] = plans[0] or PoolPlan.identity(len(images[0][0]))
    valid = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def found() -> tuple[PoolStep, list[int], torch.Tensor]:
        return pool_images(valid, placed, plans)

    step, counts, leader_of = found()
    with backend.use_backend("twin"):
        wanted, wanted_counts, wanted_leaders = found()
    assert counts == wanted_counts and step.full == wanted.full and torch.equal(leader_of, wanted_leaders)
    same(step, wanted, STEP)
    same(step.plan, wanted.plan, ARRAYS)


def test_what_would_leave_memory_is_refused():
    layout = VisionLayout.grid(2, 2)
    broken = PoolPlan(*(torch.tensor(a, dtype=torch.int32) for a in ([0, 9], [0, 2], [0])), torch.zeros(1).byte(), 4, check=False)  # fmt: skip
    with pytest.raises(ValueError, match="members must be tokens of the image"):
        layout.pool(broken, torch.arange(1))
    with pytest.raises(ValueError, match="members must be tokens of the image"):
        pool_images(torch.ones(1, 6, dtype=torch.bool), [(0, layout)], [broken])
    with pytest.raises(ValueError, match="positions must lie in the batch"):
        pool_images(torch.ones(1, 3, dtype=torch.bool), [(0, layout)], [PoolPlan.identity(4)])
