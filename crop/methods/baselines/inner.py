"""Published methods that drop tokens inside the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from crop.methods.compose import Pyramid
from crop.methods.ilp import InnerLLMPruning


def fastv(keep: float | int, layer: int = 2) -> InnerLLMPruning:
    """FastV: at decoder layer 2 the tokens with most attention from the last row stay.

    Args:
        keep: fraction or count. layer: where the others leave.
    Source: FastV (arXiv 2403.06764). Departures: attention is read without eager mode; positions stay original.
    """
    return InnerLLMPruning(keep, layer=layer, rows="last", ring=0, floor=0)


def pyramid_drop(keep: float, layers: Sequence[int] = (8, 16, 24)) -> Pyramid:
    """PyramidDrop: at several layers an equal share leaves, by the attention of the last row.

    Args:
        keep: fraction that is left after the last layer. layers: where tokens leave.
    Source: PyramidDrop (arXiv 2410.17247), without its training. Departures: as for ``fastv``; the share follows from
        ``keep`` (the paper's is one half).
    """
    return Pyramid.steps(layers, keep ** (1 / len(layers)), rows="last", ring=0, floor=0)


@dataclass(frozen=True)
class SparseVLM(InnerLLMPruning):
    """Tokens stay by the attention of the text rows that look at the image most; some of the others are recycled.

    Of the tokens that leave, the best ``recycled`` are merged into the most similar of the ``seeds``, the last of those
    that stay.

    Args:
        keep, layer: as in ``InnerLLMPruning``. seeds: share of the kept tokens that take others in, in [0, 1).
        recycled: share of the others that they take in, in [0, 1].
    Source: SparseVLM (arXiv 2410.04417). Departures: one cut of a given size, not sizes by the rank of the attention;
        raters are the rows whose attention to the image is at least average in the scoring layer, not by similarity of
        embeddings; recycled tokens join the nearest seed, not a cluster found by density peaks.
    """

    rows: Literal["text", "last", "raters"] = "raters"
    ring: int = 0
    floor: int = 0
    seeds: float = 0.1
    recycled: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.seeds < 1 and 0 <= self.recycled <= 1):
            raise ValueError(
                f"SparseVLM: seeds must be in [0, 1) and recycled in [0, 1], got {self.seeds} and {self.recycled}"
            )

    def recycle(self, num_keep: int, num_candidates: int) -> tuple[int, int]:
        """Seeds and recycled tokens of an image."""
        seeds = min(round(self.seeds * num_keep), num_keep - 1)
        return (seeds, round(self.recycled * (num_candidates - num_keep))) if seeds else (0, 0)
