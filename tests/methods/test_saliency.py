"""Pooling by how unlike the rest of its image a token is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crop import ops
from crop.geometry.layout import NEWLINE, PADDING, VisionLayout
from crop.geometry.region import Region
from crop.methods import PreLLMCompression
from crop.methods.saliency import patches_of, saliency_weights
from crop.ops.reference import FARTHEST, SHARPNESS
from crop.patching.batch_plan import BatchPlan, plan_batch

pytestmark = pytest.mark.fast


def planned(layouts: list[tuple[int, VisionLayout]], real: torch.Tensor, region: Region, **strides):
    return plan_batch(PreLLMCompression(**strides), layouts, [region] * len(layouts), real)


def weights(plan: BatchPlan, embeds: torch.Tensor) -> torch.Tensor:
    return saliency_weights(plan.pool.alone, plan.patches, embeds)


def distinctness(tokens: torch.Tensor) -> torch.Tensor:
    """Standard deviations, of one image."""
    return ops.saliency(tokens, torch.arange(len(tokens))[None]).log() / SHARPNESS


def background(tokens: int, dim: int = 32, seed: int = 0) -> torch.Tensor:
    """Tokens that look alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, generator=generator) + 0.1 * torch.randn(tokens, dim, generator=generator)


def test_what_stands_out_represents_its_cell():
    tokens = background(64)
    odd = torch.randn(32, generator=torch.Generator().manual_seed(1))
    tokens[[9, 30]] = odd
    layout = VisionLayout.grid(8, 8)
    batch = planned([(0, layout)], torch.ones(1, 64, dtype=torch.bool), Region.whole(), inside=4, context=4)
    weight = weights(batch, tokens[None])
    pooled = ops.adaptive_pool(tokens, batch.pool.plan, "weighted", weight)
    alike = torch.cosine_similarity(pooled, odd[None], dim=-1)
    assert len(pooled) == 4
    # Token 9 is in the first cell, 30 in the second; a plain mean would hold a sixteenth of them.
    assert (alike[:2] > 0.99).all() and (alike[2:] < 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_order_say_nothing(dtype):
    tokens = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = distinctness(tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(distinctness(tokens * 8), found, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(distinctness(tokens.flip(0)), found.flip(0), atol=1e-4, rtol=1e-4)
    assert abs(float(found.mean())) < 1e-5 and abs(float(found.std(correction=0)) - 1) < 0.05


@pytest.mark.parametrize("tokens", [torch.ones(9, 8), torch.zeros(9, 8), torch.ones(1, 8)])
def test_where_nothing_stands_out_it_is_the_mean(tokens):
    assert (distinctness(tokens).abs() < 0.01).all()


def test_a_single_outlier_among_very_many_stays_finite():
    tokens = torch.zeros(40_000, 4)
    tokens[:, 0] = 1.0
    tokens[7] = torch.tensor([-1.0, 0, 0, 0])
    layout = VisionLayout.grid(200, 200)
    batch = planned([(0, layout)], torch.ones(1, 40_000, dtype=torch.bool), Region.whole(), inside=4, context=4)
    assert float(distinctness(tokens).max()) == pytest.approx(FARTHEST)
    weight = weights(batch, tokens[None])
    pooled = ops.adaptive_pool(tokens, batch.pool.plan, "weighted", weight)
    assert torch.isfinite(weight).all() and torch.isfinite(pooled).all()
    assert float(pooled[1, 0]) < -0.99


def test_each_image_is_judged_by_itself_and_text_is_left_alone():
    """A batch with padding on the left and two images in a sample equals each image alone, bit for bit."""
    grid = VisionLayout.grid(4, 4)
    features = [torch.randn(16, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    embeds = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(9))
    places = [(0, 2), (0, 20), (1, 22)]
    for (sample, start), rows in zip(places, features, strict=True):
        embeds[sample, start : start + 16] = rows
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :20] = False
    images = [(sample, _moved(grid, start)) for sample, start in places]
    batch = planned(images, real, Region.whole(), inside=2, context=2)
    weight = weights(batch, embeds).view(2, 40)
    taken = torch.zeros(2, 40, dtype=torch.bool)
    for (sample, start), rows in zip(places, features, strict=True):
        alone = planned([(0, grid)], torch.ones(1, 16, dtype=torch.bool), Region.whole(), inside=2, context=2)
        here = weight[sample, start : start + 16]
        assert torch.equal(here, weights(alone, rows[None]))
        assert here.unique().numel() > 8
        taken[sample, start : start + 16] = True
    assert (weight[~taken] == 1).all()


def _moved(layout: VisionLayout, start: int) -> VisionLayout:
    return replace(layout, position=layout.position + start)


def test_padding_and_newlines_are_not_part_of_the_picture():
    layout = VisionLayout.grid(4, 4)
    kind = layout.kind.clone()
    kind[3::4], kind[12:] = NEWLINE, PADDING
    layout = replace(layout, kind=kind)
    tokens = torch.randn(16, 8, generator=torch.Generator().manual_seed(4))
    other = torch.where((kind == 0)[:, None], tokens, 100.0)
    alone = torch.zeros(16, dtype=torch.bool)
    patches = patches_of([(0, layout)], 16)
    weight = saliency_weights(alone, patches, tokens[None])
    assert torch.equal(weight, saliency_weights(alone, patches, other[None]))
    assert (weight[kind != 0] == 1).all() and (weight[kind == 0] != 1).all()


def test_what_is_alone_in_its_cell_keeps_its_bits():
    tokens = torch.randn(64, 24, generator=torch.Generator().manual_seed(5))
    layout = VisionLayout.grid(8, 8)
    batch = planned([(0, layout)], torch.ones(1, 64, dtype=torch.bool), Region.box(0.1, 0.1, 0.4, 0.4))
    plan = batch.pool.plan
    pooled = ops.adaptive_pool(tokens, plan, "weighted", weights(batch, tokens[None]))
    single = plan.counts == 1
    assert 0 < int(single.sum()) < len(single)
    assert torch.equal(pooled[single], tokens[plan.leader[single].long()])
