"""Peers to compare with: plain controls and published methods, as methods of this package.

Each was written from its paper; what departs from it stands in the class. None looks at the region.

    controls                      published
    random    RandomTokens        fastv        InnerLLMPruning(rows="last")
    uniform   UniformGrid         visionzip    VisionZip
    average   AveragePooling      divprune     DivPrune
                                  cdpruner     CDPruner
                                  tome         TokenMerging
"""

from __future__ import annotations

from collections.abc import Callable

from crop.baselines.controls import AveragePooling, RandomTokens, UniformGrid
from crop.baselines.features import CDPruner, DivPrune, TokenMerging, VisionZip
from crop.methods import InnerLLMPruning, Method

__all__ = [
    "BASELINES",
    "AveragePooling",
    "CDPruner",
    "DivPrune",
    "RandomTokens",
    "TokenMerging",
    "UniformGrid",
    "VisionZip",
    "fastv",
]


def fastv(keep: float | int, layer: int = 2) -> InnerLLMPruning:
    """FastV: at decoder layer 2 the tokens with most attention from the last row stay.

    Args:
        keep: fraction or count. layer: where the others leave.
    Source: FastV (arXiv 2403.06764). Departures: attention is read without eager mode; positions stay original.
    """
    return InnerLLMPruning(keep, layer=layer, rows="last", ring=0, floor=0)


BASELINES: dict[str, Callable[[float | int], Method]] = {
    "random": RandomTokens,
    "uniform": UniformGrid,
    "average": AveragePooling,
    "fastv": fastv,
    "visionzip": VisionZip,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "tome": TokenMerging,
}
