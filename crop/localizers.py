"""Localizers: question and image -> the region the question needs.

A localizer that is unsure returns the whole image with a low confidence, never a guess in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from crop import ops
from crop.models import adapter_for
from crop.patch import patch
from crop.region import PATCH, Region, VisionLayout
from crop.tap import tap

if TYPE_CHECKING:
    from PIL.Image import Image

TokenBox = tuple[int, int, int, int]  # (left, top, right, bottom) tokens, half open


class Localizer(Protocol):
    """The role: what part of ``image`` does ``question`` need?"""

    def __call__(self, image: Image, question: str) -> Region: ...


@dataclass(frozen=True)
class BoxLocalizer:
    """The region that the caller knows already ("box"): a user's selection, an annotation.

    Args:
        region: returned for every image and question.
    """

    region: Region

    def __call__(self, image: Image, question: str) -> Region:
        return self.region


@dataclass(frozen=True)
class WholeLocalizer:
    """The whole image ("whole"): pruning is then led by attention alone."""

    def __call__(self, image: Image, question: str) -> Region:
        return Region.whole()


def encode(processor: Any, image: Image, question: str, prompt: Callable[[str], str] | None = None) -> Any:
    """Model inputs for one image and one question.

    Args:
        processor: the model's processor.
        image: RGB.
        question: plain text.
        prompt: question -> the full text with the image placeholder; default: the processor's chat
            template, one user turn.
    Returns:
        What the processor makes of it, on the CPU.
    Raises:
        ValueError: no prompt, and the processor has no chat template.
    """
    if prompt is not None:
        text = prompt(question)
    elif getattr(processor, "chat_template", None):
        turn = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    else:
        raise ValueError("encode: prompt must be given for a processor without a chat template, got None")
    return processor(images=image, text=text, return_tensors="pt")


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


def find_region(
    layout: VisionLayout,
    score: Tensor,
    *,
    threshold: float = 0.02,
    gap: int = 3,
    max_boxes: int = 6,
    dilate: int = 0,
    min_confidence: float = 0.5,
) -> Region:
    """Boxes around the peaks of a score.

    Tokens belong to a peak where the smoothed score reaches ``threshold`` of its maximum and their
    own at least half the average; touching tokens make one box, and so do those in one line.

    Args:
        layout: N tokens of one view.
        score: (N,) float32 >= 0.
        threshold, gap, max_boxes, dilate, min_confidence: see ``AttentionLocalizer``.
    Returns:
        Region; its confidence is the share of the score in the boxes, corrected for chance:
        ``(share - area) / (1 - area)``. The whole image where that is below ``min_confidence``.
    Raises:
        ValueError: more than one view.
    Source: own choice.
    """
    views, height, width = layout.extent
    if views != 1:
        raise ValueError(f"find_region: layout must have one view, got {views}")
    row, col = layout.row.numpy(), layout.col.numpy()
    is_patch = (layout.kind == PATCH).numpy()
    values = np.where(is_patch, score.numpy().astype(np.float64), 0.0)
    if not values.sum() > 0:  # also NaN
        return Region.whole(0.0)
    grid, valid = np.zeros((height, width)), np.zeros((height, width), dtype=bool)
    cell = np.empty((height, width, 4))
    grid[row, col], valid[row, col] = values / values.sum(), is_patch
    cell[row, col] = layout.cells
    smooth = np.where(grid >= 0.5 / valid.sum(), _smooth(grid), 0.0)
    pieces = _components(smooth >= threshold * smooth.max())
    boxes = _merge([_grow(_bounds(piece), dilate, height, width) for piece in pieces], gap)
    boxes.sort(key=lambda box: -grid[box[1] : box[3], box[0] : box[2]].sum())
    boxes = boxes[:max_boxes]
    inside = np.zeros_like(valid)
    for left, top, right, bottom in boxes:
        inside[top:bottom, left:right] = True
    area = (inside & valid).sum() / valid.sum()
    confidence = float((grid[inside].sum() - area) / (1 - area)) if area < 1 else 0.0
    confidence = min(max(confidence, 0.0), 1.0)
    if confidence < min_confidence:
        return Region.whole(confidence)
    corners = ((*cell[y0, x0, :2], *cell[y1 - 1, x1 - 1, 2:]) for x0, y0, x1, y1 in boxes)
    return Region(tuple(corners), confidence)


def _smooth(grid: np.ndarray) -> np.ndarray:
    """Binomial 3 x 3 blur that does not darken the border."""

    def blur(values: np.ndarray) -> np.ndarray:
        for _ in range(2):
            padded = np.pad(values, ((1, 1), (0, 0)))
            values = (padded[:-2] + 2 * padded[1:-1] + padded[2:]).T / 4
        return values

    return blur(grid) / blur(np.ones_like(grid))


def _components(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Sets of True cells that touch, corners included."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    pieces = []
    while left:
        piece, front = [], [left.pop()]
        while front:
            y, x = front.pop()
            piece.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        pieces.append(piece)
    return pieces


def _bounds(piece: list[tuple[int, int]]) -> TokenBox:
    rows, columns = zip(*piece, strict=True)
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def _grow(box: TokenBox, by: int, height: int, width: int) -> TokenBox:
    left, top, right, bottom = box
    return max(left - by, 0), max(top - by, 0), min(right + by, width), min(bottom + by, height)


def _merge(boxes: list[TokenBox], gap: int) -> list[TokenBox]:
    """Join boxes that overlap or stand within ``gap`` tokens on shared rows, until none do."""
    merged: list[TokenBox] = []
    for a in boxes:
        while near := [b for b in merged if a[0] <= b[2] + gap and b[0] <= a[2] + gap and a[1] < b[3] and b[1] < a[3]]:
            for b in near:
                merged.remove(b)
                a = (*map(min, a[:2], b[:2]), *map(max, a[2:], b[2:]))
        merged.append(a)
    return merged


def get_localizer(
    name: str,
    *,
    region: Region | None = None,
    model: nn.Module | None = None,
    processor: Any = None,
    prompt: Callable[[str], str] | None = None,
    layer: int | None = None,
    min_confidence: float = 0.5,
) -> Localizer:
    """A localizer by its name, with default settings.

    Args:
        name: one of ``LOCALIZERS``.
        region: for "box".
        model, processor: for "attention".
        prompt, layer, min_confidence: for "attention", see ``AttentionLocalizer``.
    Raises:
        ValueError: unknown name, or something it needs is missing.
    """

    def needs(argument: str, value: Any) -> Any:
        if value is None:
            raise ValueError(f"get_localizer: {argument} must be given for {name!r}, got None")
        return value

    if name == "box":
        return BoxLocalizer(needs("region", region))
    if name == "whole":
        return WholeLocalizer()
    if name == "attention":
        model, processor = needs("model", model), needs("processor", processor)
        return AttentionLocalizer(model, processor, layer, prompt, min_confidence=min_confidence)
    raise ValueError(f"get_localizer: name must be one of {', '.join(LOCALIZERS)}, got {name!r}")


LOCALIZERS = ("attention", "box", "whole")
