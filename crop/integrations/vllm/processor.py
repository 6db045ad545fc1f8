"""In the front process: which tokens of a request's images stay, and what its pictures are called in vLLM's caches."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from crop.geometry.region import Region
from crop.integrations.vllm.planning import locate, plan_image, whole_placeholder
from crop.integrations.vllm.plans import FIELD, FORMAT, PlaceholderPlan, digest
from crop.integrations.vllm.positions import check_reach, check_windows
from crop.integrations.vllm.request import LONGEST_QUESTION, ImageRequest, Request, own_keys, parse, without_own
from crop.integrations.vllm.settings import Settings
from crop.models import families

logger = logging.getLogger("vllm.crop")
TASK = "crop_task"


@dataclass(frozen=True)
class Task:
    """A located request on its way through the processor, in the place of the client's own arguments.

    Args:
        hashes: vLLM's names of everything that was sent, whatever is done to it, by modality.
        images: (name of the picture, what to do with it) of each image.
    """

    hashes: Mapping[str, list[str]]
    images: tuple[tuple[str, ImageRequest | None], ...]


@dataclass
class PrunedContent(PromptUpdateDetails):
    """A placeholder that knows how many tokens were taken out of it, also when it comes from the processor's cache."""

    lost: int = 0


def refused(error: ValueError) -> VLLMValidationError:
    """As vLLM tells a client: status 400."""
    return VLLMValidationError(str(error), parameter="mm_processor_kwargs")


class PruningProcessor:
    """Stands before a family's ``BaseMultiModalProcessor``."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Check the request, find regions, then go on with a ``Task`` in the place of its ``crop_...`` arguments."""
        plain = replace(inputs, hf_processor_mm_kwargs=without_own(inputs.hf_processor_mm_kwargs))
        images = inputs.mm_data_items.get("image", [])
        try:
            request = parse(inputs.hf_processor_mm_kwargs, len(images), Settings.of(self.info.get_hf_config()))
            if any(request.images) and not isinstance(images, ImageProcessorItems):
                raise ValueError("crop: images must be pictures to be pruned, got embeddings of an encoder")
            if request.localizer is not None:
                with timing_ctx.record("crop_localizer"):
                    request = self._located(request, images, inputs.prompt)
        except ValueError as error:
            raise refused(error) from error
        hashes = super()._get_mm_hashes(plain)
        task = Task(hashes, tuple(zip(hashes.get("image", []), request.images, strict=True)))
        return super().apply(
            replace(plain, hf_processor_mm_kwargs={**plain.hf_processor_mm_kwargs, TASK: task}), timing_ctx
        )

    def _located(self, request: Request, images: ImageProcessorItems, prompt: list[int]) -> Request:
        text = request.question or self.info.get_tokenizer().decode(prompt, skip_special_tokens=True)
        start = time.perf_counter()

        def find(number: int) -> Region:
            image = images.get(number)
            if not isinstance(image, Image.Image):
                got = type(image).__name__
                raise ValueError(f"crop: images must be sent as pictures for a localizer, got {got}")
            # As the model sees it, without what a file may say of its orientation.
            picture = Image.fromarray(np.asarray(image.convert("RGB")))
            return locate(request.localizer, picture, text[-LONGEST_QUESTION:])

        found = request.located(find)
        spent = (time.perf_counter() - start) * 1e3
        logger.info("crop: localizer %s took %.0f ms for %d images", request.localizer, spent, len(images))
        return found

    # -------------------------------------------------------------------------------------- names in caches
    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Of a pruned image: the picture's and what is done to it."""
        task: Task = inputs.hf_processor_mm_kwargs[TASK]
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        names = [
            name
            if request is None
            else MultiModalHasher.hash_kwargs(algorithm, image=name, crop=f"{FORMAT} {request.identity}")
            for name, request in task.images
        ]
        return {**task.hashes, "image": names} if names else dict(task.hashes)

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> dict[str, Any]:
        """Of the images, only those that are processed now."""
        arguments = dict(super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached))
        task, cached = arguments[TASK], mm_is_cached.get("image", [])
        left = tuple(image for image, known in zip(task.images, cached, strict=True) if not known)
        return {**arguments, TASK: replace(task, images=left)}

    # -------------------------------------------------------------------------------------- plans
    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        own = without_own(hf_kwargs)
        data = super()._apply_hf_processor_main(mm_items, own)
        images: tuple = hf_kwargs[TASK].images
        if images and isinstance(mm_items["image"], ImageProcessorItems):
            data[FIELD] = self._plans(mm_items, own, data, images)
        return data

    def _plans(self, mm_items: Any, own: dict[str, Any], data: Any, images: tuple) -> list[torch.Tensor]:
        """Packed, one per image, also of those that stay whole: vLLM batches images that have the same fields."""
        items = MultiModalKwargsItems.from_hf_inputs(data, super()._get_mm_fields_config(data, own))
        updates = super()._get_prompt_updates(mm_items, own, items)
        contents = self._bind_and_group_updates(updates, mm_items.get_all_counts())["image"]
        config, settings = self.info.get_hf_config(), Settings.of(self.info.get_hf_config())
        processor = self.info.get_hf_processor(**own).image_processor
        each = {name: value for name, value in data.items() if hasattr(value, "__len__")}
        found = []
        for number, ((name, request), (update, *_)) in enumerate(zip(images, contents, strict=True)):
            ids, is_embed = whole_placeholder(update.content.full, update.content.is_embed)
            if request is None:
                found.append(PlaceholderPlan.whole(is_embed, digest(name)).pack())
                continue
            mine = {key: value[number : number + 1] for key, value in each.items() if _length(value) == len(images)}
            size = mm_items["image"].get_image_size(number)
            try:
                plan = plan_image(
                    request, config, ids, is_embed, mine, processor, (size.width, size.height), settings.positions,
                    digest(name),
                )  # fmt: skip
            except ValueError as error:
                raise refused(error) from error
            found.append(plan.pack())
        return found

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        stock = super()._get_mm_fields_config(hf_inputs, without_own(hf_processor_mm_kwargs))
        # On the CPU: positions are made from it, also where the rest of an image is left out (prefix cache).
        return {**stock, FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    # -------------------------------------------------------------------------------------- prompts
    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        """Placeholders without what is pruned."""
        updates = super()._get_prompt_updates(mm_items, without_own(hf_processor_mm_kwargs), out_mm_kwargs)
        images = out_mm_kwargs.get("image", [])
        return [self._pruned(update, images) if update.modality == "image" else update for update in updates]

    def _pruned(self, update: Any, images: Sequence[Any]) -> Any:
        def content(number: int) -> PromptUpdateDetails:
            whole = update.resolve(number).content
            if FIELD not in images[number]:
                return whole
            plan = PlaceholderPlan.unpack(images[number][FIELD].data)
            left = [whole.full[place] for place in plan.places.tolist()]
            return PrunedContent(left, whole.is_embed, plan.full - len(left))

        return PromptReplacement(modality=update.modality, target=update.target, replacement=content)

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        contents = [updates[0].content for items in mm_res.prompt_updates.values() for updates in items]
        lost = sum(content.lost for content in contents if isinstance(content, PrunedContent))
        if lost:
            config, longest = self.info.get_hf_config(), self.info.ctx.model_config.max_model_len
            text = config.get_text_config()
            try:
                check_windows(families()[config.model_type].windows(text), longest, lost)
                if Settings.of(config).positions == "original":
                    check_reach(text, longest, lost)
            except ValueError as error:
                raise refused(error) from error
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)


def _length(value: Any) -> int:
    return 0 if getattr(value, "ndim", 1) == 0 else len(value)


class RefusingProcessor:
    """Stands before the processor of a family that cannot be pruned here; requests without a wish pass."""

    reason = ""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Refuse what would be ignored."""
        if own_keys(inputs.hf_processor_mm_kwargs):
            raise refused(ValueError(f"crop: the model must be of a family that can be pruned in vLLM: {self.reason}"))
        return super().apply(inputs, timing_ctx)
