"""Pruned models for lmms-eval: its tasks and tables, with a method of this package around every answer.

    pip install "crop-vlm[eval]"
    python -m lmms_eval --model crop --tasks gqa,mme --batch_size 8 \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=crop,keep=0.11,localizer=attention

The model registers itself through an entry point. Imported by lmms-eval only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from crop.cli.ask import load
from crop.cli.images import open_image
from crop.cli.options import load_plugin
from crop.geometry.region import Region
from crop.methods.registry import by_name
from crop.patching.patch import patch

NAME = "crop"


def manifest() -> Any:
    """What lmms-eval's registry asks the entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path="crop.integrations.lmms_eval.CropModel")


class CropModel(lmms):
    """A Hugging Face model whose vision tokens are pruned while it answers; greedy, batched.

    Args:
        pretrained: folder or hub name, or "embedded". method, keep: see ``crop.by_name``.
        localizer: name of a localizer; "whole" for methods that look at no region.
        plugin: file or module that registers methods or localizers of your own.
        device, dtype: of the model. batch_size: questions at once.
    Raises:
        ValueError: unknown method or localizer. UsageError: no such model or plug-in.
    """

    def __init__(
        self,
        pretrained: str = "embedded",
        method: str = "crop",
        keep: float = 0.11,
        localizer: str = "attention",
        device: str = "cuda" if torch.cuda.is_available() else "cpu",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        plugin: str | None = None,
    ) -> None:
        super().__init__()
        if plugin is not None:
            load_plugin(plugin)
        self.asker = load(pretrained, device, dtype)
        self.method = by_name(method, float(keep), self.asker.num_layers)
        self.localizer = self.asker.localizer(localizer)
        self.batch_size = int(batch_size)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests."""
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="crop") as progress:
            for options, batch in self._batches(requests):
                for number, text in zip(batch, self._answer([requests[n] for n in batch], options), strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args[:2], text)
                progress.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def _batches(self, requests: list[Any]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Requests of equal generation options, up to ``batch_size`` of them."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[str(sorted(request.args[1].items(), key=str))].append(number)
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                yield requests[members[start]].args[1], members[start : start + self.batch_size]

    def _images(self, request: Any) -> list[Any]:
        _, _, to_visual, doc, task, split = request.args
        images = to_visual(self.task_dict[task][split][doc])
        if any(not hasattr(image, "convert") for image in images):
            kinds = {type(image).__name__ for image in images}
            raise ValueError(f"crop: visuals must be images, got {', '.join(sorted(kinds))}")
        return [open_image(image) for image in images]

    @torch.no_grad()
    def _answer(self, requests: list[Any], options: dict[str, Any]) -> list[str]:
        asker, model = self.asker, self.asker.model
        texts = [request.args[0].replace("<image>", "").strip() for request in requests]
        images = [self._images(request) for request in requests]
        regions = [
            self.localizer(image, text) if len(row) == 1 else Region.whole()
            for row, text in zip(images, texts, strict=True)
            for image in row
        ]
        inputs = asker.encode_batch(images, texts).to(model.device, dtype=model.dtype)
        sizes = [image.size for row in images for image in row]
        length = int(options.get("max_new_tokens", 32))
        with patch(model, self.method, regions, processor=asker.processor, image_size=sizes or None):
            output = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        found = [asker.tidy(text) for text in asker.processor.batch_decode(new, skip_special_tokens=True)]
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            found = [text.split(stop)[0] if stop else text for text in found]
        return [text.strip() for text in found]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused: pruning needs a question, and these tasks score continuations."""
        raise NotImplementedError("crop: tasks must generate answers, got one that asks for likelihoods")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refused: one question, one answer."""
        raise NotImplementedError("crop: tasks must have one round, got one with several")
