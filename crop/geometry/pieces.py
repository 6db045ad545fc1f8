"""Pieces: what a vision encoder can take or leave of one image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout


@dataclass(frozen=True, eq=False)
class Pieces:
    """The tiles, windows or single tokens of one image that its encoder takes or leaves; CPU tensors.

    Args:
        of_token: (N, K) int64 pieces that each token is made of, -1 = none (newlines have none).
        overview: (num_pieces,) bool those that show the whole image at low resolution.
        place: (num_pieces, 2) int64 row and column of each among its equals; None: something else gives the overview.
    """

    of_token: Tensor
    overview: Tensor
    place: Tensor | None = None

    def __len__(self) -> int:
        return len(self.overview)

    def needed(self, tokens: Tensor) -> Tensor:
        """(num_pieces,) bool: what must be encoded for ``tokens``, (N,) bool."""
        wanted = self.of_token[tokens]
        found = torch.zeros(len(self), dtype=torch.bool)
        found[wanted[wanted >= 0]] = True
        return found


@dataclass(frozen=True, eq=False)
class Encoding:
    """What is encoded of one image.

    Args:
        layout: its tokens. pieces: of it. taken: (num_pieces,) bool, those that the encoder gets.
        video: it is none of a picture, but of a video.
    """

    layout: VisionLayout
    pieces: Pieces
    taken: Tensor
    video: bool = False

    @cached_property
    def whole(self) -> bool:
        """Whether all of it is encoded."""
        return bool(self.taken.all())

    @cached_property
    def tokens(self) -> Tensor:
        """(N,) bool: tokens all of whose pieces are taken; newlines of rows that hold any."""
        if self.whole:
            return torch.ones(len(self.layout), dtype=torch.bool)
        found = (self.taken[self.pieces.of_token] | (self.pieces.of_token < 0)).all(1)
        return self.layout.with_newlines(found)

    @cached_property
    def left(self) -> VisionLayout:
        """The layout of these tokens."""
        return self.layout if self.whole else self.layout.take(self.tokens)
