"""The script that fine-tunes a model into a localizer: labels, blocks, and one record learnt by heart."""

from __future__ import annotations

import itertools

import pytest
import torch

from bench.training import localizer as script
from crop import embedded
from crop.embedded import scenes
from crop.geometry.region import Region
from crop.localizers import VLMLocalizer
from tests.support.cases import get_model

pytestmark = pytest.mark.usefixtures("one_thread")
BOX = ((0.26, 0.5, 0.49, 0.74),)


@pytest.mark.parametrize("boxes, blocks", [
    (BOX, (2, 4, 3, 5)), (((0.0, 0.0, 1.0, 1.0),), (0, 0, 7, 7)), (((0.25, 0.25, 0.375, 0.375),), (2, 2, 2, 2)),
    (((0.0, 0.0, 0.01, 0.01), (0.9, 0.5, 0.95, 0.51)), (0, 0, 7, 4)),
])  # fmt: skip
def test_blocks_hold_the_boxes(boxes, blocks):
    assert script.to_blocks(boxes) == blocks
    assert Region.from_blocks(*blocks).union(Region(boxes)).area == pytest.approx(Region.from_blocks(*blocks).area)


def test_one_record_is_learnt_by_heart_saved_and_loaded(tmp_path):
    model, processor = embedded.load()
    decoder = model.model.language_model
    decoder.layers, decoder.config.num_hidden_layers = decoder.layers[:2], 2  # enough to learn two answers by heart
    model.model.vision_tower.requires_grad_(False)
    prompt, answer = script.FORMS["embedded"]
    scene = scenes.scene(1)
    records = [(scene.image, "what is the total", BOX), (scene.image, "what kind of picture is this", ((0, 0, 1, 1),))]
    ask = script.asker(processor, prompt)
    batch = script.collate(processor, ask, answer, records)
    said = [processor.decode(row[row != -100]) for row in batch["labels"]]
    assert said == ["2435 </s>", "0077 </s>"]
    losses = script.train(model, itertools.repeat(batch), steps=16, rate=2e-3)
    assert losses[-1] < 0.2 * losses[0]
    model.config.crop_localizer_prompt = prompt
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    find = VLMLocalizer.load(tmp_path)
    assert find(scene.image, "what is the total").boxes == Region.from_blocks(2, 4, 3, 5).boxes
    assert find(scene.image, "what kind of picture is this").is_whole


def test_lora_trains_adapters_of_the_decoder_alone():
    pytest.importorskip("peft")
    import copy

    model = script.with_lora(copy.deepcopy(get_model("llava", "sdpa")), 2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name and "language_model" in name for name in trained)
    assert any("q_proj" in name for name in trained) and any("down_proj" in name for name in trained)
    assert isinstance(model.merge_and_unload(), type(get_model("llava", "sdpa")))
    assert not any(torch.is_tensor(p) and "lora" in n for n, p in get_model("llava", "sdpa").named_parameters())
