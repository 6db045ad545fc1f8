"""The model's own attention from the question to the image as a localizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crop import ops
from crop.models import adapter_for
from crop.patch import patch
from crop.region import PATCH, Region, VisionLayout
from crop.tap import tap

from .base import encode
from .boxes import find_region

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention that the vision tokens of one image receive, one row per head.

    Args:
        layout: where the N tokens are.
        question: (num_heads, N) float32, mean over the scoring rows.
        prior: (num_heads, N) float32, of the first text row after the image, which cannot know the
            question yet: habits of the model, such as sinks and a liking for late positions.
    """

    layout: VisionLayout
    question: Tensor
    prior: Tensor


class _Stop(Exception):
    """Ends a forward pass whose later layers nobody needs."""


@dataclass(frozen=True)
class AttentionLocalizer:
    """The model's own attention from the question to the image ("attention"): no second model.

    One prefill that stops inside decoder layer ``layer``; see ``score_tokens`` and ``find_region``
    for what becomes of the attention.

    Args:
        model: Hugging Face vision-language model of a supported family.
        processor: its processor.
        layer: decoder layer whose attention is read, 0 = first. None: 3/8 of the depth.
        prompt: as in ``encode``.
        rows: the last text rows whose attention is averaged; they have read the whole question.
        threshold: fraction of the peak from which tokens belong to the region, in (0, 1).
        gap: boxes that share rows are joined over this many tokens, as words in a line.
        max_boxes: boxes kept, the heaviest first.
        dilate: tokens that every box grows on each side.
        min_confidence: below it the whole image is returned.
    Raises:
        ValueError, TypeError: an argument out of its range; a family without an adapter.
    Source: own choice, tuned on the embedded model. The idea of reading the region off the model's attention, relative to
        a question-free reference, is also that of arXiv 2502.17422 (known to us from digests only).
    """

    model: nn.Module
    processor: Any
    layer: int | None = None
    prompt: Callable[[str], str] | None = None
    rows: int = 2
    threshold: float = 0.02
    gap: int = 3
    max_boxes: int = 6
    dilate: int = 0
    min_confidence: float = 0.5

    def __post_init__(self) -> None:
        op = "AttentionLocalizer"
        count = len(adapter_for(self.model).language_model(self.model).layers)
        if self.layer is not None and not 0 <= self.layer < count:
            raise ValueError(f"{op}: layer must be in [0, num_layers={count}), got {self.layer}")
        for name in ("threshold", "min_confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{op}: {name} must be in (0, 1), got {getattr(self, name)}")
        for name, low in (("rows", 1), ("gap", 0), ("max_boxes", 1), ("dilate", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{op}: {name} must be >= {low}, got {getattr(self, name)}")

    def __call__(self, image: Image, question: str) -> Region:
        attention = self.attend(image, question)
        return find_region(
            attention.layout,
            score_tokens(attention),
            threshold=self.threshold,
            gap=self.gap,
            max_boxes=self.max_boxes,
            dilate=self.dilate,
            min_confidence=self.min_confidence,
        )

    def attend(self, image: Image, question: str) -> Attention:
        """The attention behind the region, e.g. to look at it.

        Args:
            image: RGB.
            question: plain text.
        Returns:
            Attention.
        Raises:
            ValueError: the prompt holds more than one image, or no text after it.
        """
        model = self.model
        inputs = encode(self.processor, image, question, self.prompt)
        inputs = inputs.to(model.device, dtype=model.dtype)
        adapter = adapter_for(model)
        base, layers = adapter.base(model), adapter.language_model(model).layers
        layer = len(layers) * 3 // 8 if self.layer is None else self.layer
        found: list[Attention] = []

        def read(query: Tensor, key: Tensor, scale: float | None) -> None:
            found.append(_attention(stats.layouts, query, key, scale, self.rows))
            raise _Stop

        # Position offsets and the like that a forward pass leaves on the module.
        before = dict(vars(base))
        geometry = patch(model, None, processor=self.processor, image_size=image.size)
        try:
            with geometry as stats, tap(layers[layer].self_attn, read), torch.no_grad():
                base(**inputs, use_cache=False)
        except _Stop:
            pass
        finally:
            vars(base).update(before)
        return found[0]


def _attention(layouts: list[VisionLayout], query: Tensor, key: Tensor, scale: float | None, count: int) -> Attention:
    """Attention of the text after the only image, per head."""
    if len(layouts) != 1:
        raise ValueError(f"attend: prompt must hold one image, got {len(layouts)}")
    first = int(layouts[0].position[-1]) + 1
    num_rows, heads = query.shape[2] - first, query.shape[1]
    if num_rows < 2:
        raise ValueError(f"attend: prompt must have text after the image, got {num_rows} tokens")
    # One sample per head, because the operator averages over heads.
    query = query[0, :, None, first:]
    key = key[0].repeat_interleave(heads // key.shape[1], 0).unsqueeze(1)
    index = layouts[0].position.to(query.device).expand(heads, -1)
    visible = torch.arange(first, first + num_rows, device=query.device) + 1
    visible = visible.expand(heads, -1)
    prior, asked = (
        ops.attention_mass(query[:, :, rows], key, index, scale=scale, visible_len=visible[:, rows])
        for rows in (slice(0, 1), slice(max(1, num_rows - count), None))
    )
    return Attention(layouts[0], asked.cpu(), prior.cpu())


def score_tokens(attention: Attention) -> Tensor:
    """How much the question, rather than habit, makes the model look at each token.

    ``question / (prior + 4 / N)`` per head, cut off at its largest 2 % against sinks and brought to
    sum 1; heads are averaged with weights ``sum(score ** 2)``, because a head that looks at a few
    tokens says where, and one that looks everywhere says nothing.

    Args:
        attention: of one image, N tokens.
    Returns:
        (N,) float32 >= 0.
    Source: own choice.
    """
    count = attention.question.shape[1]
    score = torch.nan_to_num(attention.question / (attention.prior + 4 / count))
    score[:, attention.layout.kind != PATCH] = 0
    top = min(count, max(3, math.ceil(0.02 * count)))
    score = torch.minimum(score, score.topk(top, 1).values[:, -1:])
    score = score / score.sum(1, keepdim=True).clamp(min=1e-12)
    weight = (score**2).sum(1, keepdim=True)
    return (weight * score).sum(0) / weight.sum().clamp(min=1e-12)
