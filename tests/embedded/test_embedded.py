"""The carried model: its files, that it reads, and that its answers live in the regions the pictures name."""

from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.training.embedded import data, labels
from crop import embedded
from crop.embedded import scenes

HELD_OUT = 20_200_000  # training and what was watched meanwhile end before
SAMPLE = 24  # pictures
FLOOR = 0.88  # exact answers over all local kinds, on the small sample used here

Keep = Callable[[scenes.Question], Tensor]  # question -> (576,) bool: patches that the decoder gets


@pytest.fixture(scope="module")
def carried():
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield embedded.load()
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------------- files
def test_files_are_small_and_the_model_is_the_stock_class(carried):
    from transformers import LlavaForConditionalGeneration

    model, processor = carried
    assert type(model) is LlavaForConditionalGeneration and not model.training
    assert sum(f.stat().st_size for f in embedded.WEIGHTS.iterdir()) <= 24e6
    assert model.config.text_config.num_hidden_layers >= 12
    ids = processor(images=scenes.scene(0).image, text=embedded.prompt("what is the total"), return_tensors="pt")
    assert (ids["input_ids"] == model.config.image_token_id).sum() == 576


def test_load_without_weights_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold exported weights"):
        embedded.load(directory=tmp_path)


def test_tokenizer_knows_every_word(carried):
    tokenizer = carried[1].tokenizer
    assert tokenizer("item AB1.5?")["input_ids"][1:] == tokenizer.convert_tokens_to_ids(["item", *"AB1.5?"])
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(list(scenes.vocabulary()))
    assert tokenizer("submarine")["input_ids"][-1] == tokenizer.unk_token_id


def test_training_reads_words_as_the_tokenizer_does(carried):
    tokenizer = carried[1].tokenizer
    for seed in range(20):
        for question in scenes.scene(seed).questions:
            for text in (question.text + " ?", question.answer):
                assert data.tokens(text) == tokenizer(text)["input_ids"][1:], text


@pytest.mark.fast
def test_prompt_decoded_text_and_chat_template(carried):
    for said, wanted in {
        "Where is the red circle?": "<image> where is the red circle ?",
        " what is the Price of KEVU 12 ? ": "<image> what is the price of KEVU 12 ?",
    }.items():
        assert embedded.prompt(said) == wanted
        content = [{"type": "image"}, {"type": "text", "text": said}]
        turn = [{"role": "user", "content": content}]
        assert carried[1].apply_chat_template(turn, tokenize=False) == f"<s>{wanted}"  # servers add no first token
    tokenizer = carried[1].tokenizer
    for text in ("12.50", "KEVU", "red circle", "what is the price of HEKA ?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_left_padding_does_not_change_the_answer(carried):
    model, processor = carried
    drawn = [scenes.scene(HELD_OUT + i) for i in range(4)]
    texts = [embedded.prompt(scene.questions[0].text) for scene in drawn]
    both = processor(images=[scene.image for scene in drawn], text=texts, padding=True, return_tensors="pt")
    assert len(set(both["attention_mask"].sum(1).tolist())) > 1
    with torch.no_grad():
        padded = model(**both).logits[:, -1]
        for row, scene, text in zip(padded, drawn, texts, strict=True):
            alone = model(**processor(images=scene.image, text=text, return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(row, alone, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- answers
def exact(carried, scene: scenes.Scene, questions: list[scenes.Question], keep: Keep) -> list[bool]:
    """Exact answers when each question sees the vision tokens that ``keep`` leaves; masking, plain calls."""
    model, processor = carried
    texts = [f"{embedded.prompt(q.text)} {q.answer}</s>" for q in questions]
    batch = processor(images=[scene.image] * len(texts), text=texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    for i, question in enumerate(questions):
        mask[i, ids[i] == model.config.image_token_id] = keep(question).to(mask.dtype)
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(2)
    right = []
    for row, wanted, question in zip(predicted, ids, questions, strict=True):
        length = len(data.tokens(question.answer)) + 1
        right.append(torch.equal(row[-length - 1 : -1], wanted[-length:]))
    return right


def region(question: scenes.Question) -> Tensor:
    """(576,) bool: patches that the answer needs."""
    return torch.from_numpy(labels.box_mask(question.boxes))


def everything(question: scenes.Question) -> Tensor:
    """All patches."""
    return torch.ones(scenes.GRID**2, dtype=torch.bool)


def third(question: scenes.Question) -> Tensor:
    """A random third of the patches."""
    seen = ~everything(question)
    seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(len(question.text)))[: len(seen) // 3]] = (
        True
    )
    return seen


def half(question: scenes.Question) -> Tensor:
    """All but every second patch that holds the centre of a character of the answer."""
    seen, letters = everything(question), sorted({labels.patch_of(spot) for spot in question.spots})
    seen[letters[1::2]] = False
    return seen


@pytest.fixture(scope="module")
def sample():
    """(scene, some local questions) of the held-out range, every kind of question about equally often."""
    seen, chosen = collections.Counter(), []
    for seed in range(HELD_OUT, HELD_OUT + SAMPLE):
        scene = scenes.scene(seed)
        local = [q for q in scene.questions if q.kind in scenes.LOCAL_KINDS]
        picked = sorted(local, key=lambda q: seen[q.kind])[:5]
        seen.update(q.kind for q in picked)
        chosen.append((scene, picked))
    return chosen


@pytest.fixture(scope="module")
def unpruned(carried, sample):
    """Exact answers with all tokens, per picture."""
    return [exact(carried, scene, questions, everything) for scene, questions in sample]


def test_held_out_answers_are_right(sample, unpruned):
    assert {q.kind for _, questions in sample for q in questions} == set(scenes.LOCAL_KINDS)
    assert np.mean(sum(unpruned, [])) >= FLOOR


def rate(carried, sample, keep: Keep, pictures: int = 12, reads: int = 0) -> float:
    """Share of right answers; ``reads``: of questions whose answer's letters lie in at least so many patches."""
    found = []
    for scene, questions in sample[:pictures]:
        chosen = [q for q in questions if len({labels.patch_of(spot) for spot in q.spots}) >= reads]
        found += exact(carried, scene, chosen, keep) if chosen else []
    assert len(found) > 20
    return float(np.mean(found))


def test_answers_live_in_their_regions(carried, sample, unpruned):
    """Without its region an answer is gone; of the region alone it is there; and a random third is not enough."""
    rates = {"all": np.mean(sum(unpruned[:12], []))}
    rates["without"] = rate(carried, sample, lambda question: ~region(question))
    rates["alone"] = rate(carried, sample, region)
    rates["third"] = rate(carried, sample, third)
    assert rates["without"] < 0.2, rates
    assert rates["alone"] > 0.92 * rates["all"], rates
    assert rates["third"] < 0.85 * rates["all"], rates


def test_half_of_a_word_is_not_read(carried, sample):
    """No patch knows more of a word than lies in it: dropping half of its patches destroys its reading."""
    assert rate(carried, sample, half, SAMPLE, reads=2) < 0.1


@pytest.mark.fast
def test_generate_answers_through_the_public_path(carried):
    scene = scenes.scene(HELD_OUT, picture="receipt")
    questions = [q for q in scene.questions if q.kind in scenes.LOCAL_KINDS][:5]
    answers = embedded.answer(*carried, [scene.image] * 5, [q.text for q in questions])
    assert sum(a == q.answer for a, q in zip(answers, questions, strict=True)) >= 4
    with pytest.raises(ValueError, match="one per question"):
        embedded.answer(*carried, [scene.image], [])
