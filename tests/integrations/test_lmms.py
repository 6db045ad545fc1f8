"""The adapter for lmms-eval: what it answers, scores, counts and refuses, with lmms-eval or a stand-in for it."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import crop
from crop import embedded
from crop.cli.options import UsageError
from crop.embedded.scenes import examples
from crop.integrations.generation import limit_pixels
from tests.integrations import benchmarks
from tests.integrations.conftest import chat_request, give_documents

pytest.importorskip("tqdm")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def ask(lmms):
    """(model, [(question, images)], options of each) -> results, as lmms-eval asks."""

    def ask(model, asked, *options):
        give_documents(model, range(len(asked)))
        requests = [chat_request(number, text, options[number % len(options)], *images)
                    for number, (text, images) in enumerate(asked)]  # fmt: skip
        return model.generate_until(requests)

    return ask


def scoring(texts, continuation, images):
    """Requests that score a continuation."""
    return [SimpleNamespace(args=(text, continuation, lambda doc, n=number: images[n], number, "tiny", "test"))
            for number, text in enumerate(texts)]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("method,localizer,size", [("none", "whole", 3), ("crop", "attention", 2), ("uniform", "whole", 4)])  # fmt: skip
def test_requests_come_back_in_order(lmms, ask, method, localizer, size):
    asked = list(examples(6))
    model = lmms.CropModel("embedded", method, 0.33, localizer, device="cpu", batch_size=size)
    asker, how = model.asker, {"method": model.method, "localizer": model.localizer}
    longest = embedded.LONGEST
    options = {"max_new_tokens": longest, "until": ["\n"]}, {"max_new_tokens": longest - 1}  # two groups, interleaved
    results = ask(model, [(q.text, [scene.image]) for scene, q in asked], *options)
    answers = [result.text for result in results]
    assert answers == [asker.ask(scene.image, q.text, max_new_tokens=longest, **how).text for scene, q in asked]
    assert len(set(answers)) >= 3
    if method == "none":
        images, texts = [s.image for s, _ in asked], [q.text for _, q in asked]
        assert answers == embedded.answer(asker.model, asker.processor, images, texts)
        assert sum(a == q.answer for a, (_, q) in zip(answers, asked, strict=True)) >= 4


def test_a_batch_equals_its_samples(lmms, ask, chatty):
    """Questions of different lengths about no, one and several images."""
    scenes = list(examples(4))
    asked = [(q.text, [scene.image]) for scene, q in scenes]
    asked[1] = (asked[1][0], [scenes[1][0].image, scenes[0][0].image])
    asked.insert(2, ("what is it", []))
    batch, single = (
        ask(lmms.CropModel(chatty, "crop", 0.2, device="cpu", batch_size=size), asked, {"max_new_tokens": 4})
        for size in (5, 1)
    )
    assert [result.text for result in batch] == [result.text for result in single]
    for one, other in zip(batch, single, strict=True):
        assert one.token_counts.time_to_first_token > 0
        one.token_counts.time_to_first_token = other.token_counts.time_to_first_token
        assert one.token_counts == other.token_counts
    assert [result.token_counts.vision_tokens for result in batch] == [576, 1152, 0, 576, 576]


def test_batches_are_of_similar_length_and_equal_options(lmms, ask, monkeypatch):
    [(scene, _)] = examples(1)
    model = lmms.CropModel("embedded", "none", device="cpu", batch_size=2)
    seen, real = [], model.asker.encode_texts
    monkeypatch.setattr(type(model.asker), "encode_texts", lambda self, i, t: seen.append(list(t)) or real(i, t))
    asked = [(word, [scene.image]) for word in ("a", "a b c d", "a b", "a b c", "a b c d e")]
    ask(model, asked, {"max_new_tokens": 1}, {"max_new_tokens": 1}, {"max_new_tokens": 2})
    found = [[text.removeprefix("<image> ").removesuffix(" ?") for text in batch] for batch in seen]
    assert found == [["a b c d e", "a b c d"], ["a b c", "a"], ["a b"]]


@pytest.mark.parametrize("early", [False, True])
def test_what_a_sample_took_is_written_beside_it(lmms, ask, early):
    [(scene, question)] = examples(1)
    model = lmms.CropModel("embedded", "crop", 0.25, device="cpu", prune_encoder=early)
    assert isinstance(model.localizer, crop.CoarseLocalizer) == model.method.encodes == early
    counts = ask(model, [(question.text, [scene.image])], {"max_new_tokens": 5})[0].token_counts
    found = counts.to_dict()
    inputs = model.asker.processor(images=scene.image, text=embedded.prompt(question.text), return_tensors="pt")
    assert found["input_tokens"] == inputs["input_ids"].shape[1]
    with crop.patch(model.asker.model, model.method, model.localizer(scene.image, question.text),
                    processor=model.asker.processor, image_size=scene.image.size) as stats:  # fmt: skip
        output = model.asker.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert found["output_tokens"] == output.shape[1] - inputs["input_ids"].shape[1]
    assert found["vision_tokens"] == 576 and found["vision_tokens_kept"] == stats.tokens_after_ilp[0] <= 144
    assert found["vision_tokens_average"] == stats.layer_average[0] and 0 < found["time_to_first_token"] < 60
    assert "reasoning_tokens" not in found


def test_counts_of_a_sample_are_those_of_its_images(lmms, ask, chatty, monkeypatch):
    """In a batch whose samples have one image, two, none and one."""
    scene = next(examples(1))[0].image
    model = lmms.CropModel(chatty, "none", device="cpu", batch_size=4)
    counts = {
        "tokens_before": [1, 20, 300, 4000],
        "tokens_after_ilp": [5, 60, 700, 8000],
        "layer_average": [2, 30, 4, 5],
    }

    @contextlib.contextmanager
    def counted(*_, **__):
        yield SimpleNamespace(**counts)

    monkeypatch.setattr(lmms, "patch", counted)
    asked = [("a b c d", [scene]), ("a b c", [scene] * 2), ("a b", []), ("a", [scene])]
    found = [result.token_counts for result in ask(model, asked, {"max_new_tokens": 1})]
    assert [one.vision_tokens for one in found] == [1, 320, 0, 4000]
    assert [one.vision_tokens_kept for one in found] == [5, 760, 0, 8000]
    assert [one.vision_tokens_average for one in found] == [2, 34, 0, 5]


def test_beams_change_no_count(lmms, ask, chatty):
    image, found = next(examples(1))[0].image, []
    model = lmms.CropModel(chatty, "crop", device="cpu", batch_size=3)
    model.method = crop.InnerLLMPruning(mode="strict")  # counts follow the region, here that of a question
    model.localizer = lambda _, question: crop.Region.box(0, 0, 1, 0.5 if "b" in question else 1)
    for beams in (1, 2):
        results = ask(model, [("a b", [image] * 2), ("a", [image])], {"max_new_tokens": 1, "num_beams": beams})
        found.append([one.token_counts.vision_tokens_kept for one in results])
    assert found == [[576, 576]] * 2


def test_each_image_has_its_region(lmms, ask, chatty, monkeypatch, tmp_path):
    """Also where requests with several images and with one are answered together."""
    corner = {"red": (0, 0, 0.5, 0.5), "green": (0.5, 0, 1, 0.5), "blue": (0, 0.5, 0.5, 1)}
    plugin = tmp_path / "corners.py"
    plugin.write_text(
        "import crop\n"
        f"corner = {corner!r}\n"
        "names = {(255, 0, 0): 'red', (0, 128, 0): 'green', (0, 0, 255): 'blue'}\n"
        "def find(image, question):\n"
        "    return crop.Region.box(*corner[names[image.getpixel((0, 0))]])\n"
        "crop.register_localizer('corners', lambda given: find)\n"
    )
    model = lmms.CropModel(chatty, "crop", 0.2, "corners", plugin=str(plugin), device="cpu", batch_size=2)
    regions, real = [], lmms.patch
    monkeypatch.setattr(lmms, "patch", lambda *args, **more: regions.extend(args[2]) or real(*args, **more))
    pictures = [Image.new("RGB", (64, 64), name) for name in ("red", "green", "blue")]
    ask(model, [("what now", pictures[:2]), ("what", pictures[2:])], {"max_new_tokens": 1})
    assert [region.boxes[0] for region in regions] == list(corner.values())


def test_a_thought_is_counted_and_left_to_lmms_eval(lmms, ask, chatty, monkeypatch):
    model = lmms.CropModel(chatty, "none", device="cpu", enable_thinking=True)
    tokenizer = model.asker.processor.tokenizer
    text = "red </think> dog cat"
    monkeypatch.setattr(type(model.asker.processor), "decode", lambda *_, **__: text)
    result = ask(model, [("what", [next(examples(1))[0].image])], {"max_new_tokens": 2, "until": ["red", "cat"]})[0]
    assert result.text == "<think>red</think>dog"
    assert result.token_counts.reasoning_tokens == len(tokenizer("red</think>", add_special_tokens=False).input_ids)


def test_rounds_go_on_until_the_task_ends_them(lmms, chatty):
    scenes = [scene.image for scene, _ in examples(3)]
    model = lmms.CropModel(chatty, "crop", 0.3, device="cpu", batch_size=2)
    give_documents(model, scenes)
    asked = []

    def to_messages(doc, *, round_idx=0, previous_output=(), previous_round_info=None):
        asked.append((scenes.index(doc), round_idx, list(previous_output), previous_round_info))
        messages = [
            {"role": "user", "content": [{"type": "image", "url": doc}, {"type": "text", "text": "what is it"}]}
        ]
        if round_idx == 0:
            return messages
        return messages, round_idx > scenes.index(doc), list(previous_output), round_idx

    requests = [SimpleNamespace(args=("what", to_messages, {"max_new_tokens": 2}, n, "tiny", "test")) for n in range(3)]
    answers = model.generate_until_multi_round(requests)
    assert [len(rounds) for rounds in answers] == [1, 2, 3]
    single = [model.generate_until([chat_request(n, "what is it", {"max_new_tokens": 2}, scenes[n])])[0].text
              for n in range(3)]  # fmt: skip
    assert answers == [[single[n]] * (n + 1) for n in range(3)]
    assert [entry for entry in asked if entry[0] == 2] == [
        (2, number, [single[2]] * number, number - 1 if number > 1 else None) for number in range(4)
    ]
    endless = SimpleNamespace(args=("what", lambda doc, **_: (to_messages(doc), False, None, None)
                                    if _ else to_messages(doc), {"max_new_tokens": 1}, 0, "tiny", "test"))  # fmt: skip
    with pytest.MonkeyPatch.context() as few:
        few.setattr(lmms, "MAX_ROUNDS", 3)
        with pytest.raises(RuntimeError, match="must end within 3 rounds, got one that does not: tiny"):
            model.generate_until_multi_round([endless])


# --------------------------------------------------------------------------------------------------------- scoring
@pytest.mark.parametrize("method", ["none", "crop"])
def test_continuations_are_scored_as_they_would_be_generated(lmms, method):
    """What the model answers by itself gets the probabilities of its own decoding, unpruned also those of one forward."""
    asked = list(examples(3))
    images = [[scene.image] for scene, _ in asked]
    model = lmms.CropModel("embedded", method, 0.3, device="cpu", batch_size=3)
    give_documents(model, range(3))
    net, processor = model.asker.model, model.asker.processor
    own = []
    for scene, question in asked:
        inputs = processor(images=scene.image, text=embedded.prompt(question.text), return_tensors="pt")
        region = model.localizer(scene.image, question.text)
        with crop.patch(net, model.method, region, processor=processor, image_size=scene.image.size):
            output = net.generate(**inputs, max_new_tokens=embedded.LONGEST, do_sample=False, output_logits=True,
                                  return_dict_in_generate=True)  # fmt: skip
        new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        count = (new + [net.generation_config.eos_token_id]).index(net.generation_config.eos_token_id)
        best = [logits.log_softmax(-1).max().item() for logits in output.logits[:count]]
        own.append((processor.decode(new[:count]), count, -sum(best) / count))
    scores = model.loglikelihood(scoring([q.text for _, q in asked], lambda doc: f" {own[doc][0]}", images))
    for (scene, question), (answer, count, expected), result in zip(asked, own, scores, strict=True):
        assert result.text == (pytest.approx(expected, abs=1e-4), True)
        assert result.token_counts.output_tokens == count
        if method == "none":
            text = f"{embedded.prompt(question.text)} {answer}"
            whole = processor(images=scene.image, text=text, return_tensors="pt")
            logits = net(**whole).logits[0, -count - 1 : -1].log_softmax(-1)
            one = -logits.gather(1, whole["input_ids"][0, -count:, None]).mean().item()
            assert result.text[0] == pytest.approx(one, abs=1e-4)


def test_a_wrong_continuation_is_unlikely_and_a_batch_scores_as_singles(lmms):
    asked = list(examples(3))
    images, texts = [[scene.image] for scene, _ in asked], [q.text for _, q in asked]
    found = {}
    for size in (3, 1):
        model = lmms.CropModel("embedded", "crop", 0.3, device="cpu", batch_size=size)
        give_documents(model, range(3))
        found[size] = model.loglikelihood(
            [request for words in (" red", " red dog") for request in scoring(texts, words, images)]
        )
    for one, other in zip(found[3], found[1], strict=True):
        assert one.text == (pytest.approx(other.text[0], abs=1e-4), other.text[1])
        assert one.text[0] > math.log(2) and one.text[1] is False


def test_a_choice_is_scored_without_a_question_too(lmms, chatty):
    """As tasks that compare with the choice alone ask for it; older requests have no document then."""
    model = lmms.SimpleCropModel(chatty, "crop", 0.3, device="cpu")
    (result,) = model.loglikelihood([SimpleNamespace(args=("", "red dog"))])
    assert result.text[0] > 0 and result.token_counts.vision_tokens == 0


def test_the_older_form_gives_the_same_answers(lmms, ask):
    asked = list(examples(2))
    model = lmms.SimpleCropModel("embedded", "crop", 0.3, device="cpu")
    assert lmms.SimpleCropModel.is_simple and not lmms.CropModel.is_simple
    give_documents(model, [scene for scene, _ in asked])
    options = {"max_new_tokens": 5}
    requests = [SimpleNamespace(args=(q.text, options, lambda scene: [scene.image], n, "tiny", "test"))
                for n, (_, q) in enumerate(asked)]  # fmt: skip
    chat = lmms.CropModel("embedded", "crop", 0.3, device="cpu")
    expected = [result.text for result in ask(chat, [(q.text, [scene.image]) for scene, q in asked], options)]
    assert [result.text for result in model.generate_until(requests)] == expected


# ----------------------------------------------------------------------------------------------------- batch sizes
def limited(model, monkeypatch, most):
    """A model whose memory suffices for batches of ``most``; the sizes that were tried."""
    tried, real = [], model.asker.model.generate

    def generate(**inputs):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(**inputs)

    monkeypatch.setattr(model.asker.model, "generate", generate)
    return tried


def test_auto_batches_shrink_to_what_memory_holds(lmms, ask, monkeypatch):
    asked = [(q.text, [scene.image]) for scene, q in examples(7)]
    model = lmms.CropModel("embedded", "crop", 0.2, device="cpu", batch_size="auto", max_batch_size=6)
    expected = [result.text for result in ask(model, asked, {"max_new_tokens": 3})]
    assert model.batch_sizes == {"generate_until": 6}
    tried = limited(model, monkeypatch, 1)
    assert [result.text for result in ask(model, asked, {"max_new_tokens": 3})] == expected
    assert tried == [6, 3] + [1] * 7 and model.batch_sizes == {"generate_until": 1}


def test_rounds_lose_no_request_where_batches_shrink(lmms, monkeypatch):
    model = lmms.CropModel("embedded", "none", device="cpu", batch_size="auto", max_batch_size=4)
    give_documents(model, range(8))
    tried, image = limited(model, monkeypatch, 2), next(examples(1))[0].image
    requests = [chat_request(number, "what", {"max_new_tokens": 1}, image) for number in range(8)]
    answers = model.generate_until_multi_round(requests)
    assert tried == [4, 2, 2, 2, 2] and [len(rounds) for rounds in answers] == [1] * 8


def test_memory_that_holds_no_batch_is_an_error(lmms, ask, monkeypatch):
    asked = [(q.text, [scene.image]) for scene, q in examples(2)]
    for size, tries in (("auto", [2, 1]), (2, [2])):  # a number that was asked for is never made smaller
        model = lmms.CropModel("embedded", "none", device="cpu", batch_size=size)
        tried = limited(model, monkeypatch, 0)
        with pytest.raises(torch.OutOfMemoryError):
            ask(model, asked, {"max_new_tokens": 1})
        assert tried == tries


# -------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.fast
@pytest.mark.parametrize("options,message", [
    ({"method": "magic"}, "by_name: name must be one of crop, .*got 'magic'"),
    ({"localizer": "magic"}, "get_localizer: name must be one of attention, .*got 'magic'"),
    ({"kep": 0.1, "a": 1}, r"options must be among pretrained, method, keep, .*, enable_thinking, got a, kep$"),
    ({"batch_size": "auto:4"}, "batch_size .or auto. must be a whole number of at least 1, got 'auto:4'"),
    ({"batch_size": "0"}, "batch_size .or auto. must be .*, got '0'"),
    ({"batch_size": "auto", "max_batch_size": -1}, "max_batch_size must be a whole number of at least 1, got -1"),
    ({"max_pixels": 100352}, "max_pixels must be left out for a SiglipImageProcessor.*, which does not know them"),
    ({"enable_thinking": True}, "enable_thinking must be left out for embedded: its chat template does not read it"),
])  # fmt: skip
def test_options_are_refused_by_name(lmms, options, message):
    with pytest.raises(ValueError, match=message):
        lmms.CropModel("embedded", **{"device": "cpu", **options})


@pytest.mark.fast
def test_what_from_pretrained_takes_is_handed_on(lmms, monkeypatch):
    given = {"device_map": "auto", "attn_implementation": "eager", "trust_remote_code": True}
    with pytest.raises(UsageError, match="without device_map, attn_implementation, trust_remote_code: these are for"):
        lmms.CropModel("embedded", device="cpu", **given)
    monkeypatch.setattr(lmms, "load", lambda *args, **how: (_ for _ in ()).throw(LookupError(str((args, how)))))
    with pytest.raises(LookupError, match=r"\('a', 'cpu', 'bfloat16'\), \{'attn_implementation': 'eager'\}"):
        lmms.CropModel("a", device="cpu", dtype="bfloat16", attn_implementation="eager")


def test_several_processes_take_a_device_each(lmms, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(lmms, "load", lambda *args, **how: (_ for _ in ()).throw(LookupError(args[1])))
    with pytest.raises(LookupError, match="^cuda:1$"):
        lmms.CropModel("embedded", device="cuda")
    with pytest.raises(ValueError, match="device_map must be left out with several processes, got 'auto'"):
        lmms.CropModel("embedded", device_map="auto")


@pytest.mark.fast
def test_pixels_of_a_picture_are_limited():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = SimpleNamespace(image_processor=Qwen2VLImageProcessorPil(patch_size=14))
    picture = Image.new("RGB", (560, 560))
    before = processor.image_processor(picture, return_tensors="pt")["image_grid_thw"]
    limit_pixels(processor, min_pixels=None, max_pixels=280 * 280)
    after = processor.image_processor(picture, return_tensors="pt")["image_grid_thw"]
    assert before.tolist() == [[1, 40, 40]] and after.tolist() == [[1, 20, 20]]


@pytest.mark.fast
def test_a_video_is_refused_by_name(lmms):
    model = lmms.SimpleCropModel("embedded", "none", device="cpu")
    give_documents(model, ["a.mp4"])
    request = SimpleNamespace(args=("what", {}, lambda doc: [doc], 0, "tiny", "test"))
    with pytest.raises(ValueError, match="got video in document 0 of tiny; leave the task out"):
        model.generate_until([request])


@pytest.mark.fast
def test_memory_comes_back_before_a_judge_is_loaded(lmms):
    model = lmms.CropModel("embedded", device="cpu")
    assert model.device == torch.device("cpu")
    model.clean()
    assert not [value for value in vars(model).values() if isinstance(value, torch.nn.Module)] and not hasattr(
        model, "asker"
    )


# ---------------------------------------------------------------------------------------------------------- README
@pytest.mark.fast
def test_commands_of_the_page_are_ones_that_run(lmms):
    """Known options and methods; only tasks whose files the dry runs read, and all of them."""
    page = (Path(lmms.__file__).parent / "README.md").read_text()
    known = inspect.signature(lmms.CropModel).parameters.keys() - {"unknown"}
    tables, named = re.findall(r"```bash\n(for .*?)```", page, re.S), set()
    assert len(tables) == 4
    for table in tables:
        (hows,) = re.findall(r"for how in (.*); do", table)
        (arguments,) = re.findall(r"--model_args (\S+)", table)
        named |= set(re.findall(r"--tasks (\S+)", table)[0].split(","))
        for how in hows.split():
            given = dict(pair.split("=") for pair in arguments.replace("$how", how).split(","))
            assert given.keys() <= known
            crop.by_name(given["method"], float(given.get("keep", 1)), 32)
    assert named == set(benchmarks.TASKS)
    rows = re.findall(r"^\| (`.*?) \|", page.split("## What it does")[0], re.M)
    written = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert written == known - {"device", "batch_size", "max_batch_size"}  # these are lmms-eval's own
