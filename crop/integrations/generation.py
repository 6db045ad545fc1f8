"""Options of benchmarks and users as transformers takes them, and what watches over ``generate()``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

MAX_NEW_TOKENS = 1024  # where a task does not say, as lmms-eval's own LLaVA
PASSED_ON = ("max_new_tokens", "top_p", "top_k", "num_beams", "repetition_penalty")
KNOWN = (*PASSED_ON, "temperature", "do_sample", "until", "stop_sequences")
OF_OTHERS = (
    "image_aspect_ratio",
    "seed",
    "skip_special_tokens",
)  # tasks give them to every model; one or the other reads them


def generation(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of ``generate()``, and the strings that end an answer, from a task's ``generation_kwargs``.

    It samples where the temperature is above 0 and ``do_sample`` is not false.

    Raises:
        ValueError: an option that nobody knows.
    """
    unknown = sorted(options.keys() - {*KNOWN, *OF_OTHERS})
    if unknown:
        raise ValueError(f"crop: generation options must be among {', '.join(KNOWN)}, got {', '.join(unknown)}")
    how = {name: options[name] for name in PASSED_ON if options.get(name) is not None}
    how.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    temperature = options.get("temperature")
    if temperature is None:
        temperature = 1.0 if options.get("do_sample") else 0.0
    how["do_sample"] = temperature > 0 and options.get("do_sample") is not False
    if how["do_sample"]:
        how["temperature"] = float(temperature)
    else:  # of no use, and of none of the model's own defaults either
        how |= {"temperature": None, "top_p": None, "top_k": None}
    stops = options.get("until") or options.get("stop_sequences") or []
    return how, [stops] if isinstance(stops, str) else list(stops)


def positive(name: str, value: Any) -> int:
    """A whole number of at least 1, also from text. ValueError: it is none."""
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"crop: {name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def limit_pixels(processor: Any, **limits: int | None) -> None:
    """Set ``min_pixels`` and ``max_pixels`` of a processor, where given. ValueError: its pictures know no such limits."""
    given = {name: positive(name, value) for name, value in limits.items() if value is not None}
    if not given:
        return
    pictures = processor.image_processor
    known = getattr(pictures, "valid_kwargs", None)
    if not given.keys() <= getattr(known, "__annotations__", {}).keys():
        kind = type(pictures).__name__
        raise ValueError(f"crop: {', '.join(given)} must be left out for a {kind}, which does not know them")
    processor.image_processor = type(pictures).from_dict(pictures.to_dict(), **given)


def until_end(ids: Sequence[int], end: int | Sequence[int] | None) -> list[int]:
    """Generated ids up to the first that ends an answer, itself included; behind it a batch is padded."""
    ends = {end} if isinstance(end, int) else set(end or ())
    stop = next((number for number, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[: stop + 1])


def continuation_ids(tokenizer: Any, text: str, continuation: str) -> list[int]:
    """Token ids of a continuation, as the tokenizer splits it behind the text; where it joins the two, alone."""
    whole, context = tokenizer(text + continuation).input_ids, tokenizer(text).input_ids
    if whole[: len(context)] == context:
        return whole[len(context) :]
    return tokenizer(continuation, add_special_tokens=False).input_ids


class FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first new token is known to the host.

    Attributes:
        seconds: from the making of this object to then.
    """

    def __init__(self) -> None:
        self.start, self.seconds = time.perf_counter(), 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self.seconds:
            input_ids[:, -1].tolist()  # waits for the device
            self.seconds = time.perf_counter() - self.start
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Forced(LogitsProcessor):
    """Makes ``generate()`` write given tokens, one row per sample, and scores them on the way.

    Attributes:
        rows: the token ids of each sample; behind its end a row repeats token 0.
    """

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.step = rows, 0
        self._scores: list[Tensor] = []  # per step (batch,) float32: log-probability, then whether it is the likeliest
        self._likeliest: list[Tensor] = []

    @contextmanager
    def plain(self, model: nn.Module) -> Iterator[None]:
        """Inside the block ``generate()`` is greedy over the longest row: no penalty of the model's own, no early end.

        A configuration given to ``generate()`` would not do: what it leaves out comes from ``model.generation_config``.
        """
        own, length = model.generation_config, max(1, *map(len, self.rows))
        model.generation_config = GenerationConfig(max_new_tokens=length, do_sample=False, pad_token_id=0)
        try:
            yield
        finally:
            model.generation_config = own

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = self.step
        wanted = torch.tensor([row[step] if step < len(row) else 0 for row in self.rows], device=scores.device)[:, None]
        self._scores.append(scores.float().log_softmax(-1).gather(1, wanted)[:, 0])
        self._likeliest.append(scores.argmax(-1) == wanted[:, 0])
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)

    @property
    def losses(self) -> list[tuple[float, bool]]:
        """(mean negative log-probability of the row's tokens, whether greedy decoding gives it) of each sample.

        Raises:
            RuntimeError: fewer steps than tokens of the longest row.
        """
        longest = max(map(len, self.rows))
        if self.step < longest:
            raise RuntimeError(
                f"Forced: generate() must take {longest} steps, got {self.step}; run it inside of ``plain``"
            )
        found, likeliest = torch.stack(self._scores, 1).tolist(), torch.stack(self._likeliest, 1).tolist()
        return [
            (-sum(found[number][: len(row)]) / max(len(row), 1), all(likeliest[number][: len(row)]))
            for number, row in enumerate(self.rows)
        ]
