"""Positions of pruned prompts: those of the unpruned one, or without gaps; and how far they may reach."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from crop.geometry.region import Region
from crop.integrations.vllm.plans import PlaceholderPlan
from crop.integrations.vllm.positions import UnprunedPrompt, check_reach, check_windows, lengthen_rotary
from crop.methods.plc import PreLLMCompression
from tests.integrations.vllm.test_plans import plan_of
from tests.support.batches import make_sample
from tests.support.families.entry import IMAGE
from tests.support.oracle import Oracle
from tests.support.tiny_families import FAMILIES, build_model

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("one_thread")]


def pruned(full: int, places: list[int]) -> PlaceholderPlan:
    """A plan of which only the places matter."""
    plan = PlaceholderPlan.whole(torch.ones(full, dtype=torch.bool))
    return PlaceholderPlan(plan.pool, plan.patches, "mean", full, torch.tensor(places))


def test_a_prompt_grows_back_to_what_it_was():
    """Two images of six tokens; of the first the second and fifth stay, the other is whole; a video between them."""
    tokens = [1, 90, 90, 2, 93, 93, 93, 3, *[90] * 6, 4, 5]
    places = [(1, 2, pruned(6, [1, 4])), (4, 3, None), (8, 6, pruned(6, list(range(6))))]
    prompt = UnprunedPrompt.of(tokens, places)
    assert prompt.tokens == [1, *[90] * 6, 2, 93, 93, 93, 3, *[90] * 6, 4, 5]
    assert (prompt.starts, prompt.lengths, prompt.images) == ([1, 8, 12], [6, 3, 6], [0])
    assert torch.nonzero(~prompt.stays).flatten().tolist() == [1, 3, 4, 6]
    ids = torch.arange(len(prompt.tokens)).expand(3, -1)
    kept, delta = prompt.pruned_ids(ids, 0, "original")
    assert kept[0].tolist() == [0, 2, 5, *range(7, 20)] and delta == 4
    assert len(tokens) + delta == 20  # the first generated token's
    closed, delta = prompt.pruned_ids(ids, 0, "compact")
    assert closed[1].tolist() == list(range(len(tokens))) and delta == 0


def test_a_prompt_without_pruned_images_is_itself():
    prompt = UnprunedPrompt.of([1, 90, 90, 2], [(1, 2, pruned(2, [0, 1]))])
    assert prompt.tokens == [1, 90, 90, 2] and not prompt.images and bool(prompt.stays.all())
    assert UnprunedPrompt.of([1, 2], []).stays.tolist() == [True, True]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "glm4v"])
def test_three_axes_are_those_of_the_model(family):
    """The model's own ids in the whole prompt, by transformers; what follows continues as there."""
    region, method = Region.box(0.1, 0.1, 0.5, 0.6), PreLLMCompression(keep=0.3)
    sample = make_sample(family, [4, (64, 48), 6])
    oracle = Oracle(build_model(family, "eager"), FAMILIES[family])
    image = make_sample(family, [(64, 48), 6])
    plan = plan_of(family, image, method, region)
    # vLLM's placeholder is the image tokens alone: the markers around them are text.
    inner = PlaceholderPlan(plan.pool, plan.patches, plan.mode, plan.full - 2, plan.places[1:-1] - 1)
    ids = oracle.positions(sample)
    tokens, start = list(sample.ids), sample.ids.index(IMAGE)
    short = tokens[:start] + [IMAGE] * len(inner.places) + tokens[start + inner.full :]
    prompt = UnprunedPrompt.of(short, [(start, len(inner.places), inner)])
    assert prompt.tokens == tokens
    kept, delta = prompt.pruned_ids(ids, int(ids.max()) + 1 - len(tokens), "original")
    assert torch.equal(kept, ids[:, prompt.stays]) and len(short) + delta == int(ids.max()) + 1
    closed, delta = prompt.pruned_ids(ids, int(ids.max()) + 1 - len(tokens), "compact")
    inside = closed[:, start : start + len(inner.places)]
    for axis in (1, 2):  # no row and no column is free
        assert sorted(set(inside[axis].tolist())) == list(range(start, start + len(set(inside[axis].tolist()))))
    after = closed[:, start + len(inner.places) :]
    assert torch.equal(after[0], after[1]) and int(after[0, 0]) == int(inside.max()) + 1
    assert len(short) + delta == int(closed.max()) + 1


def config(limit: int = 1024, **rope) -> SimpleNamespace:
    return SimpleNamespace(max_position_embeddings=limit, rope_parameters=rope or None)


def test_the_rotary_table_has_room_for_what_was_pruned():
    for rope in ({}, {"rope_type": "default"}, {"rope_type": "llama3", "original_max_position_embeddings": 512}):
        text = config(1024, **rope)
        lengthen_rotary(text, 1024)
        assert text.max_position_embeddings == 2048
        check_reach(text, 1024, 1024)
        with pytest.raises(
            ValueError, match="pruned from a prompt must be at most 1024, .*=1024 leaves .* 2048 positions, got 1025"
        ):
            check_reach(text, 1024, 1025)
    text = config(8192)
    lengthen_rotary(text, 1024)
    assert text.max_position_embeddings == 8192  # long enough as it is


@pytest.mark.parametrize(
    "rope,limit",
    [
        ({"rope_type": "yarn", "original_max_position_embeddings": 256, "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "original_max_position_embeddings": 128, "factor": 4.0}, 512),
        ({"rope_type": "dynamic", "factor": 2.0}, 1024),
    ],
)
def test_tables_that_depend_on_their_length_stay_and_longer_prompts_are_refused(rope, limit):
    text = config(1024, **rope)
    lengthen_rotary(text, 400)
    assert text.max_position_embeddings == 1024
    check_reach(text, 400, limit - 400)
    with pytest.raises(ValueError, match="smaller --max-model-len, or with positions='compact'"):
        check_reach(text, 400, limit - 399)


def test_every_kind_of_layer_counts():
    text = config(1024, sliding={"rope_type": "default"}, full={"rope_type": "yarn", "factor": 2.0})
    lengthen_rotary(text, 1024)
    assert text.max_position_embeddings == 1024


def test_sliding_windows_count_what_is_left():
    check_windows([None, None], 400, 10_000)
    check_windows([None, 512, 1024], 400, 112)
    error = "at most 112, what max_model_len=400 leaves of the model's sliding window of 512 tokens, got 113; .*-len$"
    with pytest.raises(ValueError, match=error):
        check_windows([None, 512, 1024], 400, 113)
