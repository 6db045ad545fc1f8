"""How a question is put to a model: a first token that the chat template writes is not added once more."""

from __future__ import annotations

import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

import crop
from crop import embedded
from crop.cli.ask import Asker

pytestmark = pytest.mark.fast
PICTURE = Image.new("RGB", (32, 32))
WORDS = "{% for part in messages[0].content %}{{ '<image>' if part.type == 'image' else ' ' + part.text }}{% endfor %}"


@pytest.mark.parametrize("template", [WORDS, "{{ bos_token }}" + WORDS])
def test_the_first_token_stands_once(template):
    """As Gemma's tokenizer and template both write it."""
    processor = AutoProcessor.from_pretrained(embedded.WEIGHTS)
    first = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", first)]
    )
    processor.chat_template = template
    one = crop.encode(processor, PICTURE, "what is it")["input_ids"]
    batch = Asker(None, processor).encode_batch([[PICTURE], [PICTURE, PICTURE]], ["what is it", "what"])["input_ids"]
    for row in (one[0], *batch):
        assert (row == first).sum() == 1
    assert one[0, 0] == first
