"""Plans of single images: what stays, how it is packed, how it pools; against the oracle of `crop.patch` for every family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from crop.geometry.layout import NEWLINE, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.integrations.vllm.planning import locate, plan_image, whole_placeholder
from crop.integrations.vllm.plans import FORMAT, STAMP, PlaceholderPlan, check_stamp, digest
from crop.integrations.vllm.request import ImageRequest
from crop.methods.plc import PreLLMCompression
from tests.support.batches import Sample, make_sample
from tests.support.families.entry import IMAGE
from tests.support.oracle import Oracle
from tests.support.tiny_families import FAMILIES, build_model, get_config

pytestmark = pytest.mark.usefixtures("one_thread")

REGIONS = (Region.box(0.1, 0.1, 0.5, 0.6), Region(((0.0, 0.0, 0.3, 0.3), (0.6, 0.5, 1.0, 1.0))))
IMAGES_ONLY = [name for name in FAMILIES if "video" not in name]
FAST = [pytest.param(name, marks=pytest.mark.fast) if FAMILIES[name].fast else name for name in IMAGES_ONLY]


def plan_of(family: str, sample: Sample, method: PreLLMCompression, region: Region, positions="original"):
    """The plan of a sample's only image, as the front process makes it; which of its ids take a row of the encoder."""
    image = sample.images[0]
    ids, is_embed = whole_placeholder(list(image.ids), lambda full: torch.tensor(full) == IMAGE)
    processor = FAMILIES[family].processor
    return plan_image(
        ImageRequest(method, region), get_config(family), ids, is_embed, sample.inputs(),
        None if processor is None else processor(), image.size, positions, digest("a picture"),
    )  # fmt: skip


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("region", REGIONS, ids=["box", "boxes"])
def test_plans_keep_and_pool_what_patch_does(family, region):
    model, entry = build_model(family, "eager"), FAMILIES[family]
    oracle, sample = Oracle(model, entry), make_sample(family, [entry.sizes[0], 6])
    for method in (PreLLMCompression(keep=0.3), PreLLMCompression(keep=0.2, mode="mean"), PreLLMCompression(keep=5)):
        plan = PlaceholderPlan.unpack(plan_of(family, sample, method, region).pack())
        decision = oracle.decide(sample, method, [region], sample.layouts())
        rows = [row for row in oracle.rows(sample, decision) if row[1] < len(sample.images[0].ids)]
        assert plan.places.tolist() == [leader for _, leader in rows] and plan.full == len(sample.images[0].ids)
        full, _ = oracle.embed(sample)
        wanted = oracle.pool(full, rows, decision.mode, oracle.weights(full, sample, decision))
        embedded = torch.tensor([sample.ids[leader] == IMAGE for _, leader in rows])
        _, (features, *levels) = oracle.features(sample)
        got = plan.apply(torch.cat([features, *levels], 1), features.shape[1])
        assert len(got) == int(embedded.sum())
        torch.testing.assert_close(got[:, : features.shape[1]], wanted[embedded], rtol=1e-4, atol=1e-5)
        if levels:  # further levels are pooled with the weights of the first
            assert got.shape[1] == features.shape[1] * (1 + len(levels))


@pytest.mark.fast
def test_a_packed_plan_is_the_plan():
    entry = FAMILIES["llava_next"]
    sample = make_sample("llava_next", [entry.sizes[0], 6])
    plan = plan_of("llava_next", sample, PreLLMCompression(keep=0.3, mode="max"), REGIONS[0])
    flat = plan.pack()
    assert flat.dtype == torch.int32 and flat.is_cpu and int(flat[0]) == FORMAT
    again = PlaceholderPlan.unpack(flat)
    assert (again.mode, again.full, again.picture) == ("max", plan.full, digest("a picture")) and again.prunes
    for name in ("members", "offsets", "leader"):
        assert torch.equal(getattr(again.pool, name), getattr(plan.pool, name))
    assert again.pool.num_tokens == plan.pool.num_tokens
    assert torch.equal(again.patches, plan.patches) and torch.equal(again.places, plan.places)
    moved = PlaceholderPlan.unpack(flat, torch.device("cpu"))
    assert torch.equal(moved.pack(), flat)


@pytest.mark.fast
def test_whole_images_and_those_whose_budget_is_all_stay_as_they_are():
    is_embed = torch.tensor([False, True, True, False, True])
    plan = PlaceholderPlan.unpack(PlaceholderPlan.whole(is_embed).pack())
    features = torch.randn(3, 4)
    assert not plan.prunes and plan.places.tolist() == [0, 1, 2, 3, 4] and not any(plan.picture)
    assert plan.apply(features, 4) is features
    sample = make_sample("llava", [(48, 32), 4])
    assert not plan_of("llava", sample, PreLLMCompression(keep=64), REGIONS[0]).prunes
    with pytest.raises(ValueError, match="must be <= num_original=64, got 65"):
        plan_of("llava", sample, PreLLMCompression(keep=65), REGIONS[0])


@pytest.mark.fast
def test_breaks_between_rows_take_no_row_of_the_encoder():
    """Two rows of three tokens, a break (text to the model) behind each; the second and third column are one cell."""
    layout = VisionLayout.grid(2, 4)
    kind = torch.tensor([0, 0, 0, NEWLINE] * 2, dtype=torch.uint8)
    layout = VisionLayout(layout.position + 1, layout.center, layout.row, layout.col, layout.view, kind, 8)
    label = torch.tensor([0, 1, 1, 2, 3, 4, 4, 2])  # both breaks are one cell
    pool = PoolPlan.from_labels(label, layout.row, layout.col, torch.zeros(8, dtype=torch.uint8))
    is_embed = torch.tensor([False, *([True] * 3 + [False]) * 2, False])  # a marker before and behind
    plan = PlaceholderPlan.of(pool, layout, "mean", is_embed)
    assert plan.places.tolist() == [0, 1, 2, 4, 5, 6, 9] and plan.full == 10
    assert plan.pool.num_tokens == 6 and plan.patches.tolist() == [0, 1, 2, 3, 4, 5]
    features = torch.arange(6.0)[:, None]
    assert plan.apply(features, 1).flatten().tolist() == [0, 1.5, 3, 4.5]


@pytest.mark.fast
def test_another_format_or_version_is_refused(monkeypatch):
    flat = PlaceholderPlan.whole(torch.ones(3, dtype=torch.bool)).pack()
    flat[0] = FORMAT + 1
    with pytest.raises(RuntimeError, match=f"must be of format {FORMAT}, got {FORMAT + 1}"):
        PlaceholderPlan.unpack(flat)
    check_stamp(SimpleNamespace(crop_stamp=STAMP))
    for config, got in ((SimpleNamespace(), "none"), (SimpleNamespace(crop_stamp="0.1, format 0"), "0.1, format 0")):
        with pytest.raises(RuntimeError, match=f"same version of crop-vlm, got {got} in front"):
            check_stamp(config)


@pytest.mark.fast
def test_digests_fit_the_field_and_tell_pictures_apart():
    names = [digest(name) for name in ("a", "b", "a" * 1000, "")]
    assert len(set(names)) == 4 and digest("a") == names[0]
    assert all(len(name) == 8 and -(2**31) <= min(name) and max(name) < 2**31 for name in names)


@pytest.mark.fast
def test_compact_is_refused_where_patch_refuses_it():
    sample = make_sample("idefics3", [FAMILIES["idefics3"].sizes[0], 6])
    plan_of("idefics3", sample, PreLLMCompression(keep=0.3), REGIONS[0])
    with pytest.raises(ValueError, match="positions must be 'original' for images with text among their tokens"):
        plan_of("idefics3", sample, PreLLMCompression(keep=0.3), REGIONS[0], "compact")


@pytest.mark.fast
def test_a_localizer_that_is_not_installed_is_a_value_error(monkeypatch):
    from crop.integrations.vllm import planning

    def missing(name):
        raise ImportError("pip install it")

    monkeypatch.setattr(planning, "get_localizer", missing)
    planning._localizer.cache_clear()
    with pytest.raises(
        ValueError, match="crop_localizer 'ocr' must be installed where the server runs: pip install it"
    ):
        locate("ocr", None, "what")
    monkeypatch.setattr(planning, "get_localizer", lambda name: lambda image, question: Region.box(0, 0, 1, 0.5))
    assert locate("ocr", None, "what") == Region.box(0, 0, 1, 0.5)
    planning._localizer.cache_clear()
