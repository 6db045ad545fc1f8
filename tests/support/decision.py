"""What a method decides about one sample, as the oracle says it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

NEAR_TIE = 1e-5  # relative gap below which float32 may decide otherwise
Kept = tuple[tuple[int, ...], ...]  # per image, ascending indices into its cells


@dataclass(frozen=True)
class Decision:
    """What happens to the images of one sample.

    Attributes:
        mode: "mean", "max" or "distinct" pooling.
        patches: per image, the indices of its tokens that are no padding and no newline.
        encoded: per image, the indices of its tokens that the encoder made; empty: all of all.
        copied: per image, what stands for the others: (index of a token, token of a small copy in its place).
        cells: per image, one (members, leader) per token after pooling, as indices in the image.
        cuts: (first decoder layer without the others, cells that are left per image), ascending.
        scores: per image, the float64 attention mass of every cell at the last cut (empty where not computed).
        near_tie: some cut between kept and dropped falls between scores closer than `NEAR_TIE`.
    """

    mode: str = "mean"
    patches: tuple[tuple[int, ...], ...] = ()
    encoded: tuple[tuple[int, ...], ...] = ()
    copied: tuple[tuple[tuple[int, int], ...], ...] = ()
    cells: tuple[tuple[tuple[tuple[int, ...], int], ...], ...] = ()
    cuts: tuple[tuple[int, Kept], ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()
    near_tie: bool = False

    def kept_at(self, layer: int) -> Kept:
        """The cells of each image that `layer` sees."""
        every = tuple(tuple(range(len(cells))) for cells in self.cells)
        return [every, *(kept for first, kept in self.cuts if first <= layer)][-1]

    @property
    def kept(self) -> Kept:
        """The cells of each image that the last layer sees."""
        return self.kept_at(10**9)

    def kept_original(self, image: int, layer: int = 10**9) -> list[int]:
        """Ascending indices among the image's original tokens that survive (leaders of cells)."""
        return [self.cells[image][k][1] for k in self.kept_at(layer)[image]]

    def counts(self) -> list[tuple[int, int, int]]:
        """(original, after pooling, after dropping) tokens per image."""
        return [
            (sum(len(members) for members, _ in cells), len(cells), len(kept))
            for cells, kept in zip(self.cells, self.kept, strict=True)
        ]

    def cut(self, layer: int, kept: dict[int, tuple[int, ...]]) -> Decision:
        """From `layer` on, these images have these cells only."""
        cuts = []
        for first in sorted({layer, *(first for first, _ in self.cuts)}):
            cells = self.kept_at(first)
            if first >= layer:
                cells = tuple(kept.get(image, old) for image, old in enumerate(cells))
            cuts.append((first, cells))
        return replace(self, cuts=tuple(cuts))


@dataclass
class Steps:
    """Greedy generation: the token and the logits of each step."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def encoded(method: Any, layout: Any, region: Any, pieces: Any) -> list[int]:
    """Ascending indices of an image's tokens all of whose pieces are encoded; `pieces` None: all.

    A newline has none; it goes with its row, of which something must be encoded.
    """
    taken = None if pieces is None else method.encode(layout, region, pieces)
    if taken is None or taken.all():
        return list(range(len(layout)))
    made_of = [[p for p in row if p >= 0] for row in pieces.of_token.tolist()]
    known = [n for n, own in enumerate(made_of) if own and all(taken[p] for p in own)]
    rows = {(int(layout.view[n]), int(layout.row[n])) for n in known}
    newlines = [n for n, own in enumerate(made_of) if not own]
    return sorted(known + [n for n in newlines if (int(layout.view[n]), int(layout.row[n])) in rows])


def smaller(layout: Any) -> tuple[int, int]:
    """Rows and columns of tokens of a copy with a quarter of the sides."""
    _, *sides = layout.extent
    return tuple(max(1, math.floor(side / 4 + 0.5)) for side in sides)


def copied(method: Any, layout: Any, region: Any, pieces: Any, own: list[int]) -> list[tuple[int, int]]:
    """(index of a token, token of the copy in its place): of those that a token of the copy shows and that are not among
    ``own``, the one nearest to the middle, the first of several."""
    if pieces is None or pieces.copy is None or len(own) == len(layout):
        return []
    if not method.encode(layout, region, pieces)[pieces.overview].any():
        return []
    (_, *sides), small, found = layout.extent, smaller(layout), {}
    for n in range(len(layout)):
        number, apart = int(layout.view[n]), Fraction(0)
        for place, side, few in zip((layout.row[n], layout.col[n]), sides, small, strict=True):
            middle = Fraction(2 * int(place) + 1, 2 * side) * few
            number = number * few + math.floor(middle)
            apart += abs(middle - math.floor(middle) - Fraction(1, 2))
        if n not in own:
            found.setdefault(number, []).append((apart, n))
    return sorted((min(candidates)[1], number) for number, candidates in found.items())


def cells_of(plan: Any, part: Any, known: list[int]) -> tuple[tuple, Any]:
    """(members, leader) of every cell of one image, and its layout after pooling; `known`: its tokens that are encoded, of
    which `part` is the layout and for which `plan` was made."""
    if plan is None:
        return tuple(((n,), n) for n in known), part
    edges, leaders = plan.offsets.tolist(), [known[n] for n in plan.leader.tolist()]
    members = [known[n] for n in plan.members.tolist()]
    cells = tuple((tuple(members[edges[c] : edges[c + 1]]), leader) for c, leader in enumerate(leaders))
    return cells, part.pool(plan, torch.arange(len(leaders)))


def choose(
    mass: tuple[float, ...], num_keep: int, priority: list[int], weight: Tensor | None
) -> tuple[tuple[int, ...], bool]:
    """Ascending kept indices, and whether the cut is too close to call in float32."""
    factor = [1.0] * len(mass) if weight is None else weight.tolist()
    score = [m * w for m, w in zip(mass, factor, strict=True)]
    order = [n for n in range(len(mass)) if priority[n] >= 0]
    order.sort(key=lambda n: (-priority[n], -score[n], n))
    kept, rest = order[:num_keep], order[num_keep:]
    near = False
    if kept and rest and priority[kept[-1]] == priority[rest[0]]:
        high, low = score[kept[-1]], score[rest[0]]
        near = 0 < abs(high - low) <= NEAR_TIE * max(abs(high), abs(low))
    return tuple(sorted(kept)), near
