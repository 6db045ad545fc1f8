"""Pieces: what a vision encoder can take or leave of one image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crop.geometry.layout import VisionLayout


@dataclass(frozen=True, eq=False)
class Copy:
    """The picture at low resolution, which an encoder gets as one more picture; CPU tensors.

    Args:
        layout: its tokens.
        shown_by: (N,) int64 token of it that shows each token of the picture.
        apart: (N,) int64 how far each of these lies from the middle of what that token shows.
    """

    layout: VisionLayout
    shown_by: Tensor
    apart: Tensor

    @staticmethod
    def of(layout: VisionLayout, times: int) -> Copy:
        """With sides ``times`` times smaller, rounded to whole tokens, of a grid or of several of equal size."""
        views, *sides = layout.extent
        small = [max(1, (side + times // 2) // times) for side in sides]
        grid = VisionLayout.grid(*small)
        repeated = {name: getattr(grid, name).repeat(views) for name in ("row", "col", "kind")}
        view = torch.arange(views, dtype=torch.int32).repeat_interleave(len(grid))
        count = views * len(grid)
        copy = VisionLayout(
            torch.arange(count), grid.center.repeat(views, 1), view=view, num_original=count, **repeated
        )
        shown_by, apart = layout.view.long(), torch.zeros(len(layout), dtype=torch.int64)
        for number, (place, side, few) in enumerate(zip((layout.row, layout.col), sides, small, strict=True)):
            middle = (2 * place.long() + 1) * few  # in halves of a token of the picture by one of the copy
            found = middle // (2 * side)
            shown_by = shown_by * few + found
            apart += (middle - (2 * found + 1) * side).abs() * sides[1 - number]
        return Copy(copy, shown_by, apart)

    def places(self, missing: Tensor) -> Tensor:
        """(tokens of it,) int64 the token of ``missing``, (N,) bool, in whose place each stands; -1: it shows none of them.

        The nearest to the middle of what it shows, the first of several.
        """
        count, none = len(missing), torch.iinfo(torch.int64).max
        order = (self.apart * count + torch.arange(count)).masked_fill(~missing, none)
        first = torch.full((len(self.layout),), none).scatter_reduce(0, self.shown_by, order, "amin")
        return torch.where(first < none, first % count, -1)


@dataclass(frozen=True, eq=False)
class Pieces:
    """The tiles, windows or single tokens of one image that its encoder takes or leaves; CPU tensors.

    Args:
        of_token: (N, K) int64 pieces that each token is made of, -1 = none (newlines have none).
        overview: (num_pieces,) bool those that show the whole image at low resolution.
        place: (num_pieces, 2) int64 row and column of each among its equals; None: something else gives the overview.
        copy: what the overview is, where the picture comes without one: no token is made of it, but where a token is not
            encoded, one of the copy may stand in its place.
    """

    of_token: Tensor
    overview: Tensor
    place: Tensor | None = None
    copy: Copy | None = None

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
        """Whether all of it is encoded, and a copy of it thus not."""
        return bool((self.taken if self.pieces.copy is None else self.taken | self.pieces.overview).all())

    @cached_property
    def own(self) -> Tensor:
        """(N,) bool: tokens all of whose pieces are taken; newlines of rows that hold any."""
        if self.whole:
            return torch.ones(len(self.layout), dtype=torch.bool)
        found = (self.taken[self.pieces.of_token] | (self.pieces.of_token < 0)).all(1)
        return self.layout.with_newlines(found)

    @property
    def copy(self) -> VisionLayout | None:
        """The copy that is encoded beside them."""
        encoded = not self.whole and self.pieces.copy is not None and bool(self.taken[self.pieces.overview].any())
        return self.pieces.copy.layout if encoded else None

    @cached_property
    def places(self) -> Tensor:
        """(tokens of the copy,) int64 the token in whose place each stands, -1 = none."""
        if self.copy is None:
            return torch.empty(0, dtype=torch.int64)
        return self.pieces.copy.places(~self.own)

    @cached_property
    def tokens(self) -> Tensor:
        """(N,) bool: tokens that the encoder makes, and those in whose place one of the copy stands."""
        return self.own.index_fill(0, self.places[self.places >= 0], True)

    @cached_property
    def left(self) -> VisionLayout:
        """The layout of these tokens."""
        return self.layout if self.whole else self.layout.take(self.tokens)
