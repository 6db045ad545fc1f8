"""Messages of lmms-eval as prompts, rounds of a task, answers cut at their stops; none of it needs lmms-eval."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from crop.integrations.conversation import (
    chat_arguments,
    cut_answer,
    next_round,
    read_messages,
    user_turn,
    what_is_asked,
)
from crop.integrations.generation import FirstToken, Forced, continuation_ids, generation, until_end

pytestmark = pytest.mark.fast
DOT = Image.new("RGB", (2, 2))


def asker(**more):
    processor = SimpleNamespace(image_token="<img>", apply_chat_template=lambda turns, **how: f"{turns} {how}")
    return SimpleNamespace(processor=processor, prompt=None, **more)


def test_messages_become_a_prompt_with_its_pictures_in_order(tmp_path):
    file = tmp_path / "b.png"
    Image.new("RGB", (3, 1)).save(file)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image", "url": DOT}, {"type": "text", "text": "<image><img>what"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "url": str(file)},
                                     {"type": "text", "text": "here"}]},
    ]  # fmt: skip
    prompt = read_messages(asker(), messages, "a test", enable_thinking=True)
    assert [image.size for image in prompt.images] == [(2, 2), (3, 1)]
    assert prompt.question == "and\nhere"  # of the last turn, and nothing of the assistant's
    kinds = [[part["type"] for part in turn["content"]] for turn in eval(prompt.text.rpartition(" {")[0])]
    assert kinds == [["text"], ["image", "text"], ["text"], ["text", "image", "text"]]
    assert "'what'" in prompt.text and "'add_generation_prompt': True" in prompt.text
    assert "'enable_thinking': True" in prompt.text


@pytest.mark.parametrize("text,asked", [
    ("Is there a dog?\nAnswer the question using a single word or phrase.", "Is there a dog?"),
    ("What is it?\nA. dog\nB. cat\nAnswer with the option's letter from the given choices directly.",
     "What is it?\nA. dog\nB. cat"),
    ("What?\n\nThink step by step and give your final answer.\n\nPlease answer directly.", "What?"),
    ("Answer the question", "Answer the question"),  # it says nothing else
    ("Answer in the sign\nwhat does it say", "Answer in the sign\nwhat does it say"),  # only at the end
    ("", ""),
])  # fmt: skip
def test_localizers_are_not_told_in_what_form_to_answer(text, asked):
    assert what_is_asked(text) == asked
    prompt = read_messages(asker(), user_turn([DOT], text), "a test")
    assert prompt.question == asked and repr(text)[1:-1] in prompt.text  # the model is


def test_a_template_that_fails_is_named():
    def fail(turns, **_):
        raise KeyError("system")

    model = SimpleNamespace(processor=SimpleNamespace(apply_chat_template=fail), prompt=None)
    with pytest.raises(
        ValueError, match="chat template must take the messages of document 3 of t, got KeyError: 'system'"
    ):
        read_messages(model, user_turn([DOT], "what"), "document 3 of t")


def test_pictures_are_upright_and_what_is_transparent_is_white():
    ink = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    deep = Image.fromarray(np.array([[0, 30000, 65535]], np.uint16))
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x112] = 6
    found = read_messages(asker(), user_turn([ink, deep, turned], "what"), "a test").images
    assert found[0].getpixel((0, 0)) == (255, 255, 255) and found[2].size == (2, 4)
    assert [found[1].getpixel((x, 0))[0] for x in range(3)] == [0, 117, 255]


@pytest.mark.parametrize(
    "visual,kind",
    [("clip.mp4", "video"), ({"array": [0.0], "sampling_rate": 8}, "audio"), ({"type": "video"}, "video")],
)
def test_what_is_neither_text_nor_image_is_refused_by_name(visual, kind):
    with pytest.raises(ValueError, match=f"messages must be made of text and images, got {kind} in document 3 of t;"):
        read_messages(asker(), user_turn([DOT, visual], "what"), "document 3 of t")


def test_a_model_with_a_prompt_of_its_own_takes_one_question_about_one_image():
    model = SimpleNamespace(processor=SimpleNamespace(), prompt=lambda question: f"<image> {question}")
    assert (
        read_messages(model, user_turn([DOT], "what\nAnswer briefly."), "a test").text
        == "<image> what\nAnswer briefly."
    )
    for messages in (
        user_turn([], "what"),
        user_turn([DOT, DOT], "what"),
        [*user_turn([DOT], "a"), *user_turn([], "b")],
    ):
        with pytest.raises(ValueError, match="one question about one image .* turns with . images in a test"):
            read_messages(model, messages, "a test")


def test_older_requests_are_asked_like_chat_requests():
    context, to_messages, options, document, task, split = chat_arguments(
        ("what", {"until": "x"}, lambda doc: [doc, "b.JPG"], 7, "t", "test")
    )
    assert (context, options, document, task, split) == ("what", {"until": "x"}, 7, "t", "test")
    assert to_messages(DOT) == [{"role": "user", "content": [
        {"type": "image", "url": DOT}, {"type": "image", "url": "b.JPG"}, {"type": "text", "text": "what"}]}]  # fmt: skip
    _, text_only, *_ = chat_arguments(("what", {}, None, 7, "t", "test"))
    assert text_only(DOT) == [{"role": "user", "content": [{"type": "text", "text": "what"}]}]


def test_rounds_follow_the_task_whichever_form_it_has():
    def to_text(doc, *, previous_output, round_idx, previous_round_info):
        if round_idx == 2:
            return None, None, True, [*previous_output, "added"], None
        return [doc], f"{previous_output} {previous_round_info}", False, ["changed"], "note"

    _, to_messages, *_ = chat_arguments(("first", {}, lambda doc: [doc], to_text, 0, "t", "test"))
    messages, answers, info = next_round(to_messages, DOT, 0, [], None)
    assert messages == user_turn([DOT], "first")
    messages, answers, info = next_round(to_messages, DOT, 1, ["one"], info)
    assert messages == user_turn([DOT], "['one'] None") and answers == ["changed"] and info == "note"
    assert next_round(to_messages, DOT, 2, ["changed"], info) == (None, ["changed", "added"], None)

    _, plain, *_ = chat_arguments(("first", {}, None, lambda doc, **_: "again", 0, "t", "test"))
    assert next_round(plain, DOT, 1, ["one"], None) == (user_turn(None, "again"), ["one"], None)
    assert next_round(lambda doc, **_: "no tuple", DOT, 1, ["one"], "note") == (None, ["one"], "note")


@pytest.mark.parametrize("text,stops,thinking,answer", [
    ("a dog\n\nA cat", ["\n\n"], False, "a dog"),
    ("a dog", [""], False, "a dog"),
    ("<think>one\n\ntwo</think>\n\na dog\n\nA cat", ["\n\n"], False, "<think>one\n\ntwo</think>a dog"),
    ("one\n\ntwo</think> a dog", ["\n\n"], True, "one\n\ntwo</think>a dog"),  # the prompt holds the first tag
    ("one\n\ntwo", ["\n\n"], True, "one\n\ntwo"),  # cut off inside of its thought
    ("<think>one\n\ntwo", ["\n\n"], False, "<think>one\n\ntwo"),
])  # fmt: skip
def test_an_answer_ends_at_its_stops_and_a_thought_does_not(text, stops, thinking, answer):
    assert cut_answer(text, stops, thinking) == answer


def test_options_of_tasks_become_arguments_of_generate():
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    how, stops = generation({"until": ["a", "b"], "image_aspect_ratio": "pad"})
    assert how == {"max_new_tokens": 1024, **greedy} and stops == ["a", "b"]
    how, stops = generation({"max_new_tokens": 5, "temperature": 0, "top_p": 0.9, "num_beams": 3, "until": "a"})
    assert how == {"max_new_tokens": 5, "num_beams": 3, **greedy} and stops == ["a"]
    how, _ = generation({"temperature": 0.5, "top_p": 0.9, "max_new_tokens": None})
    assert how == {"max_new_tokens": 1024, "top_p": 0.9, "do_sample": True, "temperature": 0.5}
    assert generation({"do_sample": True})[0]["temperature"] == 1.0
    assert not generation({"do_sample": False, "temperature": 0.5})[0]["do_sample"]
    with pytest.raises(ValueError, match="must be among max_new_tokens, .*, until, stop_sequences, got max_tokens"):
        generation({"max_tokens": 5})


def test_padding_behind_the_end_is_no_output():
    assert until_end([5, 6, 2, 0, 0], 2) == [5, 6, 2]
    assert until_end([5, 6, 3, 2], [2, 3]) == [5, 6, 3]
    assert until_end([5, 6, 0], None) == [5, 6, 0]


def test_a_continuation_is_split_as_it_stands_behind_the_text():
    pieces = {"a:": [1, 2], "a: b": [1, 2, 3], "ab": [4], " b": [5, 3], "b": [6], "a": [1]}
    tokenizer = lambda text, **_: SimpleNamespace(input_ids=pieces[text])  # noqa: E731
    assert continuation_ids(tokenizer, "a:", " b") == [3]
    assert continuation_ids(tokenizer, "a", "b") == [6]  # "ab" is one token


def test_forced_tokens_are_written_and_scored():
    forced = Forced([[1, 2], [0], []])
    logits = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert forced(None, logits).argmax(-1).tolist() == [1, 0, 0]
    assert forced(None, logits).argmax(-1).tolist() == [2, 0, 0]
    high, low = logits[0].log_softmax(-1)[[1, 0]].tolist()
    first, second, third = forced.losses
    assert first == (pytest.approx(-(high + low) / 2), False) and second == (pytest.approx(-high), True)
    assert third == (0, True)


def test_the_settings_of_a_model_change_no_score():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    prompt, row = [1, 2, 3], [2, 5, 3, 4]
    model.generation_config = own = GenerationConfig(
        eos_token_id=5, pad_token_id=0, repetition_penalty=5.0, suppress_tokens=[3], max_length=4, min_new_tokens=3
    )
    forced = Forced([row])
    with forced.plain(model):
        written = model.generate(torch.tensor([prompt]), logits_processor=[forced])
    assert written.tolist() == [prompt + row] and model.generation_config is own
    with torch.no_grad():
        logits = model(torch.tensor([prompt + row])).logits[0, 2:-1].log_softmax(-1)
    expected = -logits.gather(1, torch.tensor(row)[:, None]).mean().item()
    assert forced.losses == [(pytest.approx(expected, abs=1e-5), False)]


def test_a_row_that_was_not_written_to_its_end_has_no_score():
    forced = Forced([[1], [1, 2]])
    forced(None, torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"generate\(\) must take 2 steps, got 1"):
        _ = forced.losses


def test_time_to_the_first_token_is_that_of_the_first():
    watch = FirstToken()
    assert watch(torch.zeros(2, 3), None).tolist() == [False, False]
    first = watch.seconds
    assert first > 0
    watch(torch.zeros(2, 4), None)
    assert watch.seconds == first
