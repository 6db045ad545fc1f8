"""Ask a model about a picture and time every stage: what the command line and the demo are made of."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from crop.cli.options import UsageError, choose_device
from crop.cli.thoughts import split_thoughts
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.localizers.base import Localizer, WholeLocalizer, begin_once, chat, encode
from crop.localizers.pretrained import damage, explain, model_source
from crop.localizers.registry import get_localizer
from crop.localizers.vision_cache import cache_vision
from crop.methods.base import Method
from crop.models import families, family_of
from crop.patching.patch import patch

EMBEDDED = "embedded"
STAGES = ("preprocess", "localizer", "plan", "vision", "prefill", "decode", "total")


@dataclass(frozen=True)
class Tokens:
    """Vision tokens of an image, or of several; see ``PruneStats``."""

    before: int
    encoded: int
    after_plc: int
    after_ilp: int
    layer_average: float


@dataclass(frozen=True, eq=False)
class Seen:
    """What the model got to see of one image.

    ``drawing``: what ``overlay`` draws on the image: layout, plan and kept tokens as in ``PruneStats``, the region.
    """

    region: Region  # given, or what the localizer returned
    tokens: Tokens
    drawing: tuple[VisionLayout, PoolPlan | None, torch.Tensor, Region]


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer and what it took.

    Args:
        text: decoded, without special tokens and thoughts; thoughts that did not end within the tokens, as they are.
        images: in the order of the question's.
        seconds: time of each stage in ``STAGES``. The vision tower counts as "vision", also where the localizer ran it,
            and the processor, which the localizer does not run again, as "preprocess";
            "prefill" is the language model's, pooling and scoring included; "decode" the rest of generate().
    """

    text: str
    images: list[Seen]
    seconds: dict[str, float]

    @property
    def region(self) -> Region:
        """Of the first image."""
        return self.images[0].region

    @property
    def tokens(self) -> Tokens:
        """Of all images together."""
        counts = [vars(image.tokens) for image in self.images]
        return Tokens(**{name: sum(count[name] for count in counts) for name in counts[0]})


@dataclass(frozen=True, eq=False)
class Asker:
    """A model that is ready to be asked."""

    model: nn.Module  # in evaluation mode, on its device
    processor: Any  # its processor
    prompt: Callable[[str], str] | None = None  # question -> full text; None: the processor's chat template
    head: Path | None = None  # file of the weights for the "head" localizer, where there are some for this model

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        return len(family_of(self.model).language_model(self.model).layers)

    @property
    def default_localizer(self) -> str:
        """Name of the one to begin with."""
        return "attention" if self.head is None else "head"

    def localizer(
        self, name: str, region: Region | None = None, *, path: str | Path | None = None, **more: Any
    ) -> Localizer:
        """A localizer by name; ``path`` and ``more`` (``layer``, ``min_confidence``, ``coarse``) as for ``get_localizer``."""
        if path is None and name in ("head", "cascade", "union"):
            path = self.head
        own = {"model": self.model, "processor": self.processor, "prompt": self.prompt}
        return get_localizer(name, region=region, path=path, **own, **more)

    def encode_batch(self, images: Sequence[Sequence[Image]], questions: Sequence[str]) -> Any:
        """Model inputs of several questions, each with its RGB images, on the CPU, padded on the left.

        Raises:
            ValueError: no prompt, and the processor has no chat template.
        """
        if self.prompt is not None:
            texts = [self.prompt(question) for question in questions]
        elif getattr(self.processor, "chat_template", None):
            texts = [chat(self.processor, question, len(row)) for row, question in zip(images, questions, strict=True)]
        else:
            raise ValueError("encode_batch: prompt must be given for a processor without a chat template, got None")
        return self.encode_texts(images, texts)

    def encode_texts(self, images: Sequence[Sequence[Image]], texts: Sequence[str]) -> Any:
        """As ``encode_batch``, for texts that the chat template made already."""
        self.processor.tokenizer.padding_side = "left"
        pictures = [list(row) for row in images] if any(len(row) for row in images) else None
        once = begin_once(self.processor, texts[0])
        return self.processor(images=pictures, text=list(texts), padding=True, return_tensors="pt", **once)

    @torch.no_grad()
    def ask(
        self,
        images: Image | Sequence[Image],
        question: str,
        *,
        method: Method | None,
        localizer: Localizer | Sequence[Localizer],
        max_new_tokens: int = 32,
    ) -> Answer:
        """Localize, prune, answer greedily.

        Args:
            images: one or several, RGB.
            question: plain text.
            method: what to prune; None prunes nothing.
            localizer: asked about every image by itself, or one per image; its time is part of the total.
            max_new_tokens: length of the answer at most.
        Raises:
            ValueError: several images and a prompt that takes one.
        """
        model, pictures = self.model, list(images) if isinstance(images, Sequence) else [images]
        localizers = list(localizer) if isinstance(localizer, Sequence) else [localizer] * len(pictures)
        if self.prompt is not None and len(pictures) > 1:
            raise ValueError(f"ask: images must be one for a model with a prompt of its own, got {len(pictures)}")
        with cache_vision(model) as vision:
            times = [time.perf_counter()]
            if len(pictures) == 1:
                inputs = encode(self.processor, pictures[0], question, self.prompt)
            else:
                inputs = self.encode_batch([pictures], [question])
            inputs = inputs.to(model.device, dtype=model.dtype)
            times.append(time.perf_counter())
            regions = [find(image, question) for find, image in zip(localizers, pictures, strict=True)]
            times.append(time.perf_counter())
            seen = vision.seconds  # by the localizer
            sizes = [image.size for image in pictures]
            with patch(model, method, regions, processor=self.processor, image_size=sizes) as stats:
                output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
            times.append(time.perf_counter())
        encoded, localized, generated = (stop - start for start, stop in pairwise(times))
        spent, total = stats.seconds, localized + encoded + generated
        seconds = {
            "localizer": localized - seen,
            "preprocess": encoded,
            "plan": spent["plan"],
            "vision": seen + spent["vision"],
            "prefill": spent["language_model"],
        }
        seconds |= {"decode": total - sum(seconds.values()), "total": total}
        counts = stats.tokens_before, stats.tokens_encoded, stats.tokens_after_plc, stats.tokens_after_ilp
        tokens = map(Tokens, *counts, stats.layer_average)
        drawings = zip(stats.layouts, stats.plans, stats.kept, regions, strict=True)
        thoughts, text = split_thoughts(self.processor, new)
        text = (thoughts if text is None else text).strip()
        return Answer(text, list(map(Seen, regions, tokens, drawings)), seconds)

    def compare(
        self,
        images: Image | Sequence[Image],
        question: str,
        *,
        method: Method | None,
        localizer: Localizer | Sequence[Localizer],
        max_new_tokens: int = 32,
    ) -> tuple[Answer, Answer]:
        """Answers with and without pruning, both warmed up first, so that the times are fair; arguments as for ``ask``."""
        for warm_up in (method, None):
            self.ask(images, question, method=warm_up, localizer=localizer, max_new_tokens=1)
        pruned = self.ask(images, question, method=method, localizer=localizer, max_new_tokens=max_new_tokens)
        whole = WholeLocalizer()
        return pruned, self.ask(images, question, method=None, localizer=whole, max_new_tokens=max_new_tokens)


def load_chosen(options: argparse.Namespace) -> Asker:
    """The model that the user chose by ``add_model_options``; UsageError: as ``load``, or no such device."""
    given = {name: getattr(options, name) for name in ("device_map", "attn_implementation", "trust_remote_code")}
    how = {name: value for name, value in given.items() if value}
    device = "cpu" if options.device_map else choose_device(options.device)
    return load(options.model, device, options.dtype, **how)


def load(name: str, device: str, dtype: str, **how: Any) -> Asker:
    """A model of a supported family by name.

    Args:
        name: "embedded", a folder, or the name of a model on the Hugging Face hub (downloaded by transformers if it is
            not in its cache).
        device: e.g. "cpu", "cuda"; not read with ``device_map``.
        dtype: "auto" (float32 for the embedded model, else as stored), "float32", "bfloat16" or "float16".
        how: further arguments of ``from_pretrained``; the embedded model takes none. ``device_map``, e.g. "auto", lets
            accelerate place the parts; ``attn_implementation``, e.g. "sdpa", "eager", "flash_attention_2";
            ``trust_remote_code``, run code that comes with the model, without which nothing of that kind runs or asks.
    Raises:
        UsageError: nothing to load there, damaged files, an unknown family.
    """
    if name != EMBEDDED:
        return Asker(*_pretrained(name, device, dtype, **how))
    if how:
        raise UsageError(f"model 'embedded' must be loaded without {', '.join(how)}: these are for other models")
    from crop import embedded

    precision = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    try:
        model, processor = embedded.load(device, precision)
    except FileNotFoundError as error:
        raise UsageError(f"the embedded model is not installed: {error}") from error
    return Asker(model, processor, embedded.prompt, embedded.HEAD)


def _pretrained(
    name: str, device: str, dtype: str, *, trust_remote_code: bool = False, **how: Any
) -> tuple[nn.Module, Any]:
    """Model and processor, see ``load``."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    try:
        model_source("load", name)
        trust = {"trust_remote_code": trust_remote_code}
        family = AutoConfig.from_pretrained(name, **trust).model_type
        if family not in families():
            known = ", ".join(sorted(families()))
            raise UsageError(f"model {name!r} must be of a family among {known}, got {family!r}")
        processor = AutoProcessor.from_pretrained(name, **trust)  # quick: first what may be missing
        how |= {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        model, report = AutoModelForImageTextToText.from_pretrained(
            name, **how, **trust, ignore_mismatched_sizes=True, output_loading_info=True
        )
        if report["mismatched_keys"]:
            key, stored, wanted = sorted(report["mismatched_keys"])[0]
            raise UsageError(
                f"model {name!r} cannot be loaded: {key} must have shape {tuple(wanted)} by its configuration, "
                f"got {tuple(stored)}"
            )
    except FileNotFoundError as error:
        raise UsageError(f"model {str(error).removeprefix('load: path ')}") from error
    except UsageError:
        raise
    except Exception as error:  # readers of damaged files raise anything
        text = damage(name) or explain(error)
        if "trust_remote_code" in text:
            text += " On the command line that is --trust-remote-code."
        raise UsageError(f"model {name!r} cannot be loaded: {text}") from error
    if not getattr(processor, "chat_template", None):
        raise UsageError(f"model {name!r} must come with a chat template, got a processor without")
    return (model if "device_map" in how else model.to(device)).eval(), processor
