"""What a family cannot do is refused with the reason and the alternative; README names the families that are tested."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from crop.geometry.region import Region
from crop.methods import InnerLLMPruning, PreLLMCompression
from crop.models import families, family_of
from crop.models.refused import REFUSED
from crop.models.tiles import tiled_check
from crop.patching.hf import refuse_transformers
from crop.patching.patch import patch
from tests.support import batches, readme_table
from tests.support.batches import concatenated, make_batch, make_sample, standard_batch
from tests.support.cases import METHODS, get_model, patched
from tests.support.families.entry import IMAGE, MARK, TEXT, VIDEO, VISION_START
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import FAMILIES, LACKING, build_model, get_config

pytestmark = pytest.mark.usefixtures("one_thread")

BOX = Region.box(0.1, 0.1, 0.5, 0.6)
ILP = InnerLLMPruning(keep=0.3, layer=2)


@pytest.mark.parametrize("name", LACKING)
def test_families_that_this_transformers_lacks(name):
    pytest.skip(f"transformers {transformers.__version__} has no {LACKING[name]}")


@pytest.mark.fast
@pytest.mark.skipif(bool(LACKING), reason="this transformers lacks some of the families")
@pytest.mark.parametrize("page", readme_table.TABLES)
def test_readme_lists_what_the_contract_runs_over(page):
    assert readme_table.now(page)[1] == readme_table.TABLES[page](), (
        f"{page} is behind: run `python -m tests.support.readme_table`"
    )


@pytest.mark.fast
@pytest.mark.skipif(bool(LACKING), reason="this transformers lacks some of the families")
def test_every_family_is_in_the_contract():
    assert {get_config(name).model_type for name in FAMILIES} == set(families())


@pytest.mark.fast
def test_every_model_type_that_reads_images_is_supported_or_refused_with_a_reason():
    """Of all that transformers knows as such; what is refused is so by name, not as a stranger."""
    known = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert not known - set(families()) - set(REFUSED) and not set(families()) & set(REFUSED)
    for model_type, reason in REFUSED.items():
        model = torch.nn.Linear(1, 1)
        model.config = SimpleNamespace(model_type=model_type)
        with pytest.raises(ValueError, match=re.escape(f"got {model_type!r}: {reason}")):
            family_of(model)


@pytest.mark.fast
def test_the_harness_says_what_is_missing(monkeypatch):
    sample = make_sample("pixtral", [3, (24, 16), (16, 20), 6], seed=123)
    with pytest.raises(ValueError, match=r"pixel_values must have equal shapes .*\(1, 3, 16, 24\).* set `join`"):
        concatenated([list(sample.images)])
    monkeypatch.setattr(batches, "families", dict)
    with pytest.raises(ValueError, match="pixtral: model_type must be registered .*registry.py, got 'llava'"):
        sample.layouts()


def refused(
    model: Any,
    message: str,
    inputs: dict | None = None,
    method: Any = ILP,
    region: Any = None,
    behind: str = "tower",
    **more: Any,
):
    """At the door without inputs, else by the first forward, before ``behind`` runs; nothing is left behind.

    What the plan has to say comes before the decoder: a plan is made while the vision tower runs.
    """
    before, entered = snapshot(model), []
    if inputs is None:
        with pytest.raises(ValueError, match=message):
            patch(model, method, region, **more).__enter__()
    else:
        family = families()[model.config.model_type]
        part = family.vision_tower(model.model) if behind == "tower" else family.language_model(model).layers[0]
        handle = part.register_forward_pre_hook(lambda *_: entered.append(1))
        with patch(model, method, region, **more), pytest.raises(ValueError, match=message):
            model(**inputs)
        handle.remove()
    assert not entered
    assert_unchanged(before, model)


@pytest.mark.parametrize("version", ["4.57.6", "5.16.1"])
def test_old_transformers(version, monkeypatch):
    model = build_model("llava_next")
    before = snapshot(model)
    monkeypatch.setattr("transformers.__version__", version)
    refuse_transformers.cache_clear()
    with pytest.raises(RuntimeError, match=rf"transformers must be >= 5.17, got {version}; pip install"):
        patch(model, ILP).__enter__()
    monkeypatch.undo()
    assert_unchanged(before, model)
    for newer in ("5.17.0", "5.17.0.dev0", "6.0"):
        monkeypatch.setattr("transformers.__version__", newer)
        refuse_transformers.cache_clear()
        with patch(model, ILP):
            pass


TILED = [name for name, family in FAMILIES.items() if families()[get_config(name).model_type].check is tiled_check]


@pytest.mark.fast
@pytest.mark.parametrize("name", TILED)
def test_a_region_among_tiles_needs_processor_and_size(name):
    """Of this picture: options that the processor was called with show where the tiles are others."""
    model, make, batch = build_model(name), FAMILIES[name].processor, standard_batch(name, "left", 1)
    refused(model, f"processor must be given for '{model.config.model_type}' with a region", region=[BOX, None])
    refused(model, "image_size must be given", region=[BOX, BOX], processor=make())
    few = [(48, 24)] * 3
    refused(model, "image_size must be given once per image, got 3 for 2 images", batch.inputs,
            processor=make(), image_size=few)  # fmt: skip
    message = r"an image of 30 x 30 pixels must have . tiles .*, got 3 in the prompt; .* set on the processor itself"
    if name not in ("perception_lm", "lfm2_vl"):  # the tiny one's arrangements are of two tiles each
        refused(model, message, batch.inputs, processor=make(), image_size=[(30, 30)] * 2)


@pytest.mark.parametrize("name", TILED)
def test_tiles_of_an_unknown_arrangement(name):
    """Without a region scores decide as they do where it is known, and pooling meets its budget."""
    model, batch = get_model(name), standard_batch(name, "left", 2)
    with patched(model, ILP, batch, None) as known:
        wanted = model(**batch.inputs).logits
    with patch(model, ILP) as stats:
        assert torch.equal(model(**batch.inputs).logits, wanted)
    assert [kept.tolist() for kept in stats.kept] == [kept.tolist() for kept in known.kept]
    for one, other in zip(stats.layouts, known.layouts, strict=True):
        assert torch.equal(one.position, other.position)
    with patch(model, PreLLMCompression(keep=0.25)) as stats:
        assert torch.isfinite(model(**batch.inputs).logits).all()
    assert stats.tokens_after_plc == [round(before / 4) for before in stats.tokens_before]


@pytest.mark.parametrize("name", ["internvl", "idefics3"])
def test_no_region_is_the_whole_image_among_others(name):
    model, batch = get_model(name), standard_batch(name, "single", 2)
    found = []
    for second in (None, Region.whole()):
        with patched(model, METHODS["compose"], batch, [BOX, second]):
            found.append(model(**batch.inputs).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_the_prompt_says_how_tiles_are_arranged(name):
    """Nothing else is asked: what the processor was called with shows there, such as that an image was left whole."""
    model, tile = get_model(name), [VISION_START, MARK, *[IMAGE] * 16, VISION_START]
    ids = torch.tensor([[5, *tile, *tile, 7, 8]])
    with patch(model, METHODS["compose"], [BOX, None]) as stats:
        model(input_ids=ids, pixel_values=torch.randn(1, 2, 3, 32, 32))
    assert [layout.extent for layout in stats.layouts] == [(1, 4, 4)] * 2
    broken = dict(standard_batch(name, "single", 1).inputs)
    broken["input_ids"] = broken["input_ids"].masked_fill(broken["input_ids"] == MARK, 83)
    refused(build_model(name), "must hold whole images of the grids", broken)


def test_one_tile_is_the_whole_image():
    model = build_model("internvl")
    sample = make_sample("internvl", [3, (30, 30), 6], seed=1)
    with patch(model, InnerLLMPruning(keep=0.5, layer=2)) as stats:
        model(**make_batch([sample], "none").inputs)
    assert stats.tokens_before == [16] and stats.tokens_after_ilp == [8]


@pytest.mark.fast
def test_masks_beyond_causal():
    gemma, pali = build_model("gemma3"), build_model("paligemma")
    for model in (gemma, pali):
        refused(model, "needs positions='original' .*got positions='compact'", positions="compact")
        refused(model, "needs positions='original' and cache='ragged', got cache='uniform'", cache="uniform")
    inputs = standard_batch("gemma3", "left", 1).inputs
    short = r"layer must follow a layer that sees all 63 tokens, i.e. be one of \[2\], got 3: layer 2 .* window of 20"
    refused(gemma, short, inputs, InnerLLMPruning(keep=0.3, layer=3), behind="decoder")
    refused(gemma, "do_pan_and_scan .* must be off", processor=Gemma3ImageProcessorPil(do_pan_and_scan=True))
    once = make_batch(
        standard_batch("gemma3", "left", 2).samples[:1], "none"
    ).inputs  # as a call with it makes of one picture
    refused(gemma, "once per image, got 1 for 2 images; crops .*do_pan_and_scan", once, region=BOX)
    config = copy.deepcopy(pali.config)
    config.text_config = transformers.Gemma2Config(**TEXT, head_dim=8)
    refused(
        transformers.PaliGemmaForConditionalGeneration(config).eval(), "attn_logit_softcapping must be None, got 50"
    )


def test_sight_is_judged_by_the_prompt():
    """A sliding layer may score a prompt that its window covers; without scores it matters in no case."""
    model = build_model("gemma3")
    inputs = standard_batch("gemma3", "left", 1).inputs
    with patch(model, InnerLLMPruning(mode="strict", layer=3), [BOX, BOX]) as stats:
        model(**inputs)
    assert sum(stats.tokens_after_ilp) < sum(stats.tokens_before)
    wide = FAMILIES["gemma3"].config()
    wide.text_config.sliding_window = 63
    model = transformers.Gemma3ForConditionalGeneration(wide).eval()
    with patch(model, InnerLLMPruning(keep=0.3, layer=3), [BOX, BOX]) as stats:
        model(**inputs)
    assert stats.tokens_after_ilp == [11, 11]


def test_text_models_that_attend_otherwise():
    """Attention sinks take a share that scores would not know of; chunks end where no mask of ours is cut."""
    config = FAMILIES["internvl"].config()
    config.text_config = transformers.GptOssConfig(**TEXT, head_dim=8, num_local_experts=2)
    refused(transformers.InternVLForConditionalGeneration(config).eval(), "must be without sinks, got .* GptOssModel")
    config.text_config = transformers.LlamaConfig(**TEXT)
    config.text_config.layer_types = ["chunked_attention"] * 4
    model = transformers.InternVLForConditionalGeneration(config).eval()
    refused(model, r"must be of full attention or of a sliding window, got \['chunked_attention'\]")


def test_a_video_elsewhere():
    inputs = dict(standard_batch("paddleocr_vl", "left", 1).inputs, pixel_values_videos=torch.zeros(1))
    refused(build_model("paddleocr_vl"), "must hold images only, got video; give the frames as images", inputs)


def test_a_video_is_one_entry_with_a_view_per_frame():
    (sample,) = standard_batch("qwen3_vl_video", "left", 1).samples[:1]
    (layout,) = sample.layouts()
    assert layout.extent == (2, 2, 3) and len(layout) == 12
    ids = torch.tensor(sample.ids)
    assert (ids[layout.position] == VIDEO).all()
    assert layout.position.diff().max() > 1  # a time and markers stand between the frames
    one, other = (layout.center[layout.view == frame] for frame in range(2))
    assert torch.equal(one, other)
