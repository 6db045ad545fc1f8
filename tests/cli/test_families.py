"""What `crop ask` is made of, on every family with its defaults; models that think before they answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import crop
from crop.cli.ask import Asker
from crop.cli.visualize import overlay
from crop.models import family_of
from tests.support.cases import families, get_model
from tests.support.localizing import StandIn
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import FAMILIES, decoder_of

pytestmark = pytest.mark.usefixtures("one_thread")


@families()
def test_a_question_with_the_defaults(family: str) -> None:
    model, processor = get_model(family), StandIn(family)
    before, asker = snapshot(model), Asker(model, processor)
    localizer, keep = asker.localizer(asker.default_localizer), 0.3
    method = crop.by_name("crop", keep, asker.num_layers)
    pruned, plain = asker.compare(processor.picture, "?", method=method, localizer=localizer, max_new_tokens=3)
    (layout,) = processor.batch.samples[0].layouts()
    count = len(layout)
    assert (plain.tokens.before, plain.tokens.after_ilp, plain.tokens.layer_average) == (count, count, count)
    # More where every row of tiles ends with a newline, and a token for every view.
    assert abs(pruned.tokens.after_ilp - keep * count) <= max(1, 0.1 * count)
    assert pruned.tokens.after_ilp <= pruned.tokens.after_plc < count
    cut = family_of(model).default_layer(decoder_of(family, model).config)
    assert cut in FAMILIES[family].cuts
    share = cut / asker.num_layers
    expected = share * pruned.tokens.after_plc + (1 - share) * pruned.tokens.after_ilp
    assert pruned.tokens.layer_average == pytest.approx(expected)
    assert len(pruned.text.split()) == 3
    assert_unchanged(before, model)
    seen = overlay(processor.picture, *pruned.images[0].drawing)
    assert seen.width >= processor.picture.width


@pytest.mark.fast
def test_templates_are_asked_not_to_think() -> None:
    class Processor(StandIn):
        def __call__(self, images, text, return_tensors):
            texts.append(text)
            return super().__call__(images, text, return_tensors)

    texts: list[str] = []
    for template in ("{% if enable_thinking %}<think>{% endif %}", "no thoughts"):
        processor = Processor("llava")
        processor.chat_template = template
        crop.encode(processor, processor.picture, "what?")
    assert "'enable_thinking': False" in texts[0] and "'text': 'what?'" in texts[0]
    assert "enable_thinking" not in texts[1] and "'text': 'what?'" in texts[1]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("ids", "answer"),
    [
        ([5, 6], "5 6"),
        ([7, 5, 8, 6, 5], "6 5"),  # <think> 5 </think> 6 5
        ([5, 8, 6], "6"),  # the template opened the block
        ([7, 5, 8, 8, 6], "6"),
        ([7, 5, 5], "7 5 5"),  # out of tokens
        ([7, 5, 8], ""),
    ],
)
def test_thoughts_are_no_part_of_the_answer(ids: list[int], answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = StandIn("llava")
    processor.tokenizer = SimpleNamespace(get_added_vocab=lambda: {"<think>": 7, "</think>": 8, "<pad>": 0})
    model = get_model("llava")
    generate, prompt = model.generate, processor.batch.inputs["input_ids"]

    def scripted(**arguments: torch.Tensor) -> torch.Tensor:
        generate(**arguments)
        return torch.cat([prompt, torch.tensor([ids])], 1)

    monkeypatch.setattr(model, "generate", scripted)
    found = Asker(model, processor).ask(processor.picture, "?", method=None, localizer=crop.WholeLocalizer())
    assert found.text == answer
