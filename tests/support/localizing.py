"""What tests of localizers share: a processor that stands in for the real ones, and what a localizer may not change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from PIL import Image
from transformers import BatchFeature

from tests.support.batches import make_batch, make_sample
from tests.support.processors import image_processor
from tests.support.tiny_families import FAMILIES

PICTURE = Image.new("RGB", (64, 48), "white")


class Processor:
    """Stands in for a processor: the question's length decides the prompt, the pixels are noise."""

    chat_template = None

    def __init__(self, family: str, after: int = 7) -> None:
        self.image_processor = image_processor("resize")
        size = (72, 48)  # 9 x 6 tokens where the grid follows the picture
        self.batch = make_batch([make_sample(family, [4, size, after][: 2 + (after > 0)])], "none")

    def __call__(self, images, text, return_tensors):
        return BatchFeature(dict(self.batch.inputs))


class StandIn:
    """Stands in for the processor of any family: one picture between texts, whose pixels are noise."""

    chat_template = "{{ messages }}"

    def __init__(self, family: str) -> None:
        entry = FAMILIES[family]
        size = entry.sizes[1]  # the wide one is a video in entries about videos
        self.image_processor = SimpleNamespace(do_resize=True) if entry.processor is None else entry.processor()
        self.tokenizer = SimpleNamespace(get_added_vocab=dict)
        self.picture = Image.new("RGB", size, "white")
        self.batch = make_batch([make_sample(family, [4, size, 9])], "none")

    def __call__(self, images: Any, text: str, return_tensors: str) -> BatchFeature:
        return BatchFeature(dict(self.batch.inputs))

    def apply_chat_template(self, turns: list[Any], **how: Any) -> str:
        return f"{turns} {how}"

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def state(model: Any) -> list[Any]:
    """Everything the hook could leave behind: hooks, configurations, plain attributes, weights."""
    found = []
    for name, module in model.named_modules():
        found.append((name, len(module._forward_hooks), len(module._forward_pre_hooks)))
        config = getattr(module, "config", None)
        found.append((id(config), getattr(config, "_attn_implementation", None)))
        found.append({key: id(value) for key, value in vars(module).items()})
    return found


def names() -> set[str]:
    """Of all registered attention functions."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return set(ALL_ATTENTION_FUNCTIONS)
