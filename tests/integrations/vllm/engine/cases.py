"""Requests to an engine, and what `crop.patch` answers to them on the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

import crop
from tests.integrations.vllm.engine.models import MODELS

STEPS = 6
BOX = [0.1, 0.2, 0.55, 0.7]
OTHER = [0.6, 0.0, 1.0, 0.45]
TWO = [[0.0, 0.0, 0.3, 0.4], [0.5, 0.5, 0.9, 1.0]]


@dataclass(frozen=True)
class Case:
    """``regions``: per image None, a box or boxes; ``keep`` None: the request brings none."""

    images: int
    regions: Sequence[Any] | None = None
    keep: float | int | None = None
    mode: str | None = None

    @property
    def wishes(self) -> dict[str, Any]:
        """As a client sends them."""
        found = {"crop_region": self.regions, "crop_keep": self.keep, "crop_mode": self.mode}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def method(self) -> crop.PreLLMCompression | None:
        """For `crop.patch`."""
        if self.regions is None and self.keep is None:
            return None
        return crop.PreLLMCompression(keep=0.33 if self.keep is None else self.keep, mode=self.mode or "distinct")

    @property
    def region(self) -> list[crop.Region | None]:
        """One per image."""
        given = self.regions or [None] * self.images
        return [
            None if one is None else crop.Region(tuple(map(tuple, [one] if np.ndim(one) == 1 else one)))
            for one in given
        ]


CASES = (
    Case(1),
    *(Case(1, [BOX], keep) for keep in (0.11, 0.25, None)),
    Case(1, [TWO], 0.25),
    Case(1, [TWO], 0.25, "mean"),
    Case(1, [OTHER], 0.2, "max"),
    Case(1, None, 0.2),
    Case(1, [[0.0, 0.0, 1.0, 1.0]], 0.11),
    Case(1, [BOX], 7),
    Case(1, [BOX], 1.0),
    Case(2),
    Case(2, [BOX, OTHER], 0.11),
    Case(2, [None, TWO], 0.25),
    Case(2, [OTHER, BOX], 0.11),
    Case(3, [BOX, None, OTHER], 0.2),
    Case(3, None, 0.11),
)


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Coarse blocks of random colours: tokens differ, and survive a resize."""
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def prompt_of(name: str, case: Case) -> tuple[str, list[Image.Image]]:
    """Text with placeholders, and pictures of different shapes."""
    family = MODELS[name]
    width, height = family.size
    sizes = [(width, height), (height, width), (width, width)]
    parts = ["w3 w14"]
    for number in range(case.images):
        parts += [family.image, f"w{15 + number} w{40 + number}"]
    parts.append("w5 w35 w8 w9")
    return " ".join(parts), [picture(sizes[number], number) for number in range(case.images)]


@torch.no_grad()
def answer(model: Any, processor: Any, text: str, images: Any, case: Case, positions: str = "original") -> tuple:
    """By transformers, patched: greedy tokens, their log-probabilities, and those of all words at each step."""
    inputs = processor(text=text, images=images, return_tensors="pt").to(dtype=model.dtype)
    sizes = [image.size for image in images]
    with crop.patch(model, case.method, case.region, processor=processor, image_size=sizes, positions=positions):
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=None,
        )  # fmt: skip
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    rows = [row[0].float().log_softmax(-1) for row in out.logits]
    return tokens, [float(row[token]) for row, token in zip(rows, tokens, strict=True)], rows


def request_of(name: str, case: Case) -> dict[str, Any]:
    """For ``LLM.generate``."""
    text, images = prompt_of(name, case)
    return {"prompt": text, "multi_modal_data": {"image": images}, "mm_processor_kwargs": case.wishes}


def ask(llm: Any, requests: Sequence[dict[str, Any]]) -> list[tuple]:
    """(tokens, log-probabilities, length of the prompt, cached tokens) of each."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=0, ignore_eos=True)
    found = []
    for out in llm.generate(list(requests), how, use_tqdm=False):
        tokens = list(out.outputs[0].token_ids)
        logs = [step[token].logprob for step, token in zip(out.outputs[0].logprobs, tokens, strict=True)]
        found.append((tokens, logs, len(out.prompt_token_ids), out.num_cached_tokens))
    return found


def start(folder: Any, **options: Any) -> Any:
    """An engine on the CPU, in this process."""
    from vllm import LLM

    defaults = dict(
        dtype="float32", enforce_eager=True, max_model_len=1024, block_size=32, max_num_seqs=8, seed=0,
        limit_mm_per_prompt={"image": 3}, disable_log_stats=True,
    )  # fmt: skip
    return LLM(str(folder), **(defaults | options))


def compare(got: tuple, wanted: tuple, tolerance: float = 1e-4) -> str:
    """Empty where an answer is the wanted one; else what differs. Where rounding decides between two words either will do,
    and what follows is another sentence."""
    for step, (token, want) in enumerate(zip(got[0], wanted[0], strict=True)):
        if token != want:
            if len(wanted) > 2 and wanted[1][step] - float(wanted[2][step][token]) <= tolerance:
                return ""
            return f"tokens {got[0]} instead of {wanted[0]}"
        apart = abs(got[1][step] - wanted[1][step])
        if apart > tolerance:
            return f"log-probabilities {apart:.1e} apart"
    return ""


def rounding(one: tuple, other: tuple) -> float:
    """How far the log-probabilities of two answers are apart, as long as they are the same words."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one[0], other[0], strict=True))
    return max((abs(one[1][step] - other[1][step]) for step, _ in enumerate(same)), default=0.0)
