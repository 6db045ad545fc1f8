"""A small vision-language model that is asked for the region, as in the paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from crop.geometry.region import Region
from crop.localizers.base import encode
from crop.localizers.pretrained import load_pretrained

if TYPE_CHECKING:
    from PIL.Image import Image

BLOCKS = 8
ANSWER_LENGTH = 32


def block_prompt(question: str) -> str:
    """What a model is asked that was not trained for it."""
    return (
        f"The image is divided into {BLOCKS} x {BLOCKS} blocks, numbered from 0 at the top left to {BLOCKS - 1}. Which "
        f"rectangle of blocks is needed to answer the question below? Reply with four numbers in this form only: "
        f"[xmin, ymin, xmax, ymax].\nQuestion: {question}"
    )


def parse_blocks(text: str) -> tuple[int, int, int, int]:
    """The block rectangle in an answer.

    The last four numbers in brackets count, or where there are no brackets the only four numbers in the text, or four
    digits alone. Corners in the wrong order are put right; a 8, as in half-open or one-based counting, is taken as the
    last block.

    Returns:
        (xmin, ymin, xmax, ymax), 0-based, inclusive, ordered, below ``BLOCKS``.
    Raises:
        ValueError: there are no such four numbers, or one is out of range.
    """
    number = r"-?\d+(?:\.\d+)?"
    bracketed = re.findall(rf"[\[(]\s*({number}(?:\s*[,;\s]\s*{number}){{3}})\s*[\])]", text)
    digits = re.fullmatch(r"\s*(\d)(\d)(\d)(\d)\s*", text)
    numbers = digits.groups() if digits else re.findall(number, bracketed[-1] if bracketed else text)
    if len(numbers) != 4:
        raise ValueError(f"parse_blocks: text must hold four numbers, got {text.strip()!r}")
    values = [float(value) for value in numbers]
    if not all(0 <= value <= BLOCKS and value == int(value) for value in values):
        raise ValueError(f"parse_blocks: numbers must be whole and in [0, {BLOCKS}), got {text.strip()!r}")
    x0, y0, x1, y1 = (min(int(value), BLOCKS - 1) for value in values)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


@dataclass(frozen=True)
class VLMLocalizer:
    """A vision-language model prompted for the 8 x 8 block rectangle ("vlm").

    Args:
        model: any image-text-to-text model of transformers, in evaluation mode; meant to be small and, for good boxes,
            fine-tuned for this (``bench.training.localizer``).
        processor: its processor.
        prompt: question -> full text with the image placeholder; None: ``block_prompt`` in the chat template.
        min_confidence: below it the whole image is returned; in [0, 1). The confidence is the geometric mean of the
            probabilities of the tokens said.
    Raises:
        ValueError: ``min_confidence`` out of its range.
    Source: CROP (arXiv 2505.21233) for the task; prompt, parsing and confidence are own choice.
    """

    model: nn.Module
    processor: Any
    prompt: Callable[[str], str] | None = None
    min_confidence: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"VLMLocalizer: min_confidence must be in [0, 1), got {self.min_confidence}")

    @staticmethod
    def load(path: str | Path, device: str = "cpu") -> VLMLocalizer:
        """With model and processor from a folder or a name on the hub; see ``load_pretrained`` for what is raised.

        A folder that ``bench.training.localizer`` wrote also says how the model wants to be asked.
        """
        kind = "AutoModelForImageTextToText"
        model, processor = load_pretrained("VLMLocalizer.load", path, kind, device, dtype="auto")
        template = getattr(model.config, "crop_localizer_prompt", None)
        return VLMLocalizer(model, processor, template and (lambda question: template.replace("{question}", question)))

    @torch.no_grad()
    def __call__(self, image: Image, question: str) -> Region:
        text, confidence = self.say(image, question)
        try:
            blocks = parse_blocks(text)
        except ValueError as error:
            return Region.whole(0.0, f"the model named no region: {error}")
        if confidence < self.min_confidence:
            return Region.whole(confidence, f"the model is unsure: {confidence:.2f} < {self.min_confidence}")
        return Region.from_blocks(*blocks, grid=BLOCKS, confidence=confidence)

    def say(self, image: Image, question: str) -> tuple[str, float]:
        """What the model answers, and the geometric mean of its tokens' probabilities."""
        model = self.model
        asked = block_prompt(question) if self.prompt is None else question
        inputs = encode(self.processor, image, asked, self.prompt).to(model.device, dtype=model.dtype)
        said = {"return_dict_in_generate": True, "output_logits": True}
        output = model.generate(**inputs, max_new_tokens=ANSWER_LENGTH, do_sample=False, **said)
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        if len(new) == 0:
            return "", 0.0
        logits = torch.stack(output.logits)[:, 0].float().log_softmax(-1)
        chosen = logits.gather(1, new[:, None]).mean()
        return self.processor.decode(new, skip_special_tokens=True), float(chosen.exp())
