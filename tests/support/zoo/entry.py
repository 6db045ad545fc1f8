"""What an entry of the zoo is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support import tiny_models
from tests.support.tiny_models import IMAGE, INIT, PATCH, VIDEO, VISION_END, VISION_START

NUM_LAYERS = 4
MARK = 94  # any special token that stands inside an image block
TEXT = tiny_models.TEXT | dict(num_hidden_layers=NUM_LAYERS)
MROPE = dict(TEXT, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1]))
TOWER = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=PATCH,
    initializer_range=INIT,
)
QWEN_TOWER = dict(depth=2, num_heads=2, patch_size=PATCH, temporal_patch_size=2, spatial_merge_size=2,
                  initializer_range=INIT)  # fmt: skip
MARKERS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START,
               vision_end_token_id=VISION_END)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Image:
    """One image of a prompt.

    Attributes:
        ids: its tokens, markers included.
        arguments: what its processor hands to the model for it.
        size: (width, height) of the original.
    """

    ids: tuple[int, ...]
    arguments: dict[str, Tensor]
    size: tuple[int, int]


@dataclass(frozen=True)
class Family:
    """A family as users meet it.

    Attributes:
        title: its row in README.
        classes: the transformers class.
        config: () -> configuration of the tiny model.
        image: (original size, seed) -> Image.
        sizes: two original sizes of different token grids, where the family knows such.
        join: per-sample lists of images -> model arguments; default: concatenated along the first axis.
        types: ids -> further arguments that follow from the ids.
        processor: () -> the image processor of `crop.patch`; None where the family needs none.
        attentions: what the family supports; the others are refused.
    """

    title: str
    classes: str
    config: Callable[[], Any]
    image: Callable[[tuple[int, int], int], Image]
    sizes: tuple[tuple[int, int], ...] = ((48, 32), (24, 40))
    join: Callable[[list[list[Image]]], dict[str, Tensor]] | None = None
    types: Callable[[Tensor], dict[str, Tensor]] | None = None
    processor: Callable[[], Any] | None = None
    attentions: tuple[str, ...] = ("eager", "sdpa", "flash_attention_2")


def pixels(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3000 + seed))
