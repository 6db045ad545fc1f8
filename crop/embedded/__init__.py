"""A small vision-language model that comes with the package, so that pruning can be tried and tested offline.

An unmodified ``LlavaForConditionalGeneration`` (SigLIP-style tower, Llama decoder), trained from nothing on the
rendered pictures of ``crop.embedded.scenes``, in the geometry of LLaVA-1.5: 576 vision tokens on a 24 x 24 grid, 12
decoder layers. See ``MODEL_CARD.md`` beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crop.embedded import scenes
from crop.embedded.scenes import Question, Scene, scene

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

WEIGHTS = Path(__file__).parent / "weights"
HEAD = Path(__file__).parent / "head.safetensors"  # of ``HeadLocalizer``, made by bench.training.head
LONGEST = 13  # tokens of an answer, with the one that ends it

__all__ = ["HEAD", "LONGEST", "WEIGHTS", "Question", "Scene", "answer", "load", "prompt", "scene", "scenes"]


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, directory: str | Path = WEIGHTS
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model in evaluation mode and its processor, from files on disk alone.

    Args:
        device: where the model goes. dtype: of its parameters (stored in bfloat16).
        directory: weights and processor; default: those of the package.
    Raises:
        FileNotFoundError: the directory holds no weights.
    """
    if not (Path(directory) / "config.json").is_file():
        raise FileNotFoundError(f"load: directory must hold exported weights, got {str(directory)!r}")
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=dtype, local_files_only=True)
    return model.to(device).eval(), AutoProcessor.from_pretrained(directory, local_files_only=True)


def prompt(question: str) -> str:
    """The text the model was trained to answer: one image, then the question with one question mark.

    Words in capitals are what stands in the picture, each capital a token of its own; all others are put in lower case.
    """
    words = question.strip().rstrip("?").split()
    return " ".join(["<image>", *(word if word.isupper() else word.lower() for word in words), "?"])


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: Sequence[Image], questions: Sequence[str]
) -> list[str]:
    """Greedy answers, one per (image, question) pair; the batch is padded on the left.

    Args:
        images: one per question, RGB, any size (resized to 384 x 384).
        questions: see ``scenes`` for the kinds the model knows.
    Raises:
        ValueError: as many images as questions are needed.
    """
    if len(images) != len(questions):
        raise ValueError(f"answer: images must be one per question ({len(questions)}), got {len(images)}")
    texts = [prompt(question) for question in questions]
    inputs = processor(images=list(images), text=texts, padding=True, return_tensors="pt").to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
