"""From what a block was asked to do, and the arguments of a call in it, to what is pruned in that call."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from crop.geometry.pieces import Encoding
from crop.geometry.region import Region
from crop.methods.base import Method, check_choice, check_method, prunes
from crop.methods.encoding import encoding_of
from crop.models import ModelFamily, Placed, Prompt, families, family_of
from crop.patching import hf
from crop.patching.batch_plan import BatchPlan, plan_batch
from crop.patching.cache import cache_state
from crop.patching.positions import POLICIES
from crop.patching.validation import as_regions, as_sizes, one_per_image


@dataclass(frozen=True, eq=False)
class Look:
    """The images of one call; all that its plan needs, on the CPU.

    Args:
        images: (sample, layout) each, before samples are repeated.
        encodings: what the encoder gets of each, None where nothing is left out.
        valid: (samples, seq_len) bool, what is no padding, of all copies.
        past: tokens in the cache before the call.
        copies: how often every sample is repeated.
    """

    images: Placed
    encodings: list[Encoding | None]
    valid: Tensor
    past: int
    copies: int = 1

    @property
    def encoded(self) -> list[Encoding | None]:
        """``encodings``, one per image of all copies."""
        owners = [sample for sample, _ in self.images]
        return [one for _, one in _repeated(list(zip(owners, self.encodings, strict=True)), self.copies)]

    def repeated(self, copies: int) -> Look:
        """The same for so many copies of every sample."""
        return replace(self, valid=self.valid.repeat_interleave(copies, 0), copies=copies)


class Planner:
    """What was asked for, checked against the model; plans each call without running anything.

    Args and Raises: as ``patch``, whose docstring is theirs too.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | None,
        region: Region | Sequence[Region | None] | None,
        processor: Any,
        image_size: tuple[int, int] | Sequence[tuple[int, int]] | None,
        *,
        positions: str = "original",
        cache: str = "ragged",
    ) -> None:
        hf.refuse_transformers()
        self.model = model = hf.unwrapped(model)
        self.family: ModelFamily = family_of(model)
        if method is not None and not isinstance(method, Method):
            raise TypeError(f"patch: method must be a crop Method or None, got {type(method).__name__}")
        self.regions = as_regions(region)
        self.image_processor = getattr(processor, "image_processor", processor)
        self.image_sizes = as_sizes(image_size)
        check_choice("patch", "positions", positions, POLICIES)
        check_choice("patch", "cache", cache, ("ragged", "uniform"))
        self.positions, self.uniform = positions, cache == "uniform"
        self.language_model = self.family.language_model(model)
        config = self.language_model.config
        self.makes_masks = self.family.masks_input(config)
        self._carries_states = bool(self.family.recurrent_layers(config))
        self.slides = self.makes_masks and self.family.traits.mask == "causal"  # the language model makes them
        self.method = method or Method()
        self.prunes = prunes(self.method)
        self.encoder = self.family.encoder_of(model.config)
        if self.method.encodes and self.encoder is None:
            able = ", ".join(sorted(name for name, one in families().items() if one.encoder is not None))
            raise ValueError(
                "patch: a method that prunes before the encoder needs a family whose encoder takes part of a picture, one "
                f"of {able}, got {self.family.model_type!r}; leave EncoderPruning out"
            )
        if self.prunes:  # else nothing can be wrong
            self.family.check_decoder(self.language_model)
            hf.refuse_decoder(self.family, config, self.positions, self.uniform)
            self.family.check_cuts(config, [cut.layer for cut in self.method.cuts], self.uniform)
        if any(cut.layer == "auto" for cut in self.method.cuts):
            self.method = self.method.with_layer(self.family.default_layer(config))
        check_method(self.method, len(self.language_model.layers))
        self._check_processor()

    def _check_processor(self) -> None:
        if self.family.check is None:
            return
        if self.image_processor is not None and not hasattr(self.image_processor, "do_resize"):
            raise TypeError(
                "patch: processor must be the model's processor or image processor, got "
                f"{type(self.image_processor).__name__} without do_resize"
            )
        whole = self.regions is None or all(entry.is_whole for entry in self.regions)
        self.family.check(self.model.config, self.image_processor, self.image_sizes, whole)

    def plan(self, arguments: Mapping[str, Any]) -> BatchPlan | None:
        """The plan of a call, from the arguments that the multimodal model is called with; None: it holds no image.

        Raises:
            ValueError: as ``patch``.
        """
        look = self.look(arguments)
        return None if look is None else self.plan_look(look)

    def look(
        self, arguments: Mapping[str, Any], given: Mapping[str, Any] | None = None, copies: int = 1
    ) -> Look | None:
        """The images of a call; checks all that can be known before anything runs. None: it holds none.

        Args:
            arguments: what the multimodal model is called with.
            given: what the caller gave ``generate()``, where that makes the call: it repeats every sample for beams, but
                its caller gave each image once. copies: how often it repeats them.
        Raises:
            ValueError: as ``patch``.
        """
        ids = hf.token_ids(arguments)
        if ids is None and self.prunes:
            raise ValueError(
                "patch: input_ids must be given, got inputs_embeds alone: which of them are vision tokens is not known; for "
                "text use method=None"
            )
        if ids is None or not hf.brings_images(arguments, self.family.videos):
            return None
        with _on_the_host():
            ids, valid, given = hf.on_host(ids, arguments, given or arguments)
            if not self.family.is_vision(self.model.config, ids).any():
                return None
            prompt = Prompt(self.model.config, ids[::copies], given, self.image_processor, self.image_sizes)
            images = self.family.images(prompt)
            if not images:
                return None
            past = self._past(arguments, images)
            self._regions(_repeated(images, copies), copies)
            return Look(images, self._encodings(prompt, images), valid, past, copies)

    def _regions(self, images: Placed, copies: int = 1) -> list[Region]:
        """One per image of a call."""
        regions = [Region.whole()] if self.regions is None else self.regions
        return one_per_image("region", regions, [sample for sample, _ in images], copies)

    def _encodings(self, prompt: Prompt, images: Placed) -> list[Encoding | None]:
        """One per image; None where nothing is left out."""
        if not self.method.encodes:
            return [None] * len(images)
        pieces = self.encoder.pieces(prompt, [layout for _, layout in images])
        regions = self._regions(images)
        video = getattr(prompt.config, "video_token_id", None) if self.family.videos else None
        return [
            encoding_of(self.method, layout, region, part, int(prompt.ids[sample, layout.position[0]]) == video)
            for (sample, layout), part, region in zip(images, pieces, regions, strict=True)
        ]

    def _past(self, arguments: Mapping[str, Any], images: Placed) -> int:
        """Tokens in the cache of a call; refuses what the call asks for and the method would get wrong."""
        if self.prunes:
            hf.refuse_unsupported(arguments, hf.token_ids(arguments), self.language_model, self.uniform)
        cache = hf.cache_of(arguments)
        past = 0 if cache is None else cache.get_seq_length()
        if self.uniform and self.prunes and cache_state(cache).cuts:
            raise ValueError(
                "patch: cache must be 'ragged' for a cache whose layers hold different tokens already, got 'uniform'; use "
                "cache='uniform' from the first prefill on"
            )
        axes = self.family.position_axes(self.language_model.config)
        for _, layout in images if self.positions == "compact" else ():
            if int(layout.position[-1] - layout.position[0]) != len(layout) - 1 or (axes > 1 and layout.extent[0] > 1):
                raise ValueError(
                    "patch: positions must be 'original' for videos and for images with text among their tokens, got 'compact'"
                )
        if past and not all(cut.rope for cut in self.method.cuts):
            # Scores without positions need the angles of all keys, and those of cached ones are gone.
            raise ValueError(
                f"patch: rope must be True for an image that follows a cache, got False and {past} cached "
                "tokens; score with positions, or process the whole conversation without a cache"
            )
        return past

    def plan_look(self, look: Look) -> BatchPlan:
        """The plan for what was seen; neither the device nor the model is asked.

        Raises:
            ValueError: as ``patch``.
        """
        images = _repeated(look.images, look.copies)
        with _on_the_host():
            plan = plan_batch(self.method, images, self._regions(images, look.copies), look.valid, look.encoded)
        filled = plan.pool is None or plan.pool.full
        if look.past and not (filled and all(step.full for step in plan.prunes.values())) and self._carries_states:
            # Fillers stand before the new tokens, where a state that is not empty decays.
            raise ValueError(
                "patch: images that follow a cache must leave equally many tokens in every sample where layers carry "
                f"states ({self.family.model_type!r}), got a ragged batch; process the samples one by one"
            )
        scored = [layer for layer, step in plan.prunes.items() if step.rows is not None]
        self.family.check_scoring(self.language_model.config, scored, look.past + look.valid.shape[1])
        return plan


def _repeated(images: Sequence[tuple[int, Any]], copies: int) -> list[tuple[int, Any]]:
    """(sample, what is said of an image) each, as generate() repeats samples."""
    return [
        (sample * copies + copy, image)
        for sample, own in itertools.groupby(images, key=lambda entry: entry[0])
        for copy, image in itertools.product(range(copies), [image for _, image in own])
    ]


def _on_the_host() -> AbstractContextManager[Any]:
    """A default device of the user's is not for the host's geometry."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
