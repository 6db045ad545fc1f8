"""What a conversation was before its first cut, so that a later question may cut it anew.

The layers before the cut hold all keys and values, and each of them computes a token from tokens before it, pruned or
not: nothing there depends on the region. What a new region changes is the input of the first pruned layer, and that is
what :class:`Memory` keeps, with the queries that scored and what DeepStack adds to vision tokens from there on. A second
question takes the whole conversation from there through the later layers, as a fresh run would; the vision tower and the
early layers are not run again. Not so for PaliGemma, whose early layers let an image see the question, nor for Gemma 3,
which makes its masks itself, for new tokens only.

Cost: per token one hidden state (of a model with 32 layers, 32 heads for keys and as many for queries: 1 / 64 of its
keys and values), one more for every level that DeepStack adds at that layer or later, and one query per text token; per
new region the later layers over all kept tokens and all text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout
from crop.patching.validation import cache_of

if TYPE_CHECKING:
    from crop.methods.base import Method
    from crop.models.family import ModelFamily

Images = list[tuple[int, VisionLayout]]


@dataclass(frozen=True)
class Memory:
    """One conversation before the first cut; tensors in pieces, one per call, joined when they are needed.

    Args:
        layer: first decoder layer that was pruned.
        images: (sample, layout) of all images so far, positions in the whole sequence.
        hidden: (batch, n, dim) inputs of that layer.
        ids: (axes, batch, n) position ids.
        query: (batch, num_heads, n, head_dim) of the layer before, from position ``first`` on.
        first: no text before it scores.
        levels: (num_levels, batch, n, dim) what is added behind that layer and the following ones; zeros on text.
    """

    layer: int
    images: Images
    hidden: tuple[Tensor, ...] = ()
    ids: tuple[Tensor, ...] = ()
    query: tuple[Tensor, ...] = ()
    first: int = 0
    levels: tuple[Tensor, ...] = ()

    def with_chunk(self, images: Images, hidden: Tensor, ids: Tensor, query: Tensor, levels: Tensor) -> Memory:
        """This and one more call's tensors. The first call tells which of its queries can matter."""
        first = self.first
        if not self.hidden:
            ends = [0] * hidden.shape[0]
            for sample, layout in images:
                ends[sample] = int(layout.position[-1]) + 1
            first = min(ends)
            query = query[:, :, first:]
        return replace(
            self,
            images=self.images + images,
            hidden=(*self.hidden, hidden.detach()),
            ids=(*self.ids, ids),
            query=(*self.query, query.detach()),
            first=first,
            levels=(*self.levels, levels.detach()),
        )

    def take_samples(self, take: Callable[[Tensor], Tensor]) -> Memory:
        """Follow an operation on the batch of the cache; ``take`` works on axis 0."""
        origin = take(torch.arange(len(self.hidden[0]), device=self.hidden[0].device)).tolist()
        images = [(row, layout) for row, old in enumerate(origin) for sample, layout in self.images if sample == old]
        ids, levels = (tuple(take(p.movedim(1, 0)).movedim(0, 1) for p in pieces) for pieces in (self.ids, self.levels))
        hidden, query = (tuple(take(piece) for piece in pieces) for pieces in (self.hidden, self.query))
        return replace(self, images=images, hidden=hidden, ids=ids, query=query, levels=levels)

    @property
    def num_levels(self) -> int:
        """A call without images brings none, one with images all of them."""
        return max((len(piece) for piece in self.levels), default=0)

    def level(self, number: int) -> list[Tensor]:
        """(batch, n, dim) of one level, in pieces."""
        return [
            piece[number] if len(piece) else torch.zeros_like(hidden)
            for piece, hidden in zip(self.levels, self.hidden, strict=True)
        ]


def shift(images: Images, past: int) -> Images:
    """Layouts of a chunk, with positions in the whole sequence."""
    return [(sample, replace(layout, position=layout.position + past)) for sample, layout in images]


def all_real(arguments: Mapping[str, Any], batch: int, total: int) -> Tensor:
    """(batch, total) bool on the CPU: the tokens of the conversation that are no padding."""
    mask = arguments.get("attention_mask")
    return torch.ones(batch, total, dtype=torch.bool) if mask is None else mask.cpu().to(torch.bool)


def empty_layers(cache: Any, first: int) -> None:
    """Forget the keys and values of the layers from ``first`` on."""
    for layer in cache.layers[first:]:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]


def refuse_readmission(method: Method, adapter: ModelFamily, positions: str, uniform: bool) -> None:
    """Combinations in which pruned tokens cannot be had back."""
    name = adapter.model_type
    reasons = {
        "cache must be 'ragged' to readmit tokens, got 'uniform', which gives up what the early layers know": uniform,
        f"positions must be 'original' to readmit tokens, got {positions!r}": positions != "original",
        "method must prune inside the decoder to readmit tokens, got none that does": not method.cuts,
        f"readmit must be False for {name!r}, whose images see the questions that follow them, got True": adapter.two_way,
        f"readmit must be False for {name!r}, which makes masks of its own and for new tokens only, got True": (
            adapter.makes_masks
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"patch: {reason}; else give the whole conversation to a fresh cache")


def recall(arguments: Mapping[str, Any], layer: int, past_state: Any) -> Memory:
    """The memory of a conversation that goes on.

    Raises:
        ValueError: there is none, or it is of another layer.
    """
    memory = past_state.memory
    if memory is None:
        raise ValueError(
            "patch: readmit must be False for a cache that was made without it, got True and "
            f"{cache_of(arguments).get_seq_length()} cached tokens; else give the whole conversation to a fresh cache"
        )
    if memory.layer != layer:
        raise ValueError(f"patch: layer must be {memory.layer}, where this cache was pruned before, got {layer}")
    return memory
