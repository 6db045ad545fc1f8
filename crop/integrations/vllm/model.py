"""In the workers: what the encoder made of an image is pooled, and positions are those of the unpruned prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from crop.integrations.vllm.features import FeatureCache, Rows, batches, part_of
from crop.integrations.vllm.plans import FIELD, PlaceholderPlan, check_stamp
from crop.integrations.vllm.positions import UnprunedPrompt
from crop.integrations.vllm.settings import Settings

logger = logging.getLogger("vllm.crop")


class PruningModel:
    """Stands before a family's class.

    ``crop_flat``: arguments in which the rows of all images follow each other, and how many rows each image has there;
    in the others every image has an entry.
    """

    crop_flat: ClassVar[Mapping[str, Rows]] = {}

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check_stamp(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.crop_settings = Settings.of(config)
        self.crop_width = config.get_text_config().hidden_size
        self.crop_budget = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.crop_features = FeatureCache(self.crop_settings.feature_bytes, vllm_config.device_config.device)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Features of the images, pooled."""
        flat = kwargs.pop(FIELD, None)
        if flat is None:
            return super().embed_multimodal(**kwargs)
        plans = [PlaceholderPlan.unpack(one) for one in flat]
        features = self._features(plans, kwargs)
        return [
            PlaceholderPlan.unpack(one, rows.device).apply(rows, self.crop_width)
            for one, rows in zip(flat, features, strict=True)
        ]

    def _features(self, plans: Sequence[PlaceholderPlan], kwargs: dict[str, Any]) -> list[Tensor]:
        """Unpooled, of every image; the encoder sees those that it has not seen."""
        keys = [plan.picture if any(plan.picture) else number for number, plan in enumerate(plans)]
        found = {key: self.crop_features.get(key) for key in keys}
        cache = self.crop_features
        logger.debug("crop: features of %d pictures, %d hits, %d misses", len(cache), cache.hits, cache.misses)
        missing = [number for number, key in enumerate(keys) if found[key] is None and keys.index(key) == number]
        for batch in batches([plans[number].pool.num_tokens for number in missing], self.crop_budget):
            numbers = [missing[one] for one in batch]
            mine = kwargs if len(numbers) == len(plans) else part_of(kwargs, numbers, self.crop_flat)
            for number, rows in zip(numbers, super().embed_multimodal(**mine), strict=True):
                found[keys[number]] = rows
                if plans[number].prunes and any(plans[number].picture):
                    self.crop_features.put(keys[number], rows)
        return [found[key] for key in keys]

    def load_weights(self, weights: Any) -> Any:
        """Features of other weights are of no use."""
        self.crop_features.clear()
        return super().load_weights(weights)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Ids of the tokens that stay, as the family gives them in the unpruned prompt."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        places = [(one.mm_position.offset, one.mm_position.length, _plan(one)) for one in features]
        prompt = UnprunedPrompt.of(input_tokens, places)
        if not prompt.images:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        moved = []
        for number, (feature, start, length) in enumerate(zip(features, prompt.starts, prompt.lengths, strict=True)):
            place = replace(feature.mm_position, offset=start, length=length)
            if number in prompt.images:  # families with markers among an image's tokens have one axis
                place = replace(place, is_embed=None)
            moved.append(replace(feature, mm_position=place))
        ids, delta = super().get_mrope_input_positions(prompt.tokens, moved)
        return prompt.pruned_ids(ids, delta, self.crop_settings.positions)


class OneAxis:
    """Families with one position per token: vLLM keeps places other than consecutive ones for M-RoPE only, so they are
    kept three times, and the decoder gets one of them. Without that (``positions="compact"``) all is as it was."""

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """The places in the prompt."""
        return torch.arange(len(input_tokens)).expand(3, -1).contiguous(), 0

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The family's own, with one position per token."""
        return super().forward(input_ids, positions[0] if positions.ndim == 2 else positions, *args, **kwargs)


def _plan(feature: Any) -> PlaceholderPlan | None:
    item = feature.data
    return None if item is None or FIELD not in item else PlaceholderPlan.unpack(item[FIELD].data)
