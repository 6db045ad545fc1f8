"""The model's own attention from the question to the image as a localizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crop import ops
from crop.geometry.layout import PATCH, VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.geometry.strides import MAX_STRIDE
from crop.localizers.base import blank, encode
from crop.localizers.boxes import box_settings, check_ranges, find_region
from crop.localizers.reading import Stop, only_image, run_until_stop
from crop.methods.base import Method
from crop.methods.compose import Compose
from crop.methods.encoder import OverviewOnly
from crop.methods.plc import PreLLMCompression
from crop.models import family_of
from crop.models.attention_hook import attention_hook
from crop.patching.patch import patch
from crop.patching.stats import PruneStats

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention that the N vision tokens of one image receive, one row per head.

    Args:
        question: (num_heads, N) float32, mean over the scoring rows.
        prior: (num_heads, N) float32, of the first text row after the image, which cannot know the
            question yet: habits of the model, such as sinks and a liking for late positions.
    """

    layout: VisionLayout
    question: Tensor
    prior: Tensor


@dataclass(frozen=True)
class AttentionLocalizer:
    """The model's own attention from the question to the image ("attention"): no second model.

    One prefill that stops inside decoder layer ``layer``, after its queries and keys; see ``score_tokens`` and
    ``find_region`` for what becomes of the attention.

    Args:
        model: Hugging Face vision-language model of a supported family. processor: its processor.
        layer: decoder layer whose attention is read, 0 = first; it must see the whole prompt. None: the first such from a
            sixteenth of the depth on, at least 1, which makes the pass some 6 % of the prefill of 24 layers that all do (see
            bench/README.md); where the model's config has a ``crop_layer``, the one that scores for it.
        prompt: as in ``encode``.
        stride: the pass runs on vision tokens averaged in blocks of this side, which costs a ``stride ** 2``-th.
        overview: the pass runs on the view of the whole image alone, where the encoder has tiles and such a view.
        rope: False scores by queries and keys without position; the layers before are as always.
        rows: the last text rows whose attention is averaged; they have read the whole question.
        threshold, gap, max_boxes, dilate: as ``find_region``.
        min_confidence: below it the whole image is returned. Nearly all regions of the embedded model reach the default, right
            or wrong; other models may look at images in another way, and need another.
    Raises:
        ValueError, TypeError: an argument out of its range; an unknown family.
    Source: own choice; ``min_confidence`` was chosen on the embedded model, the rest on an earlier one. The
        idea of reading the region off the model's attention, relative to a question-free reference, is also that of arXiv
        2502.17422 (known to us from digests only).
    """

    model: nn.Module
    processor: Any
    layer: int | None = None
    prompt: Callable[[str], str] | None = None
    stride: int = 1
    overview: bool = False
    rope: bool = True
    rows: int = 2
    threshold: float = 0.02
    gap: int = 3
    max_boxes: int = 6
    dilate: int = 0
    min_confidence: float = 0.75

    def __post_init__(self) -> None:
        op = "AttentionLocalizer"
        count = len(family_of(self.model).language_model(self.model).layers)
        if self.layer is not None and not 0 <= self.layer < count:
            raise ValueError(f"{op}: layer must be in [0, num_layers={count}), got {self.layer}")
        if self.layer is not None and self.layer not in self._seeing:
            raise ValueError(
                f"{op}: layer must be one that sees the whole prompt, by keys of its own: one of {self._seeing}, got {self.layer}"
            )
        if self.rows < 1:
            raise ValueError(f"{op}: rows must be >= 1, got {self.rows}")
        check_ranges(op, self)
        if not 1 <= self.stride <= MAX_STRIDE:
            raise ValueError(f"{op}: stride must be in [1, {MAX_STRIDE}], got {self.stride}")

    @property
    def _seeing(self) -> list[int]:
        family = family_of(self.model)
        return family.scoring_layers(family.language_model(self.model).config)

    @property
    def scoring_layer(self) -> int:
        """The decoder layer that is read: ``layer``, or what stands in for it."""
        if self.layer is not None:
            return self.layer
        config = family_of(self.model).language_model(self.model).config
        start = max(1, config.num_hidden_layers // 16)
        if hasattr(config, "crop_layer"):
            start = family_of(self.model).default_layer(config) - 1
        return next((one for one in self._seeing if one >= start), self._seeing[-1])

    def __call__(self, image: Image, question: str) -> Region:
        attention = self.attend(image, question)
        return find_region(attention.layout, score_tokens(attention), **box_settings(self))

    def attend(self, image: Image, question: str) -> Attention:
        """The attention behind the region, e.g. to look at it.

        Raises:
            ValueError: the prompt holds more than one image, or no text after it.
        """
        inputs = encode(self.processor, image, question, self.prompt).to(self.model.device, dtype=self.model.dtype)
        found: list[Attention] = []
        prefix = family_of(self.model).traits.mask == "prefix"

        def read(query: Tensor, key: Tensor, scale: float | None) -> None:
            found.append(_attention(stats, query, key, scale, self.rows, prefix))
            raise Stop

        with self.reading(read, processor=self.processor, image_size=image.size) as stats:
            run_until_stop(family_of(self.model).base(self.model), inputs)
        return found[0]

    def glance(self, size: tuple[int, int]) -> tuple[Any, tuple[int, int], Method, int]:
        """What a look at a picture of ``size`` lets the model run, for ``crop.estimate``: inputs, size, method, layers."""
        return blank(self.processor, size, self.prompt), size, self._method, self.scoring_layer + 1

    @property
    def _method(self) -> Method:
        method: Method = PreLLMCompression(inside=self.stride, context=self.stride, outside=self.stride, mode="mean")
        if self.overview and family_of(self.model).encoder_of(self.model.config) is not None:
            method = Compose(method, encoder=OverviewOnly())
        return method

    @contextmanager
    def reading(self, read: Callable[[Tensor, Tensor, float | None], None], **where: Any) -> Iterator[PruneStats]:
        """A context in which the model's prefill does no more than the localizer needs, and is read.

        Args:
            read: called with query, key and scale of the scoring layer, see ``attention_hook``; should end the pass by
                raising ``Stop``.
            where: ``processor`` and ``image_size``, as for ``patch``.
        """
        scoring = family_of(self.model).language_model(self.model).layers[self.scoring_layer].self_attn
        with patch(self.model, self._method, **where) as stats, ExitStack() as undo:
            undo.enter_context(attention_hook(scoring, read))
            if not self.rope:
                undo.callback(scoring.register_forward_pre_hook(_without_rotation, with_kwargs=True).remove)
            yield stats


def _without_rotation(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Rotary tables of no rotation, for a call whose result nobody sees."""
    cosine, sine = kwargs["position_embeddings"]
    return args, kwargs | {"position_embeddings": (torch.ones_like(cosine), torch.zeros_like(sine))}


def _attention(
    stats: PruneStats, query: Tensor, key: Tensor, scale: float | None, count: int, prefix: bool
) -> Attention:
    """Attention of the text after the only image, per head; ``prefix``: every row of it sees the whole prompt."""
    layout = only_image(stats.layouts, "attend")
    place = stats.pooled[0].position
    first = int(place[-1]) + 1
    num_rows, heads = query.shape[2] - first, query.shape[1]
    if num_rows < 2:
        raise ValueError(f"attend: prompt must have text after the image, got {num_rows} tokens")
    # One sample per head, because the operator averages over heads.
    query = query[0, :, None, first:]
    key = key[0].repeat_interleave(heads // key.shape[1], 0).unsqueeze(1)
    index = place.to(query.device).expand(heads, -1)
    visible = torch.arange(first, first + num_rows, device=query.device) + 1
    visible = (torch.full_like(visible, first + num_rows) if prefix else visible).expand(heads, -1)
    prior, asked = (
        ops.attention_mass(query[:, :, rows], key, index, scale=scale, visible_len=visible[:, rows])
        for rows in (slice(0, 1), slice(max(1, num_rows - count), None))
    )
    return Attention(layout, *(_spread(stats.plans[0], mass.cpu()) for mass in (asked, prior)))


def _spread(plan: PoolPlan | None, mass: Tensor) -> Tensor:
    """What a cell received, in equal parts to its members: (num_heads, num_out) to (num_heads, N)."""
    if plan is None:
        return mass
    cell = plan.inverse.long()
    return torch.where(cell >= 0, (mass / plan.counts)[:, cell.clamp(min=0)], 0.0)


def score_tokens(attention: Attention) -> Tensor:
    """(N,) float32 >= 0: how much the question, rather than habit, makes the model look at each token.

    ``question / (prior + 4 / N)`` per head, cut off at its largest 2 % against sinks and brought to
    sum 1; heads are averaged with weights ``sum(score ** 2)``, because a head that looks at a few
    tokens says where, and one that looks everywhere says nothing.

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
