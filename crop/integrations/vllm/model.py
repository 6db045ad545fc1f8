"""In the workers: what the encoder made of an image is pooled, and positions are those of the unpruned prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.multimodal.inputs import PlaceholderRange

from crop.integrations.vllm.features import FeatureCache
from crop.integrations.vllm.plans import FIELD, PlaceholderPlan
from crop.integrations.vllm.positions import UnprunedPrompt
from crop.integrations.vllm.settings import Settings
from crop.integrations.vllm.start import check_stamp

Rows = Callable[[Mapping[str, Any]], Tensor]


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
        missing = [number for number, key in enumerate(keys) if found[key] is None and keys.index(key) == number]
        for batch in batches([plans[number].pool.num_tokens for number in missing], self.crop_budget):
            numbers = [missing[one] for one in batch]
            mine = kwargs if len(numbers) == len(plans) else part_of(kwargs, numbers, len(plans), self.crop_flat)
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
        moved = [
            replace(
                feature,
                mm_position=PlaceholderRange(
                    start, length, None if n in prompt.images else feature.mm_position.is_embed
                ),
            )
            for n, (feature, start, length) in enumerate(zip(features, prompt.starts, prompt.lengths, strict=True))
        ]
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


def batches(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Images that the encoder sees together: as many in order as vLLM measured memory for, at least one.

    The scheduler counts what stays of them, and would send ten times as many.
    """
    found: list[list[int]] = []
    room = 0
    for number, count in enumerate(tokens):
        if not found or count > room:
            found.append([])
            room = budget
        found[-1].append(number)
        room -= count
    return found


def part_of(kwargs: Mapping[str, Any], numbers: Sequence[int], count: int, flat: Mapping[str, Rows]) -> dict[str, Any]:
    """Arguments of some of ``count`` images."""
    found = {}
    for name, value in kwargs.items():
        if name in flat:
            rows = flat[name](kwargs).tolist()
            pieces = value.split(rows)
            found[name] = torch.cat([pieces[number] for number in numbers])
        elif getattr(value, "ndim", 1) == 0:  # one for all
            found[name] = value
        elif isinstance(value, Tensor):
            found[name] = value[list(numbers)]
        else:
            found[name] = [value[number] for number in numbers]
    return found
