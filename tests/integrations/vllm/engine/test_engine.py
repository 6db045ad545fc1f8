"""Engines inside this process: the embedded model, then a tiny family with three position axes; one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from crop import embedded
from crop.geometry.region import Region
from crop.localizers.registry import get_localizer
from tests.integrations.vllm.engine import cases, families, models
from tests.integrations.vllm.test_request import WRONG

FIRST = embedded.scenes.UNSEEN + 100


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """The embedded model, in the plug-in's hands by its entry point; 22 % where a request says nothing else."""
    overrides = {"crop": {"keep": 0.22}}
    llm = cases.start(embedded.WEIGHTS, max_model_len=704, max_num_seqs=16, hf_overrides=overrides)
    yield llm
    del llm
    families.stop()


@pytest.fixture(scope="module")
def asked() -> list[Any]:
    """Requests about rendered pictures and what `crop.patch` answers: tokens and log-probabilities."""
    model, processor = embedded.load()
    found = []
    for seed in range(FIRST, FIRST + 12):
        scene = embedded.scene(seed)
        for question in [question for question in scene.questions if question.boxes][:2]:
            boxes = [list(box) for box in question.boxes]
            case = cases.Case(1, [boxes], 0.11)
            text = embedded.prompt(question.text)
            wanted = cases.answer(model, processor, text, [scene.image], case)
            request = {
                "prompt": text,
                "multi_modal_data": {"image": scene.image},
                "mm_processor_kwargs": case.wishes,
            }
            found.append(SimpleNamespace(request=request, wanted=wanted, boxes=boxes))
    return found


def with_wishes(request: dict[str, Any], **wishes: Any) -> dict[str, Any]:
    return request | {"mm_processor_kwargs": {f"crop_{name}": value for name, value in wishes.items()}}


def encoder(llm: Any) -> tuple[int, int]:
    """Hits and misses of the feature cache."""
    return llm.apply_model(lambda model: (model.crop_features.hits, model.crop_features.misses))[0]


def test_answers_are_those_of_patch_cold_and_cached(engine, asked):
    requests = [one.request for one in asked]
    engine.reset_prefix_cache()
    for cached in (False, True):
        found = cases.ask(engine, requests)
        assert [cases.compare(got, one.wanted) for got, one in zip(found, asked, strict=True)] == [""] * len(asked)
        assert all(got[2] < 120 for got in found)  # of more than 576 tokens
        if cached:
            assert all(got[3] >= 64 for got in found)


def test_budgets_of_the_server_and_of_the_request(engine, asked):
    request = asked[0].request
    lengths = {
        name: cases.ask(engine, [with_wishes(request, **wishes)])[0][2]
        for name, wishes in {
            "nothing": {}, "region": {"region": asked[0].boxes[0]}, "count": {"region": asked[0].boxes[0], "keep": 9},
            "keep": {"keep": 0.5}, "all": {"region": asked[0].boxes[0], "keep": 1.0},
        }.items()
    }  # fmt: skip
    text = lengths["nothing"] - 576
    assert lengths == {
        "nothing": text + 576,
        "region": text + 127,
        "count": text + 9,
        "keep": text + 288,
        "all": text + 576,
    }


def test_another_region_of_a_picture_is_another_answer_without_the_encoder(engine, asked):
    one, other = asked[0], with_wishes(asked[0].request, region=[0.0, 0.0, 0.2, 0.2], keep=0.11)
    cases.ask(engine, [one.request])
    engine.reset_prefix_cache()
    hits, misses = encoder(engine)
    assert not cases.compare(cases.ask(engine, [one.request])[0], one.wanted)
    first = cases.ask(engine, [other])[0]
    assert encoder(engine)[1] == misses and encoder(engine)[0] > hits
    engine.apply_model(lambda model: model.crop_features.clear())
    engine.reset_prefix_cache()
    engine.llm_engine.reset_encoder_cache()
    assert cases.ask(engine, [other])[0][0] == first[0]
    assert encoder(engine)[1] == misses + 1


def test_nothing_is_reused_that_is_not_the_same(engine, asked):
    """Region, budget, mode and picture take turns in warm caches; each answer is the one of a cold engine."""
    base, box = asked[0].request, asked[0].boxes[0]
    picture = asked[-1].request["multi_modal_data"]
    requests = [
        with_wishes(base, region=box, keep=0.11), with_wishes(base, region=box, keep=0.12),
        with_wishes(base, region=box, keep=0.11, mode="mean"), with_wishes(base, region=[0, 0, 0.3, 0.3], keep=0.11),
        with_wishes(base, region=[[box, [0, 0, 0.3, 0.3]]], keep=0.11), with_wishes(base, keep=0.11), with_wishes(base),
        with_wishes(base | {"multi_modal_data": picture}, region=box, keep=0.11),
    ]  # fmt: skip
    cold = []
    for request in requests:
        engine.reset_prefix_cache()
        engine.llm_engine.reset_encoder_cache()
        engine.reset_mm_cache()
        engine.apply_model(lambda model: model.crop_features.clear())
        cold.append(cases.ask(engine, [request])[0])
    for order in (requests, requests[::-1], requests):
        warm = cases.ask(engine, order)
        for got, want in zip(warm, cold if order is requests else cold[::-1], strict=True):
            assert not cases.compare(got[:2], want[:2], 1e-5) and got[2] == want[2]
    assert len({tuple(got[1]) for got in cold}) == len(cold)


@pytest.mark.parametrize("wishes,error", [(wishes, error) for count, wishes, error in WRONG if count == 1])
def test_what_is_malformed_is_refused(engine, asked, wishes, error):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=error):
        cases.ask(engine, [with_wishes(asked[0].request, **wishes)])


def test_budgets_above_the_image_are_refused_and_the_engine_lives(engine, asked):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="must be <= num_original=576, got 577"):
        cases.ask(engine, [with_wishes(asked[0].request, keep=577)])
    assert not cases.compare(cases.ask(engine, [asked[0].request])[0], asked[0].wanted)


def test_text_alone_and_a_batch_of_all_kinds(engine, asked):
    text = {"prompt": "what is the date ?"}
    alone = cases.ask(engine, [text])[0]
    mixed = [
        asked[0].request,
        text,
        with_wishes(asked[1].request),
        asked[2].request,
        with_wishes(asked[3].request, keep=9),
    ]
    engine.reset_prefix_cache()
    found = cases.ask(engine, mixed)
    assert found[1][0] == alone[0]
    assert not cases.compare(found[0], asked[0].wanted) and not cases.compare(found[3], asked[2].wanted)


def test_a_localizer_finds_the_region_in_the_front_process(engine, asked, monkeypatch, caplog):
    from vllm.exceptions import VLLMValidationError

    from crop.integrations.vllm import processor

    seen = []

    def locate(name: str, image: Any, question: str) -> Region:
        seen.append((name, image.mode, image.size, question))
        return Region(tuple(map(tuple, asked[0].boxes)))

    monkeypatch.setattr(processor, "locate", locate)
    monkeypatch.setattr(processor.logger, "propagate", True)
    base = asked[0].request
    for wishes in ({}, {"question": "the date"}):
        found = cases.ask(engine, [with_wishes(base, localizer="ocr", keep=0.11, **wishes)])[0]
        assert not cases.compare(found, asked[0].wanted)
    size, text = base["multi_modal_data"]["image"].size, base["prompt"].removeprefix("<image>").strip()
    assert [one[:3] for one in seen] == [("ocr", "RGB", size)] * 2
    assert seen[0][3].strip() == text and seen[1][3] == "the date"
    assert "localizer ocr took" in caplog.text

    def fails(name: str, image: Any, question: str) -> Region:
        raise ValueError("crop: crop_localizer 'ocr' must be installed where the server runs")

    monkeypatch.setattr(processor, "locate", fails)
    with pytest.raises(VLLMValidationError, match="must be installed where the server runs"):
        cases.ask(engine, [with_wishes(base, localizer="ocr")])


def test_the_ocr_localizer_reads_the_picture(engine, monkeypatch, caplog):
    """The real one; its region is not the whole picture, and the answer is that of `crop.patch` with this region."""
    from crop.integrations.vllm import processor

    page = Image.new("RGB", (512, 512), "white")
    for number, line in enumerate(("Invoice number 4711", "Date 2026-05-01", "Total amount 12.50 EUR")):
        ImageDraw.Draw(page).text((30, 60 + 150 * number), line, "black", ImageFont.load_default(40))
    text = embedded.prompt("what is the date ?")
    region = get_localizer("ocr")(page, "what is the date ?")
    ((x0, y0, x1, y1),) = region.boxes
    assert x0 < 0.1 and 0.35 < y0 < y1 < 0.6 and x1 < 0.8
    case = cases.Case(1, [[[x0, y0, x1, y1]]], 0.11)
    wanted = cases.answer(*embedded.load(), text, [page], case)
    request = {"prompt": text, "multi_modal_data": {"image": page}}
    monkeypatch.setattr(processor.logger, "propagate", True)
    found = cases.ask(engine, [with_wishes(request, localizer="ocr", keep=0.11, question="what is the date ?")])[0]
    assert not cases.compare(found, wanted) and found[2] < 100
    assert re.search(r"localizer ocr took \d+ ms for 1 images", caplog.text)


# ------------------------------------------------------------------------------------------- three axes
@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Iterator[Any]:
    """Tiny, prefilled in chunks that cut images apart; several images per prompt."""
    folder = tmp_path_factory.mktemp("qwen")
    model, processor = models.build("qwen2_5_vl", folder)
    llm = cases.start(folder, max_num_batched_tokens=48)
    yield SimpleNamespace(llm=llm, model=model, processor=processor)
    del llm
    families.stop()


def test_several_images_with_a_region_each(qwen):
    wanted = [
        cases.answer(qwen.model, qwen.processor, *cases.prompt_of("qwen2_5_vl", case), case) for case in cases.CASES
    ]
    requests = [cases.request_of("qwen2_5_vl", case) for case in cases.CASES]
    for _ in ("cold", "cached"):
        found = cases.ask(qwen.llm, requests)
        assert [cases.compare(got, want) for got, want in zip(found, wanted, strict=True)] == [""] * len(wanted)
    assert sum(got[3] for got in found) > 0


def test_images_that_change_places_or_are_known_in_part(qwen):
    """The same two pictures in another order, then one of them with a new one."""
    case = cases.Case(2, [cases.BOX, cases.OTHER], 0.25)
    text, images = cases.prompt_of("qwen2_5_vl", case)
    new = cases.picture((72, 48), 77)
    for pictures in (images, images[::-1], [images[1], new], [new, images[0]], [new, new]):
        wanted = cases.answer(qwen.model, qwen.processor, text, pictures, case)
        request = {"prompt": text, "multi_modal_data": {"image": pictures}, "mm_processor_kwargs": case.wishes}
        assert not cases.compare(cases.ask(qwen.llm, [request])[0], wanted)


def test_videos_pass_untouched(qwen):
    """A video alone, then before a pruned picture."""
    frames = np.stack([np.asarray(cases.picture((64, 48), 50 + number)) for number in range(4)])
    about = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    video = "w3 <|vision_start|><|video_pad|><|vision_end|> w7"
    given = {"multi_modal_data": {"video": [(frames, about | {"do_sample_frames": False})]},
             "mm_processor_kwargs": {"do_sample_frames": False}}  # fmt: skip
    how = {"do_sample_frames": False, "fps": 2.0, "video_metadata": [about]}
    inputs = qwen.processor(text=video, videos=[frames], return_tensors="pt", videos_kwargs=how)
    out = qwen.model.generate(
        **inputs, max_new_tokens=cases.STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True,
        eos_token_id=None,
    )  # fmt: skip
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logs = [float(row[0].log_softmax(-1)[token]) for row, token in zip(out.logits, tokens, strict=True)]
    alone = cases.ask(qwen.llm, [given | {"prompt": video}])[0]
    assert not cases.compare(alone, (tokens, logs))
    both = given | {"prompt": f"{video} {models.QWEN} w8"}
    both["multi_modal_data"] = both["multi_modal_data"] | {"image": cases.picture((72, 48), 0)}
    whole = cases.ask(qwen.llm, [both])[0]
    both["mm_processor_kwargs"] = both["mm_processor_kwargs"] | {"crop_region": [cases.BOX], "crop_keep": 0.2}
    pruned = cases.ask(qwen.llm, [both])[0]
    assert whole[2] - pruned[2] == 54 - 11 and pruned[1] != whole[1]  # of the picture's 54 tokens


def test_one_region_for_two_images_is_refused(qwen):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="one entry per image, got 1 for 2 images"):
        cases.ask(qwen.llm, [cases.request_of("qwen2_5_vl", cases.Case(2, [cases.BOX], 0.2))])
