"""Ask a model about a picture and time every stage: what the command line and the demo are made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from crop.cli.options import UsageError
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.localizers.base import Localizer, encode, model_source
from crop.localizers.registry import get_localizer
from crop.localizers.vision_cache import cache_vision
from crop.methods.base import Method
from crop.models import families
from crop.patching.patch import patch

EMBEDDED = "embedded"
STAGES = ("preprocess", "localizer", "plan", "vision", "prefill", "decode", "total")


@dataclass(frozen=True)
class Tokens:
    """Vision tokens of the one image.

    Args:
        before, after_plc, after_ilp, layer_average: see ``PruneStats``.
    """

    before: int
    after_plc: int
    after_ilp: int
    layer_average: float


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer and what it took.

    Args:
        text: decoded, without special tokens.
        region: what the localizer returned.
        tokens: counts.
        layout, plan, kept: for ``visualize.overlay``.
        seconds: time of each stage in ``STAGES``. The vision tower counts as "vision", also where the localizer ran it,
            and the processor, which the localizer does not run again, as "preprocess";
            "prefill" is the language model's, pooling and scoring included; "decode" the rest of generate().
    """

    text: str
    region: Region
    tokens: Tokens
    layout: VisionLayout
    plan: PoolPlan | None
    kept: torch.Tensor
    seconds: dict[str, float]


@dataclass(frozen=True, eq=False)
class Asker:
    """A model that is ready to be asked.

    Args:
        model: in evaluation mode, on its device.
        processor: its processor.
        prompt: question -> full text; None: the processor's chat template.
        tidy: decoded text -> answer.
        head: file of the weights for the "head" localizer, where there are some for this model.
    """

    model: nn.Module
    processor: Any
    prompt: Callable[[str], str] | None = None
    tidy: Callable[[str], str] = str.strip
    head: Path | None = None

    def localizer(
        self,
        name: str,
        region: Region | None = None,
        *,
        layer: int | None = None,
        path: str | Path | None = None,
        min_confidence: float | None = None,
    ) -> Localizer:
        """A localizer by name, see ``get_localizer``."""
        return get_localizer(
            name,
            region=region,
            model=self.model,
            processor=self.processor,
            prompt=self.prompt,
            layer=layer,
            path=self.head if path is None and name in ("head", "cascade", "union") else path,
            min_confidence=min_confidence,
        )

    def encode_batch(self, images: Sequence[Sequence[Image]], questions: Sequence[str]) -> Any:
        """Model inputs of several questions, padded on the left.

        Args:
            images: RGB, those of each question. questions: plain text.
        Returns:
            What the processor makes of it, on the CPU.
        Raises:
            ValueError: no prompt, and the processor has no chat template.
        """
        if self.prompt is not None:
            texts = [self.prompt(question) for question in questions]
        elif getattr(self.processor, "chat_template", None):
            turns = [
                [{"role": "user", "content": [*[{"type": "image"}] * len(row), {"type": "text", "text": question}]}]
                for row, question in zip(images, questions, strict=True)
            ]
            texts = [self.processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
        else:
            raise ValueError("encode_batch: prompt must be given for a processor without a chat template, got None")
        self.processor.tokenizer.padding_side = "left"
        pictures = [list(row) for row in images] if any(len(row) for row in images) else None
        return self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")

    @torch.no_grad()
    def ask(
        self,
        image: Image,
        question: str,
        *,
        method: Method | None,
        localizer: Localizer,
        max_new_tokens: int = 32,
    ) -> Answer:
        """Localize, prune, answer greedily.

        Args:
            image: RGB.
            question: plain text.
            method: what to prune; None prunes nothing.
            localizer: its time is part of the total.
            max_new_tokens: length of the answer at most.
        Returns:
            Answer.
        """
        model = self.model
        with cache_vision(model) as vision:
            times = [time.perf_counter()]
            inputs = encode(self.processor, image, question, self.prompt).to(model.device, dtype=model.dtype)
            times.append(time.perf_counter())
            region = localizer(image, question)
            times.append(time.perf_counter())
            seen = vision.seconds  # by the localizer
            with patch(model, method, region, processor=self.processor, image_size=image.size) as stats:
                output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
            times.append(time.perf_counter())
        encoded, localized, generated = (stop - start for start, stop in pairwise(times))
        spent = stats.seconds
        seconds = {
            "localizer": localized - seen,
            "preprocess": encoded,
            "plan": spent["plan"],
            "vision": seen + spent["vision"],
            "prefill": spent["language_model"],
        }
        seconds["decode"] = localized + encoded + generated - sum(seconds.values())
        seconds["total"] = localized + encoded + generated
        return Answer(
            text=self.tidy(self.processor.decode(new, skip_special_tokens=True)),
            region=region,
            tokens=Tokens(
                stats.tokens_before[0],
                stats.tokens_after_plc[0],
                stats.tokens_after_ilp[0],
                stats.layer_average[0],
            ),
            layout=stats.layouts[0],
            plan=stats.plans[0],
            kept=stats.kept[0],
            seconds=seconds,
        )


def load(name: str, device: str, dtype: str) -> Asker:
    """A model by name.

    Args:
        name: "embedded", a folder, or the name of a model on the Hugging Face hub (downloaded by transformers if it
            is not in its cache).
        device: e.g. "cpu", "cuda".
        dtype: "auto" (float32 for the embedded model, else as stored), "float32", "bfloat16" or "float16".
    Returns:
        Asker.
    Raises:
        UsageError: nothing to load there, or an unknown family.
    """
    if name == EMBEDDED:
        from crop import embedded

        precision = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        try:
            model, processor = embedded.load(device, precision)
        except FileNotFoundError as error:
            raise UsageError(f"the embedded model is not installed: {error}") from error
        return Asker(model, processor, embedded.prompt, embedded.tidy, embedded.HEAD)
    try:
        model_source("load", name)
    except FileNotFoundError as error:
        raise UsageError(f"model {str(error).removeprefix('load: path ')}") from error
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    try:
        family = AutoConfig.from_pretrained(name).model_type
        if family not in families():
            known = ", ".join(sorted(families()))
            raise UsageError(f"model {name!r} must be of a family among {known}, got {family!r}")
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"model {name!r} cannot be loaded: {lines[0]}") from error
    if not getattr(processor, "chat_template", None):
        raise UsageError(f"model {name!r} must come with a chat template, got a processor without")
    return Asker(model.to(device).eval(), processor)
