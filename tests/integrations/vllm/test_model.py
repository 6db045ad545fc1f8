"""The mixin of the workers, before a stand-in for a family's class of vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.integrations.vllm.features import FeatureCache, batches, part_of
from crop.integrations.vllm.model import OneAxis, PruningModel
from crop.integrations.vllm.plans import FIELD, STAMP, PlaceholderPlan, digest
from crop.methods.plc import PreLLMCompression

pytestmark = pytest.mark.fast
LAYOUT = VisionLayout.grid(4, 4)
ROWS = {"pixel_values": lambda given: given["grids"].prod(-1)}


def plan(name: str = "a", keep: float = 0.5, region: Region | None = None) -> PlaceholderPlan:
    everywhere = torch.ones(16, dtype=torch.bool)
    if keep == 1.0:
        return PlaceholderPlan.whole(everywhere, digest(name))
    cells = PreLLMCompression(keep=keep).plan(LAYOUT, region or Region.box(0, 0, 0.5, 0.5))
    return PlaceholderPlan.of(cells, LAYOUT, "mean", everywhere, digest(name))


class Family:
    """As one of vLLM's classes: 16 rows for each image, equal to its value; remembers what its encoder saw."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self.seen: list[list[float]] = []
        self.loaded = 0

    def embed_multimodal(self, **kwargs: Any) -> Any:
        values = kwargs["pixel_values"]
        values = (
            values.tolist()
            if "grids" not in kwargs
            else [float(v[0]) for v in values.split(kwargs["grids"].prod(-1).tolist())]
        )
        self.seen.append(values)
        return tuple(torch.full((16, 6), value) + torch.arange(16)[:, None] for value in values)

    def load_weights(self, weights: Any) -> int:
        self.loaded += 1
        return self.loaded

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        self.asked = input_tokens, mm_features
        return torch.arange(len(input_tokens)).expand(3, -1) * 2, len(input_tokens)

    def forward(self, input_ids: Any, positions: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return positions


class Pruned(PruningModel, Family):
    pass


class PrunedFlat(PruningModel, Family):
    crop_flat = ROWS


class PrunedLine(PruningModel, OneAxis, Family):
    pass


def make(kind: type = Pruned, budget: int = 64, stamp: str = STAMP, **settings: Any) -> Any:
    text = SimpleNamespace(hidden_size=4)
    config = SimpleNamespace(crop_stamp=stamp, crop=settings or None, get_text_config=lambda: text)
    return kind(
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(hf_config=config),
            scheduler_config=SimpleNamespace(max_num_encoder_input_tokens=budget),
            device_config=SimpleNamespace(device=torch.device("cpu")),
        )
    )


def embed(model: Any, *plans: PlaceholderPlan, values: Any = None) -> list[torch.Tensor]:
    pixels = torch.arange(len(plans)).float() * 100 if values is None else torch.tensor(values)
    return model.embed_multimodal(pixel_values=pixels, **{FIELD: [one.pack() for one in plans]})


def test_images_are_pooled_each_by_its_plan():
    model = make()
    whole, pruned = embed(model, plan("a", 1.0), plan("b"))
    assert whole.shape == (16, 6) and pruned.shape == (8, 6)
    wanted = plan().apply(torch.full((16, 6), 100.0) + torch.arange(16)[:, None], 4)
    torch.testing.assert_close(pruned, wanted)
    assert model.seen == [[0.0, 100.0]]


def test_videos_and_embeddings_pass_untouched():
    model = make()
    (rows,) = model.embed_multimodal(pixel_values=torch.tensor([7.0]))
    assert rows.shape == (16, 6)


def test_the_encoder_sees_as_many_images_as_memory_was_measured_for():
    model = make(budget=40)  # two images of 16
    found = embed(model, *(plan(str(n)) for n in range(5)))
    assert model.seen == [[0.0, 100.0], [200.0, 300.0], [400.0]]
    assert [int(rows[0, 0]) // 100 for rows in found] == [0, 1, 2, 3, 4]
    assert batches([5, 5, 5], 10) == [[0, 1], [2]] and batches([50, 5], 10) == [[0], [1]] and batches([], 10) == []


def test_hits_and_misses_of_the_features_are_logged(caplog):
    model = make()
    caplog.set_level("DEBUG", logger="vllm.crop")
    embed(model, plan("a"))
    embed(model, plan("a"), plan("b"))
    assert [line.message for line in caplog.records] == [
        "crop: features of 0 pictures, 0 hits, 1 misses", "crop: features of 1 pictures, 1 hits, 2 misses"
    ]  # fmt: skip


def test_another_region_of_a_known_picture_runs_no_encoder():
    model = make()
    other = Region.box(0.5, 0.5, 1, 1)
    first = embed(model, plan("a"), values=[1.0])[0]
    again, new = embed(model, plan("a", region=other), plan("b"), values=[1.0, 2.0])
    assert model.seen == [[1.0], [2.0]] and not torch.equal(first, again)
    torch.testing.assert_close(
        again, plan("a", region=other).apply(torch.full((16, 6), 1.0) + torch.arange(16)[:, None], 4)
    )
    torch.testing.assert_close(new, plan().apply(torch.full((16, 6), 2.0) + torch.arange(16)[:, None], 4))
    (whole,) = embed(model, plan("a", 1.0), values=[1.0])  # the whole picture, too
    assert whole.shape == (16, 6) and len(model.seen) == 2
    embed(model, plan("c"), plan("c", region=other), values=[3.0, 3.0])  # twice in one call
    assert model.seen[2:] == [[3.0]]


def test_pictures_without_a_name_and_whole_ones_are_not_kept():
    model = make()
    nameless = replace(plan(), picture=(0,) * 8)
    for _ in range(2):
        embed(model, nameless, nameless, values=[1.0, 2.0])
        embed(model, plan("w", 1.0), values=[3.0])
    assert model.seen == [[1.0, 2.0], [3.0]] * 2


def test_features_go_with_the_weights_and_where_none_are_wanted():
    model = make()
    embed(model, plan("a"))
    assert model.load_weights([]) == 1
    embed(model, plan("a"))
    assert len(model.seen) == 2
    model = make(feature_cache=0)
    embed(model, plan("a")), embed(model, plan("a"))
    assert len(model.seen) == 2


def test_rows_of_images_that_lie_behind_each_other_are_taken_apart():
    model = make(PrunedFlat)
    grids = torch.tensor([[1, 2, 2], [1, 1, 3], [1, 2, 1]])
    pixels = torch.cat([torch.full((int(grid.prod()),), float(n)) for n, grid in enumerate(grids)])
    arguments = {"pixel_values": pixels, "grids": grids, "shared": torch.tensor(5), "list": ["x", "y", "z"]}
    part = part_of(arguments, [0, 2], ROWS)
    assert part["pixel_values"].tolist() == [0, 0, 0, 0, 2, 2] and torch.equal(part["grids"], grids[[0, 2]])
    assert part["shared"] is arguments["shared"] and part["list"] == ["x", "z"]
    # Versions of vLLM differ in what they lay so: an entry per image is taken as that.
    assert part_of({"pixel_values": ["x", "y", "z"], "grids": grids}, [0, 2], ROWS)["pixel_values"] == ["x", "z"]
    plans = [plan(str(n)).pack() for n in range(3)]
    model.embed_multimodal(pixel_values=pixels[4:7], grids=grids[1:2], **{FIELD: plans[1:2]})
    model.embed_multimodal(pixel_values=pixels, grids=grids, **{FIELD: plans})
    assert model.seen == [[1.0], [0.0, 2.0]]


@dataclass(frozen=True)
class Place:
    offset: int
    length: int
    is_embed: Any = None


@dataclass(frozen=True)
class Feature:
    mm_position: Place
    data: Any
    modality: str = "image"


def feature(offset: int, one: PlaceholderPlan) -> Feature:
    return Feature(Place(offset, len(one.places)), {FIELD: SimpleNamespace(data=one.pack())})


def test_positions_are_those_of_the_unpruned_prompt():
    model, one = make(), plan()
    video = Feature(Place(1, 2, "mask"), None, "video")
    tokens = [1, 93, 93, *[90] * 8, 5, 6]
    ids, delta = model.get_mrope_input_positions(tokens, [feature(3, one), video])
    asked, features = model.asked
    assert asked == [1, 93, 93, *[90] * 16, 5, 6]
    assert [(f.modality, f.mm_position) for f in features] == [("video", Place(1, 2, "mask")), ("image", Place(3, 16))]
    places = [0, 1, 2, *(3 + one.places).tolist(), 19, 20]
    assert ids[0].tolist() == [2 * place for place in places] and delta == 21 + 8
    ids, delta = model.get_mrope_input_positions([1, 2], [])
    assert ids.shape == (3, 2) and delta == 2  # text alone: the family's own


def test_families_with_one_axis_get_one():
    model, one = make(PrunedLine), plan()
    ids, delta = model.get_mrope_input_positions([1, *[90] * 8, 5], [feature(1, one)])
    assert ids[2].tolist() == [0, *(1 + one.places).tolist(), 17] and delta == 8
    assert model.forward(None, ids).tolist() == ids[0].tolist()
    assert model.forward(None, torch.arange(4)).tolist() == [0, 1, 2, 3]  # compact: vLLM's own
    compact = make(PrunedLine, positions="compact")
    ids, delta = compact.get_mrope_input_positions([1, *[90] * 8, 5], [feature(1, one)])
    assert ids[0].tolist() == list(range(10)) and delta == 0


def test_a_worker_of_another_version_does_not_start():
    with pytest.raises(RuntimeError, match="one version on every machine"):
        make(stamp="0.0.1, format 1")


def test_the_least_recently_used_features_leave():
    cache = FeatureCache(100, "cpu")
    for name in "abc":
        cache.put(name, torch.zeros(10))  # 40 bytes
        cache.get("a")
    assert [cache.get(name) is not None for name in "abc"] == [True, False, True] and len(cache) == 2
    cache.put("big", torch.zeros(26))
    assert cache.get("big") is None and len(cache) == 2
    batch = torch.zeros(4, 10)
    cache.put("d", batch[1])
    batch.fill_(1)
    assert float(cache.get("d").sum()) == 0 and cache.get("d").untyped_storage().nbytes() == 40
    cache.clear()
    cache.put("e", torch.zeros(25))
    assert len(cache) == 1 and cache.get("e") is not None
