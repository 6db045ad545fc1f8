"""From what a block was asked to do, and the arguments of a call in it, to what is pruned in that call."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from crop.geometry.region import Region
from crop.methods.base import Method
from crop.models import family_of
from crop.models.family import ModelFamily, Prompt
from crop.patching.batch_plan import BatchPlan, plan_batch
from crop.patching.cache import cache_state
from crop.patching.masks import refuse_prepared, refuse_short_sight
from crop.patching.positions import POLICIES
from crop.patching.readmit import Images, Memory, all_real, recall, refuse_readmission, shift
from crop.patching.state import Run
from crop.patching.validation import (
    as_regions,
    as_sizes,
    brings_images,
    cache_of,
    check_method,
    one_of,
    one_per_image,
    real_tokens,
    refuse_attention,
    refuse_number,
    refuse_past,
    refuse_sliding_window,
    refuse_transformers,
    refuse_unsupported,
    unwrapped,
)


class Planner:
    """What was asked for, checked against the model; plans each call without running anything.

    Args and Raises: as ``patch``, whose docstring is theirs too.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | None,
        region: Region | Sequence[Region] | None,
        processor: Any,
        image_size: tuple[int, int] | Sequence[tuple[int, int]] | None,
        *,
        positions: str = "original",
        cache: str = "ragged",
        readmit: bool = False,
    ) -> None:
        refuse_transformers()
        self.model = model = unwrapped(model)
        self.adapter: ModelFamily = family_of(model)
        if method is not None and not isinstance(method, Method):
            raise TypeError(f"patch: method must be a crop Method or None, got {type(method).__name__}")
        self.method = method or Method()
        self.regions = as_regions(region)
        self.image_processor = getattr(processor, "image_processor", processor)
        self.image_sizes = as_sizes(image_size)
        self.positions = one_of("positions", positions, POLICIES)
        self.uniform = one_of("cache", cache, ("ragged", "uniform")) == "uniform"
        self.language_model = self.adapter.language_model(model)
        if self.adapter.makes_masks:
            refuse_prepared(model.config.model_type, self.language_model.config, self.positions, self.uniform)
        else:
            refuse_sliding_window(self.language_model.config)
        refuse_attention(self.language_model.config)
        check_method(self.method, len(self.language_model.layers))
        self._check_processor()
        self.readmit = readmit
        if readmit:
            refuse_readmission(self.method, self.adapter, self.positions, self.uniform)
        self.remembers = False  # the memory of the conversation is this block's own
        self.given: Mapping[str, Any] | None = None  # to generate(), while it runs
        self.copies = 1  # how often it repeats every sample

    def _check_processor(self) -> None:
        if self.adapter.check is None:
            return
        if self.image_processor is not None and not hasattr(self.image_processor, "do_resize"):
            raise TypeError(
                "patch: processor must be the model's processor or image processor, got "
                f"{type(self.image_processor).__name__} without do_resize"
            )
        whole = self.regions is None or all(entry.is_whole for entry in self.regions)
        self.adapter.check(self.model.config, self.image_processor, self.image_sizes, whole)

    def plan(
        self, arguments: Mapping[str, Any], run: Run | None = None, method: Method | None = None
    ) -> BatchPlan | None:
        """The plan of one call; None: it holds no image.

        Args:
            arguments: what the model is called with.
            run: the call, which notes what ``readmit`` needs. method: in the place of the one asked for.
        Raises:
            ValueError: as ``patch``.
        """
        input_ids = arguments["input_ids"]
        brings = brings_images(arguments, self.adapter.videos)
        ids = input_ids.cpu() if brings or self.readmit else None
        found: Images = []
        if brings and self.adapter.is_vision(self.model.config, ids).any():
            found = self._images(ids, arguments)
        if self.readmit:
            return self._plan_with_memory(ids, found, arguments, run)
        real = real_tokens(arguments, ids) if found else None
        return self._plan_images(method or self.method, ids, found, real, arguments) if found else None

    def counts(self, arguments: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
        """Real tokens and vision tokens per sample of one call; None: it holds no image."""
        if not brings_images(arguments, self.adapter.videos):
            return None
        ids = arguments["input_ids"].cpu()
        vision = self.adapter.is_vision(self.model.config, ids).sum(1).tolist()
        return (real_tokens(arguments, ids).sum(1).tolist(), vision) if any(vision) else None

    def unpruned(self, arguments: Mapping[str, Any]) -> Callable[[], BatchPlan]:
        """The plan of one call that prunes nothing, made when somebody asks. arguments: made ``light``."""
        given, copies = None if self.given is None else light(self.given), self.copies

        def plan() -> BatchPlan:
            later = copy.copy(self)
            later.readmit, later.given, later.copies = False, given, copies
            return later.plan(arguments, method=Method())

        return plan

    def refuse_number(self, arguments: Mapping[str, Any]) -> None:
        """Refuse, as ``plan`` would, a number of regions other than of images; read from shapes, where these tell it."""
        given = arguments if self.given is None else self.given
        count = sum(len(given[name]) for name in self.adapter.each if given.get(name) is not None)
        if count and self.regions is not None:
            refuse_number("region", self.regions, count * self.copies, self.copies)

    def _plan_with_memory(self, ids: Tensor, found: Images, arguments: Mapping[str, Any], run: Run) -> BatchPlan | None:
        """Plan the call, or the whole conversation when a new block goes on with it."""
        cache, layer = cache_of(arguments), self.method.cuts[0].layer
        past, real = 0 if cache is None else cache.get_seq_length(), real_tokens(arguments, ids)
        memory = recall(arguments, layer, cache_state(cache)) if past else Memory(layer, [])
        run.noted = {"images": shift(found, past)}
        anew, self.remembers = past > 0 and not self.remembers, True
        if anew and (memory.images or found):
            run.recalled = memory
            found, real = memory.images + run.noted["images"], all_real(arguments, len(ids), past + ids.shape[1])
        chunk = self._plan_images(self.method, ids, found, real, arguments) if found else None
        if chunk is not None and chunk.pool is not None:
            raise ValueError(
                "patch: readmit must be False with Pre-LLM Compression, whose cells cannot be taken apart again, got True; "
                "else give the whole conversation to a fresh cache"
            )
        return chunk

    def _images(self, ids: Tensor, arguments: Mapping[str, Any]) -> Images:
        # generate() repeats every sample for beams, but its caller gave each image once.
        given = arguments if self.given is None else self.given
        prompt = Prompt(self.model.config, ids[:: self.copies], given, self.image_processor, self.image_sizes)
        found = self.adapter.images(prompt)
        return [
            (sample * self.copies + copy, layout)
            for sample, layouts in itertools.groupby(found, key=lambda entry: entry[0])
            for copy, layout in itertools.product(range(self.copies), [layout for _, layout in layouts])
        ]

    def _plan_images(
        self, method: Method, ids: Tensor, found: Images, real: Tensor, arguments: Mapping[str, Any]
    ) -> BatchPlan:
        regions = [Region.whole()] if self.regions is None else self.regions
        regions = one_per_image("region", regions, [sample for sample, _ in found], self.copies)
        refuse_unsupported(arguments, ids, self.language_model, self.uniform)
        refuse_past(method, arguments)
        chunk = plan_batch(method, found, regions, real)
        if self.adapter.makes_masks:
            cache = cache_of(arguments)
            total = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
            scored = [layer for layer, step in chunk.steps.items() if step.rows is not None]
            refuse_short_sight(scored, self.language_model.config, total)
        return chunk


def light(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call without the cache, and True in the place of pixels and features: what tells the geometry."""
    heavy = ("pixel_values", "pixel_values_videos")
    light = {name: value for name, value in arguments.items() if name not in ("cache", "past_key_values", "streamer")}
    light |= {name: True for name in heavy if light.get(name) is not None}
    if light.get("mm_encoder_outputs"):
        light["mm_encoder_outputs"] = dict.fromkeys(light["mm_encoder_outputs"], True)
    return light
