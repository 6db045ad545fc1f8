"""PyramidDrop: tokens leave at several layers, an equal share at each."""

from __future__ import annotations

from collections.abc import Sequence

from crop.methods.compose import Pyramid


def pyramid_drop(keep: float, layers: Sequence[int] = (8, 16, 24)) -> Pyramid:
    """At several layers an equal share leaves, by the attention of the last row.

    Args:
        keep: fraction that is left after the last layer. layers: where tokens leave.
    Source: PyramidDrop (arXiv 2410.17247), without its training. Departures: as for ``fastv``; the share follows from
        ``keep`` (the paper's is one half).
    """
    return Pyramid.steps(layers, keep ** (1 / len(layers)), rows="last", ring=0)
