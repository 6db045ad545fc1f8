"""Wrong use of `crop.patch`: a clear error of the right type, and a model on which nothing has changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, StaticCache

from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, Method, PreLLMCompression, Selection
from crop.patching.patch import patch
from tests.support.batches import make_batch, make_sample, standard_batch
from tests.support.cases import METHODS, REGIONS, as_argument, families, get_model, greedy, patched, regions_of
from tests.support.families.entry import IMAGE, NUM_LAYERS, TEXT
from tests.support.processors import image_processor
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import THOROUGH, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

ILP = InnerLLMPruning(keep=0.25)
BOX = REGIONS[0][0]
NAN = float("nan")


class Custom(Method):
    """A method of a user, right or wrong."""

    def __init__(
        self, *, plan: Any = None, selection: Any = None, layer: Any = 2, rows: Any = "text", pool_mode: Any = "mean"
    ) -> None:
        self.fixed_plan, self.selection = plan, selection
        self.layer, self.rows, self.pool_mode = layer, rows, pool_mode

    def plan(self, layout: Any, region: Any) -> Any:
        return self.fixed_plan

    def select(self, layout: Any, region: Any) -> Any:
        return self.selection


def keep(count: int, size: int = 64, **more: Any) -> Selection:
    return Selection(count, torch.zeros(size, dtype=torch.int8), **more)


def refused(model: Any, inputs: dict, error: type, message: str, method: Any, region: Any = None, **more: Any) -> None:
    """The error comes at entry or in the forward; the model is then what it was, and still works."""
    plain, before = model(**standard_batch(model.config.model_type, "single", 1).inputs).logits, snapshot(model)
    with pytest.raises(error, match=message):
        with patch(model, method, region, **more):
            model(**inputs)
    assert_unchanged(before, model)
    assert torch.equal(model(**standard_batch(model.config.model_type, "single", 1).inputs).logits, plain)


# ------------------------------------------------------------------------------------------------ at entry
ENTRY = {
    "method a name": (TypeError, "method must be .*got str", dict(method="ilp")),
    "method a class": (TypeError, "method must be .*got type", dict(method=InnerLLMPruning)),
    "method a number": (TypeError, "method must be .*got float", dict(method=0.5)),
    "layer too deep": (ValueError, r"layer must be in \[1, .*4.*got 4", dict(method=InnerLLMPruning(layer=NUM_LAYERS))),
    "layer too deep, composed": (
        ValueError, r"layer must be in \[1, .*got 99", dict(method=Compose(PreLLMCompression(), InnerLLMPruning(layer=99))),
    ),
    "layer 0": (ValueError, r"layer must be in \[1, .*got 0", dict(method=Custom(selection=keep(3), layer=0))),
    "layer negative": (ValueError, r"layer must be in \[1, .*got -1", dict(method=Custom(selection=keep(3), layer=-1))),
    "layer no integer": (TypeError, r"layer .*must be .*got 1\.5", dict(method=Custom(selection=keep(3), layer=1.5))),
    "rows unknown": (ValueError, "rows .*must be .*got 'all'", dict(method=Custom(selection=keep(3), rows="all"))),
    "pool_mode unknown": (ValueError, "pool_mode .*must be .*got 'sum'", dict(method=Custom(pool_mode="sum"))),
    "region a box": (TypeError, "region must .*got float", dict(region=(0.1, 0.1, 0.5, 0.5))),
    "region boxes": (TypeError, "region must .*got tuple", dict(region=[(0.1, 0.1, 0.5, 0.5)])),
    "region a string": (TypeError, "region must .*got str", dict(region="left")),
    "region a number": (TypeError, "region must .*got int", dict(region=3)),
    "image_size a number": (TypeError, "image_size must be .*got 10", dict(image_size=10)),
    "image_size a string": (ValueError, "image_size must be .*got", dict(image_size="ab")),
    "image_size zero": (ValueError, r"image_size must be .*got \(0, 10\)", dict(image_size=(0, 10))),
    "image_size negative": (ValueError, r"image_size must be .*got \(-5, 10\)", dict(image_size=(-5, 10))),
    "image_size short": (ValueError, r"image_size must be .*got \(10,\)", dict(image_size=(10,))),
    "image_size long": (ValueError, r"image_size must be .*got \(10, 10, 3\)", dict(image_size=(10, 10, 3))),
    "image_size a fraction": (ValueError, r"image_size must be .*got .*10\.5", dict(image_size=(10.5, 20))),
    "image_size NaN": (ValueError, "image_size must be .*got .*nan", dict(image_size=(NAN, 3))),
    "processor a name": (TypeError, "processor must be .*got str", dict(processor="clip", region=BOX)),
    "processor an object": (TypeError, "processor must be .*got object", dict(processor=object(), region=BOX)),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ENTRY))
def test_refused_at_entry(case):
    """Before anything is changed: the block is not entered."""
    error, message, arguments = ENTRY[case]
    model, entered = get_model("llava", "sdpa"), False
    before = snapshot(model)
    with pytest.raises(error, match=f"patch: {message}"):
        with patch(model, **{"method": ILP, **arguments}):
            entered = True
    assert not entered
    assert_unchanged(before, model)


def test_other_families():
    """A text model, a family that is not known, no model at all: what is supported is named."""
    llama = LlamaForCausalLM(LlamaConfig(**TEXT))
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50))
    for model, name in ((llama, "llama"), (gpt, "gpt2"), (get_model("llava", "sdpa").model.language_model, "llama")):
        before = set(vars(model))
        with pytest.raises(ValueError, match=rf"patch: model must .*{name}.*llava, .*qwen2_5_vl"):
            patch(model, ILP).__enter__()
        assert set(vars(model)) == before
    unknown = build_model("llava")
    unknown.config.model_type = "unheard-of"
    with pytest.raises(
        ValueError,
        match=r"patch: model_type must be one of .*llava.*qwen2_5_vl.*got 'unheard-of'.*one ModelFamily .crop/models/README.md",
    ):
        patch(unknown, ILP).__enter__()
    for thing in (None, "llava", torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=rf"patch: model must be .*got {type(thing).__name__}"):
            patch(thing, ILP).__enter__()


@families(THOROUGH)
def test_nested(family):
    """The same model twice, also through its base model; the outer patch goes on undisturbed."""
    model = get_model(family, "sdpa")
    batch, before = standard_batch(family, "single", 1), snapshot(model)
    processor = image_processor("resize")
    with patch(model, ILP, BOX, processor=processor):
        wanted = model(**batch.inputs).logits
        inside = snapshot(model)
        for other in (model, model.model):
            with pytest.raises(RuntimeError, match="patch: model must not be patched already"):
                patch(other, ILP).__enter__()
        assert_unchanged(inside, model)
        assert torch.equal(model(**batch.inputs).logits, wanted)
    assert_unchanged(before, model)


VALUES = {
    "box NaN": (ValueError, r"Region: box must be finite, got .*nan", lambda: Region.box(NAN, 0, 1, 1)),
    "box infinite": (ValueError, r"Region: box must be finite, got .*inf", lambda: Region.box(0, 0, float("inf"), 1)),
    "box inverted": (ValueError, r"Region: box must .*got \(0\.5, 0\.5, 0\.1, 0\.9\)",
                     lambda: Region.box(0.5, 0.5, 0.1, 0.9)),
    "box empty": (ValueError, r"Region: box must .*got", lambda: Region.box(0.5, 0.5, 0.5, 0.9)),
    "box outside": (ValueError, r"Region: box must .*got \(2\.0", lambda: Region.box(2, 2, 3, 3)),
    "keep 0": (ValueError, "keep .*got 0", lambda: InnerLLMPruning(keep=0)),
    "keep 0.0": (ValueError, r"keep .*got 0\.0", lambda: InnerLLMPruning(keep=0.0)),
    "keep negative": (ValueError, "keep .*got -1", lambda: PreLLMCompression(keep=-1)),
    "keep above 1": (ValueError, r"keep .*got 1\.5", lambda: InnerLLMPruning(keep=1.5)),
    "keep NaN": (ValueError, "keep .*got nan", lambda: PreLLMCompression(keep=NAN)),
    "keep a bool": (TypeError, "keep .*got True", lambda: InnerLLMPruning(keep=True)),
    "keep a string": (TypeError, "keep .*got '0.5'", lambda: InnerLLMPruning(keep="0.5")),
    "keep a tensor": (TypeError, "keep .*got tensor", lambda: InnerLLMPruning(keep=torch.tensor(0.5))),
    "layer 0": (ValueError, "layer must be >= 1, got 0", lambda: InnerLLMPruning(layer=0)),
    "mode": (ValueError, "mode must be .*got 'hard'", lambda: InnerLLMPruning(mode="hard")),
    "rows": (ValueError, "rows must be .*got 'all'", lambda: InnerLLMPruning(rows="all")),
    "strides": (ValueError, "got", lambda: PreLLMCompression(4, 2, 1)),
    "compose": (TypeError, "two of them at least, got ilp=", lambda: Compose(None, ILP)),
}  # fmt: skip


@pytest.mark.parametrize("case", list(VALUES))
def test_values(case):
    error, message, build = VALUES[case]
    with pytest.raises(error, match=message):
        build()


# ---------------------------------------------------------------------------------------------- in the forward
def plan_of(size: int) -> PoolPlan:
    side = torch.arange(size, dtype=torch.int32)
    return PoolPlan.from_labels(side // 2, torch.zeros_like(side), side, torch.zeros(size, dtype=torch.uint8))


FORWARD = {
    "no region": (ValueError, "region must be given once per image, got 0 for 1", dict(region=[])),
    "two regions": (ValueError, "region must be given once per image, got 2 for 1", dict(region=[BOX, BOX], processor=image_processor("resize"))),
    "two sizes": (
        ValueError, "image_size must be given once per image, got 2 for 1",
        dict(region=BOX, image_size=[(3, 4), (4, 5)], processor=image_processor("crop")),
    ),
    "no processor": (ValueError, "processor must be given .*llava.*got None", dict(region=BOX)),
    "crop without size": (
        ValueError, "image_size must be given .*crop.*got None", dict(region=BOX, processor=image_processor("crop")),
    ),
    "pad without size": (
        ValueError, "image_size must be given .*pad.*got None", dict(region=BOX, processor=image_processor("pad")),
    ),
    "keep > N": (ValueError, "keep .*<= .*64.*got 65", dict(method=InnerLLMPruning(keep=65))),
    "pooled keep > N": (ValueError, "keep .*<= .*64.*got 65", dict(method=PreLLMCompression(keep=65))),
    "plan no plan": (TypeError, "plan.* must .*got int", dict(method=Custom(plan=7))),
    "plan of another image": (ValueError, "plan.* must .*64.*got 10", dict(method=Custom(plan=plan_of(10)))),
    "selection no selection": (TypeError, "select.* must .*got int", dict(method=Custom(selection=3))),
    "priority of another image": (ValueError, "priority .*must .*64.*got .*10", dict(method=Custom(selection=keep(3, 10)))),
    "weight of another image": (
        ValueError, "weight .*must .*64.*got .*10", dict(method=Custom(selection=keep(3, weight=torch.ones(10)))),
    ),
    "keeps more than it allows": (
        ValueError, r"num_keep .*must be in \[0, 3\].*got 5",
        dict(method=Custom(selection=Selection(5, torch.tensor([-1] * 60 + [0, 1, -1, 0], dtype=torch.int8)))),
    ),
    "keeps more than there are": (ValueError, "num_keep.* must .*64.*got 100", dict(method=Custom(selection=keep(100)))),
}  # fmt: skip


@pytest.mark.parametrize("case", list(FORWARD))
def test_refused_in_the_forward(case):
    error, message, arguments = FORWARD[case]
    inputs = standard_batch("llava", "single", 1).inputs
    refused(get_model("llava", "sdpa"), inputs, error, message, **{"method": ILP, **arguments})


@pytest.mark.parametrize("region", [BOX, [BOX]])
@families(THOROUGH)
def test_one_region_for_two_images(family, region):
    message = "region must be given once per image, got 1 for 2 images"
    for padding, images in (("left", 1), ("single", 2)):
        inputs = standard_batch(family, padding, images).inputs
        refused(get_model(family, "sdpa"), inputs, ValueError, message, ILP, region,
                processor=image_processor("resize"))  # fmt: skip


def test_one_region_for_two_images_with_one_question():
    """Equal prompts about different images are not copies of one sample."""
    samples = [make_sample("llava", [4, (32, 32), 6], seed=3) for _ in range(2)]
    inputs = make_batch(samples, "none").inputs
    pixels = samples[0].images[0].arguments["pixel_values"]
    inputs["pixel_values"] = torch.cat([pixels, pixels.flip(-1)])
    message = "region must be given once per image, got 1 for 2 images"
    refused(get_model("llava", "sdpa"), inputs, ValueError, message, ILP, BOX, processor=image_processor("resize"))


class Offloading(DynamicCache):
    """As DynamicCache(offloading=True), which needs an accelerator."""

    offloading = property(lambda self: True, lambda self, value: None)


INPUTS = {
    "embeddings": ("llava", "input_ids must be given", lambda m, x: {
        **x, "input_ids": None, "inputs_embeds": m.get_input_embeddings()(x["input_ids"])}),
    "mask in 4 dimensions": ("llava", "attention_mask must be", lambda m, x: {
        **x, "attention_mask": torch.zeros(1, 1, 78, 78)}),
    "mask too short": ("llava", "attention_mask must be", lambda m, x: {
        **x, "attention_mask": x["attention_mask"][:, :70]}),
    "half an image": ("llava", "image tokens must be .*64.*got 63", lambda m, x: {
        **x, "input_ids": torch.cat([x["input_ids"][:, :5], x["input_ids"][:, 6:]], 1), "attention_mask": None}),
    "grid of another image": ("qwen2_5_vl", r"whole images of the grids \[\(4, 6\)\], got 48", lambda m, x: {
        **x, "image_grid_thw": torch.tensor([[1, 8, 12]])}),
    "no grid": ("qwen2_5_vl", "image_grid_thw must be given", lambda m, x: {**x, "image_grid_thw": None}),
    "two frames": ("qwen2_5_vl", "image_grid_thw must have one frame", lambda m, x: {
        **x, "image_grid_thw": torch.tensor([[2, 6, 16]])}),
    "a video": ("llava", "must hold images only, got video", lambda m, x: {
        "input_ids": torch.tensor([[1, 91, 93, 93, 93, 93, 92, 4]]), "pixel_values_videos": torch.zeros(16, 96),
        "video_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": torch.tensor([[0, 0, 2, 2, 2, 2, 0, 0]])}),
    "static cache": ("llava", "past_key_values must be .*got StaticCache", lambda m, x: x | as_argument(
        m, StaticCache(config=m.config.get_text_config(), max_cache_len=128))),
    "offloading cache": ("llava", "past_key_values must stay on its device, got a Offloading", lambda m, x: x | as_argument(
        m, Offloading())),
}  # fmt: skip


@pytest.mark.parametrize("case", list(INPUTS))
def test_inputs_that_cannot_be_pruned(case):
    family, message, change = INPUTS[case]
    model = get_model(family, "sdpa")
    inputs = {k: v for k, v in change(model, standard_batch(family, "single", 1).inputs).items() if v is not None}
    refused(model, inputs, ValueError, f"patch: .*{message}", ILP)


GENERATION = {
    "static cache": ("cache_implementation must be .*got 'static'", dict(cache_implementation="static")),
    "chunked prefill": ("must prefill in one piece, got prefill_chunk_size=10", dict(prefill_chunk_size=10)),
    "prompt lookup": ("assisted generation, got prompt_lookup_num_tokens=2", dict(prompt_lookup_num_tokens=2)),
    "assistant": ("assisted generation, got assistant_model", dict(assistant_model="another")),
}


@pytest.mark.parametrize("case", list(GENERATION))
@families(THOROUGH)
def test_generation_that_is_not_supported(family, case):
    """Refused before the prompt is encoded, whether named in the call or in a configuration."""
    message, arguments = GENERATION[case]
    arguments = {k: build_model(family) if v == "another" else v for k, v in arguments.items()}
    model, batch = get_model(family, "sdpa"), standard_batch(family, "single", 1)
    before = snapshot(model)
    with patch(model, ILP):
        with pytest.raises(ValueError, match=f"patch: .*{message}"):
            greedy(model, batch, **arguments)
        if case != "assistant":
            config = copy.deepcopy(model.generation_config)
            config.update(**arguments)
            with pytest.raises(ValueError, match=f"patch: .*{message}"):
                greedy(model, batch, generation_config=config)
            with pytest.raises(ValueError, match=f"patch: .*{message}"):
                model.generate(batch.inputs["input_ids"], config, pixel_values=batch.inputs["pixel_values"])
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["output_attentions", "output_router_logits"])
def test_outputs_of_the_length_of_what_is_left(name):
    """Asked for by the configuration, as training of mixtures of experts does."""
    model, batch = build_model("qwen3_vl_moe", "eager"), standard_batch("qwen3_vl_moe", "single", 1)
    setattr(model.config.text_config, name, True)
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["input_ids"] >= IMAGE, -100)
    plain = model(**batch.inputs, labels=labels).loss
    with patch(model, ILP), pytest.raises(ValueError, match=f"patch: {name} must be off, got True"):
        model(**batch.inputs, labels=labels)
    with patch(model, None):
        assert torch.equal(model(**batch.inputs, labels=labels).loss, plain)


def test_flex_attention():
    model = build_model("llava", "flex_attention")
    before = snapshot(model)
    with pytest.raises(ValueError, match="patch: the attention implementation must be .*got 'flex_attention'"):
        patch(model, ILP).__enter__()
    assert_unchanged(before, model)


# -------------------------------------------------------------------------------------------- odd but valid
@pytest.mark.parametrize("region", [None, BOX])
@pytest.mark.parametrize("name", list(METHODS))
@families(THOROUGH)
def test_text_only(family, name, region):
    """A prompt without an image runs as ever."""
    model = get_model(family, "sdpa")
    batch = make_batch([make_sample(family, [n], seed=n) for n in (7, 11)], "left")
    plain, generated = model(**batch.inputs).logits, greedy(model, batch, max_new_tokens=3)
    with patch(model, METHODS[name], region, processor=image_processor("resize")) as stats:
        assert torch.equal(model(**batch.inputs).logits, plain)
        out = greedy(model, batch, max_new_tokens=3)
    assert torch.equal(out.sequences, generated.sequences)
    assert stats.kept == [] and list(stats.tokens_before) == []


def test_image_first_text_later():
    """A text-only call inside the block does not disturb the next call with an image."""
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "single", 1)
    text = make_batch([make_sample("llava", [9])], "none")
    processor = image_processor("resize")
    with patch(model, ILP, BOX, processor=processor):
        wanted = model(**batch.inputs).logits
    with patch(model, ILP, BOX, processor=processor) as stats:
        model(**text.inputs)
        assert torch.equal(model(**batch.inputs).logits, wanted)
        model(**text.inputs)
        assert torch.equal(model(**batch.inputs).logits, wanted)
    assert [len(kept) for kept in stats.kept] == [16]


def test_whole_regions_need_no_processor():
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "left", 1)
    results = []
    for region in (None, Region.whole(), [Region.whole()] * 2):
        with patch(model, ILP, region):
            results.append(model(**batch.inputs).logits)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_everything_may_leave():
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "left", 1)
    with patch(model, Custom(selection=keep(0))) as stats:
        out = greedy(model, batch, max_new_tokens=2)
    assert [k.tolist() for k in stats.kept] == [[], []]
    assert torch.isfinite(torch.stack(out.logits)).all()


def test_integers_and_boolean_masks():
    """Ids in int32, masks in bool or float: what the model takes, the patch takes."""
    model, batch = get_model("llava", "sdpa"), standard_batch("llava", "left", 1)
    with patch(model, ILP, regions_of(batch), processor=image_processor("resize")):
        wanted = model(**batch.inputs).logits
        for mask in (torch.bool, torch.float32, torch.int32):
            inputs = {**batch.inputs, "attention_mask": batch.inputs["attention_mask"].to(mask)}
            assert torch.equal(model(**inputs).logits, wanted), mask
        inputs = {**batch.inputs, "input_ids": batch.inputs["input_ids"].int()}
        assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@families(THOROUGH)
def test_half_precision(family, dtype):
    """Runs, keeps the dtype, and keeps what float32 keeps up to a few near ties."""
    model, batch = build_model(family), standard_batch(family, "left", 1)
    with patched(model, METHODS["budget"], batch, regions_of(batch)) as stats:
        model(**batch.inputs)
    wanted = [set(kept.tolist()) for kept in stats.kept]
    model = model.to(dtype)
    inputs = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"].to(dtype)}
    with patched(model, METHODS["budget"], batch, regions_of(batch)) as stats:
        logits = model(**inputs).logits
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    for kept, before in zip(stats.kept, wanted, strict=True):
        assert len(kept) == len(before) and len(before & set(kept.tolist())) >= 0.75 * len(before)
