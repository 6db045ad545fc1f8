"""Pruned models for lmms-eval: its tasks and tables, with a method of this package around every answer.

    pip install "crop-vlm[eval]"
    python -m lmms_eval --model crop --tasks gqa,pope --batch_size auto \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=crop,keep=0.11,localizer=attention

The model registers itself through an entry point. Imported by lmms-eval only. ``README.md`` beside this file has a command
for each published table.
"""

from __future__ import annotations

import inspect
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from crop.cli.ask import load
from crop.cli.options import load_plugin
from crop.cli.thoughts import THINK, THOUGHT, split_thoughts
from crop.integrations.conversation import (
    Prompt,
    chat_arguments,
    cut_answer,
    next_round,
    read_messages,
    user_turn,
)
from crop.integrations.generation import (
    FirstToken,
    Forced,
    continuation_ids,
    generation,
    limit_pixels,
    positive,
    until_end,
)
from crop.localizers.base import WholeLocalizer, template_reads
from crop.localizers.registry import COARSE
from crop.localizers.vision_cache import cache_vision
from crop.methods.registry import by_name
from crop.patching.patch import patch

NAME = "crop"
MAX_BATCH = 64  # where batch_size=auto begins
MAX_ROUNDS = 100


def manifest() -> Any:
    """What lmms-eval's registry asks the entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    where = "crop.integrations.lmms_eval"
    return ModelManifest(NAME, simple_class_path=f"{where}.SimpleCropModel", chat_class_path=f"{where}.CropModel")


@dataclass
class PrunedCounts(TokenCounts):
    """What one answer took; lmms-eval writes it beside the sample.

    Args:
        vision_tokens: before pruning; ``input_tokens`` counts them whole, too.
        vision_tokens_kept: in the last decoder layer.
        vision_tokens_average: over the decoder layers.
        time_to_first_token: seconds from the opened pictures to the first new token, processor and localizer included;
            in a batch that of the batch.
    """

    vision_tokens: int = 0
    vision_tokens_kept: int = 0
    vision_tokens_average: float = 0.0
    time_to_first_token: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            name: value for name, value in vars(self).items() if name not in TokenCounts.__dataclass_fields__
        }


@dataclass(frozen=True, eq=False)
class _Job:
    """A request, or one round of it: its prompt, read when its turn comes; what ``until`` and ``generate()`` get to know.

    ``continuation``: the text to score in the place of an answer.
    """

    read: Callable[[], Prompt]
    length: int
    options: Mapping[str, Any]
    continuation: str | None = None


@dataclass(frozen=True, eq=False)
class _Reply:
    text: str
    counts: PrunedCounts
    loss: tuple[float, bool] = (0.0, True)


class CropModel(lmms):
    """A Hugging Face model whose vision tokens are pruned while it answers.

    Args:
        pretrained: folder or hub name, or "embedded".
        method, keep: see ``crop.by_name``; "none" is the unpruned model and asks no localizer. prune_encoder: its ``encoder``;
            "attention" and "head" then look at small copies.
        localizer: name of a localizer, asked about every image of a request by itself; "whole" for methods that look at
            no region. localizer_model, min_confidence: as ``path`` and ``min_confidence`` of ``crop.get_localizer``.
        plugin: file or module that registers methods or localizers of your own.
        device: of the model; with several processes each takes its own GPU. device_map: e.g. "auto", one model over
            several GPUs. dtype, attn_implementation, trust_remote_code: as in transformers.
        batch_size: questions at once, or "auto": ``max_batch_size`` (64), halved as long as memory does not suffice.
        min_pixels, max_pixels: of a picture as the model sees it, for processors that know them (Qwen-VL).
        enable_thinking: for chat templates that know it.
    Raises:
        ValueError: an unknown option, method or localizer; an option that the model has no use for.
        UsageError: no such model or plug-in.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "embedded",
        method: str = "crop",
        keep: float = 0.11,
        localizer: str = "attention",
        localizer_model: str | None = None,
        min_confidence: float | None = None,
        prune_encoder: bool = False,
        plugin: str | None = None,
        device: str = "cuda" if torch.cuda.is_available() else "cpu",
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        enable_thinking: bool | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = ", ".join(name for name in inspect.signature(CropModel).parameters if name != "unknown")
            raise ValueError(f"crop: options must be among {known}, got {', '.join(sorted(unknown))}")
        super().__init__()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self._world_size > 1:
            if device_map is not None:
                raise ValueError(f"crop: device_map must be left out with several processes, got {device_map!r}")
            device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
        self.auto_batch = batch_size == "auto"
        name = "max_batch_size" if self.auto_batch else "batch_size (or auto)"
        self.batch_size = positive(name, (max_batch_size or MAX_BATCH) if self.auto_batch else batch_size)
        self.batch_sizes: dict[str, int] = {}  # kind of request -> what "auto" came to; lmms-eval writes it down
        if plugin is not None:
            load_plugin(plugin)
        given = {"device_map": device_map, "attn_implementation": attn_implementation}
        given |= {"trust_remote_code": trust_remote_code}
        how = {name: value for name, value in given.items() if value is not None}
        self.asker = load(pretrained, device, dtype, **how)
        limit_pixels(self.asker.processor, min_pixels=min_pixels, max_pixels=max_pixels)
        self.template = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        for name in self.template:
            if not template_reads(self.asker.processor, name):
                raise ValueError(f"crop: {name} must be left out for {pretrained}: its chat template does not read it")
        self.method = by_name(method, float(keep), self.asker.num_layers, encoder=prune_encoder)
        asked = {"path": localizer_model, "min_confidence": min_confidence}
        asked["coarse"] = 4 if prune_encoder and localizer in COARSE else 1
        self.localizer = WholeLocalizer() if self.method is None else self.asker.localizer(localizer, **asked)

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts what processes tell each other."""
        return self.asker.model.device

    def clean(self) -> None:
        """Give the memory back; lmms-eval calls it before a judge is loaded."""
        del self.asker, self.localizer
        super().clean()

    # ------------------------------------------------------------------------------------------- what lmms-eval calls
    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answers in the order of the requests."""
        jobs = []
        for request in requests:
            context, to_messages, options, document, task, split = self._arguments(request)
            read = partial(self._read, to_messages, document, task, split)
            jobs.append(_Job(read, len(context), options))
        replies = self._run("generate_until", jobs)
        for request, reply in zip(requests, replies, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], reply.text)
        return [GenerationResult(reply.text, reply.counts) for reply in replies]

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """Answers of every round, in the order of the requests; a batch goes through the rounds together.

        Raises:
            RuntimeError: a task without an end.
        """
        answers: list[list[str]] = [[] for _ in requests]
        waiting = list(range(len(requests)))
        while waiting:
            running = dict.fromkeys(waiting[: self.batch_size])
            waiting = waiting[len(running) :]  # before the rounds, which can make the batch size smaller
            for turn in range(MAX_ROUNDS):
                jobs = {}
                for number, info in running.items():
                    context, to_messages, options, document, task, split = self._arguments(requests[number])
                    doc, source = self.task_dict[task][split][document], f"document {document} of {task}"
                    messages, answers[number], running[number] = next_round(
                        to_messages, doc, turn, answers[number], info
                    )
                    if messages is not None:
                        read = partial(read_messages, self.asker, messages, source, **self.template)
                        jobs[number] = _Job(read, len(context), options)
                running = {number: running[number] for number in jobs}
                if not running:
                    break
                replies = self._run("generate_until_multi_round", list(jobs.values()))
                for number, reply in zip(jobs, replies, strict=True):
                    answers[number].append(reply.text)
            else:
                raise RuntimeError(f"crop: tasks must end within {MAX_ROUNDS} rounds, got one that does not: {task}")
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[GenerationResult]:
        """(loss of the continuation, whether greedy decoding would give it), in the order of the requests.

        The loss is the mean negative log-probability of a token: tasks take the smallest. What is pruned follows from the
        prompt alone, as for an answer: the continuation is decoded, not prefilled.
        """
        jobs = []
        for request in requests:
            context, continuation, *where = request.args
            if not where:  # of the choice alone
                read = partial(read_messages, self.asker, user_turn(None, context), "a choice", **self.template)
            else:
                to_visual, document, task, split = where
                if not isinstance(continuation, str):
                    continuation = str(continuation(self.task_dict[task][split][document]))
                _, to_messages, *_ = chat_arguments((context, {}, *where))
                read = partial(self._read, to_messages, document, task, split)
            jobs.append(_Job(read, len(context) + len(continuation), {}, continuation))
        # Plain tuples become text on their way through lmms-eval 0.7.
        return [GenerationResult(reply.loss, reply.counts) for reply in self._run("loglikelihood", jobs)]

    # ------------------------------------------------------------------------------------------------------- batches
    def _arguments(self, request: Any) -> tuple:
        """(context, doc_to_messages, options, document, task, split)."""
        return request.args

    def _read(self, to_messages: Callable[[Any], Any], document: Any, task: str, split: str) -> Prompt:
        messages = to_messages(self.task_dict[task][split][document])
        return read_messages(self.asker, messages, f"document {document} of {task}", **self.template)

    def _run(self, kind: str, jobs: Sequence[_Job]) -> list[_Reply]:
        """Replies in the order of the jobs; batches are of equal options and similar length, the longest first."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, job in enumerate(jobs):
            groups[str(sorted(job.options.items(), key=str))].append(number)
        replies: dict[int, _Reply] = {}
        start = time.perf_counter()
        with tqdm(total=len(jobs), disable=self.rank != 0, desc="crop") as progress:
            for group in groups.values():
                waiting = sorted(group, key=lambda number: -jobs[number].length)
                while waiting:
                    batch = waiting[: self.batch_size]
                    found = self._try([jobs[number] for number in batch])
                    if found is not None:
                        replies |= zip(batch, found, strict=True)
                        waiting = waiting[len(batch) :]
                        progress.update(len(batch))
                    else:
                        self.batch_size = len(batch) // 2
                        clear_device_cache(garbage_collection=True)
        if self.auto_batch:
            self.batch_sizes[kind] = self.batch_size
        _log([reply.counts for reply in replies.values()], time.perf_counter() - start)
        return [replies[number] for number in range(len(jobs))]

    def _try(self, jobs: Sequence[_Job]) -> list[_Reply] | None:
        """The replies of a batch; None where it must be smaller."""
        try:
            return self._answer(jobs)
        except RuntimeError as error:
            if not self.auto_batch or len(jobs) == 1 or not should_reduce_batch_size(error):
                raise
            return None

    @torch.no_grad()
    def _answer(self, jobs: Sequence[_Job]) -> list[_Reply]:
        asker, model = self.asker, self.asker.model
        prompts = [job.read() for job in jobs]
        scored = jobs[0].continuation is not None
        if scored:
            tokenizer, pairs = asker.processor.tokenizer, zip(prompts, jobs, strict=True)
            forced = Forced([continuation_ids(tokenizer, prompt.text, job.continuation) for prompt, job in pairs])
            how: dict[str, Any] = {"logits_processor": [forced]}
            stops: list[str] = []
            settings = forced.plain(model)
        else:
            how, stops = generation(jobs[0].options)
            settings = nullcontext()
        first = FirstToken()
        with settings, cache_vision(model):
            inputs = asker.encode_texts([prompt.images for prompt in prompts], [prompt.text for prompt in prompts])
            lengths = inputs["attention_mask"].sum(1).tolist()
            inputs = inputs.to(model.device, dtype=model.dtype)
            regions = [self.localizer(image, prompt.question) for prompt in prompts for image in prompt.images]
            sizes = [image.size for prompt in prompts for image in prompt.images]
            with patch(
                model, self.method, regions or None, processor=asker.processor, image_size=sizes or None
            ) as stats:
                output = model.generate(**inputs, **how, stopping_criteria=[first])
        # An entry per image and copy of its sample: beam search repeats every sample, with all of its images.
        copies = len(stats.tokens_before) // len(sizes) if sizes else 1
        replies, entry = [], 0
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            mine = slice(entry, entry + len(prompt.images))
            entry += copies * len(prompt.images)
            counts = PrunedCounts(
                input_tokens=lengths[number],
                vision_tokens=sum(stats.tokens_before[mine]),
                vision_tokens_kept=sum(stats.tokens_after_ilp[mine]),
                vision_tokens_average=sum(stats.layer_average[mine]),
                time_to_first_token=first.seconds,
            )
            if scored:
                counts.output_tokens = len(forced.rows[number])
                replies.append(_Reply(jobs[number].continuation, counts, forced.losses[number]))
            else:
                replies.append(self._reply(prompt, until_end(row, model.generation_config.eos_token_id), stops, counts))
        return replies

    def _reply(self, prompt: Prompt, ids: list[int], stops: Sequence[str], counts: PrunedCounts) -> _Reply:
        """The answer, up to the first of the stops; a thought, in which none of them counts, in the tags lmms-eval knows."""
        asker, counts.output_tokens = self.asker, len(ids)
        thoughts, answer = split_thoughts(asker.processor, ids, prompt.text.rstrip().endswith(THINK))
        if answer is None:
            return _Reply(thoughts.strip(), counts)
        text = cut_answer(answer.strip(), stops)
        if thoughts:
            written = asker.processor.tokenizer(thoughts + THOUGHT, add_special_tokens=False)
            counts.reasoning_tokens, text = len(written.input_ids), f"{THINK}{thoughts}{THOUGHT}{text}"
        return _Reply(text, counts)


class SimpleCropModel(CropModel):
    """The same for tasks in lmms-eval's older form (``--force_simple``), which those that score continuations must have."""

    is_simple = True

    def _arguments(self, request: Any) -> tuple:
        return chat_arguments(request.args)


def _log(counts: Sequence[PrunedCounts], seconds: float) -> None:
    """Means over the samples, for the "throughput" of lmms-eval's results."""
    from lmms_eval.models.model_utils.gen_metrics import log_metrics  # whose package imports this file

    made = sum(count.output_tokens for count in counts)
    means = {
        name: sum(getattr(count, name) for count in counts) / max(len(counts), 1)
        for name in PrunedCounts.__annotations__
    }
    log_metrics(seconds, made, made / seconds, means | {"num_requests": len(counts)})
