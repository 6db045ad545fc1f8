"""What a localizer adds to an answer, over a whole batch: one pass for all samples, then the region of each.

The localizers of ``crop`` take one picture and one question; here the same steps run on prompts that are tensors already.
Weights are random, so the regions that come out mean nothing: the bench times them and goes on with those of the data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import crop
from bench.latency.e2e.workload import Workload
from crop.localizers.attention import Attention, score_tokens
from crop.localizers.boxes import find_region
from crop.localizers.head import Head, HeadLocalizer
from crop.localizers.reading import Embeddings, Stop, entering, run_until_stop
from crop.patching.planner import Planner
from crop.patching.stats import PruneStats


def make(name: str, work: Workload) -> Callable[[], None] | None:
    """A call that finds a region for every sample, or None for "none".

    Args:
        name: "attention", "head" (random weights) or "none".
    """
    return {"attention": _attention, "head": _head, "none": lambda work: None}[name](work)


def _attention(work: Workload) -> Callable[[], None]:
    localizer = crop.AttentionLocalizer(work.model.model, work.model.processor)

    def call() -> None:
        found: list[Attention] = []

        def read(query: Tensor, key: Tensor, scale: float | None) -> None:
            found.extend(_rows(stats, query, key, scale, localizer.rows))
            raise Stop

        with localizer.reading(read, **work.where) as stats:
            run_until_stop(work.model.base, work.inputs)
        for attention in found:
            find_region(attention.layout, score_tokens(attention), min_confidence=localizer.min_confidence)

    return call


def _rows(stats: PruneStats, query: Tensor, key: Tensor, scale: float | None, count: int) -> list[Attention]:
    """Attention of the question and of the first text row, per sample; heads are samples to the operator."""
    batch, heads = query.shape[:2]
    place = stats.pooled[0].position
    first, length = int(place[-1]) + 1, query.shape[2]
    query = query[:, :, first:].flatten(0, 1).unsqueeze(1)
    key = key.repeat_interleave(heads // key.shape[1], 1).flatten(0, 1).unsqueeze(1)
    index = place.to(query.device).expand(batch * heads, -1)
    visible = (torch.arange(first, length, device=query.device) + 1).expand(batch * heads, -1)
    prior, asked = (
        crop.attention_mass(query[:, :, rows], key, index, scale=scale, visible_len=visible[:, rows]).cpu()
        for rows in (slice(0, 1), slice(max(1, length - first - count), None))
    )
    shape = (batch, heads, -1)
    return [Attention(*one) for one in zip(stats.layouts, asked.view(shape), prior.view(shape), strict=True)]


def _head(work: Workload) -> Callable[[], None]:
    decoder, device = work.model.decoder, work.model.model.device
    torch.manual_seed(0)
    localizer = HeadLocalizer(work.model.model, None, Head(decoder.config.hidden_size).to(device).eval())

    planner = Planner(work.model.model, None, None, **work.where)

    def call() -> None:
        layouts, embeds = entering(planner, work.inputs)
        for layout, one in zip(layouts, embeds, strict=True):
            localizer.region(Embeddings.of(layout, one))

    return call
