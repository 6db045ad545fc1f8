"""Peers to compare with: plain controls and published methods, as methods of this package.

Each was written from its paper; what departs from it stands in the class. None looks at the region. ``keep`` is a
fraction in (0, 1] or a token count (of ``pyramid_drop`` a fraction).

    controls                      before the decoder           inside it
    random    RandomTokens        visionzip    VisionZip       fastv         InnerLLMPruning(rows="last")
    uniform   UniformGrid         divprune     DivPrune        pyramiddrop   Pyramid
    average   AveragePooling      cdpruner     CDPruner        sparsevlm     SparseVLM
                                  tome         TokenMerging
"""

from __future__ import annotations

from collections.abc import Callable

from crop.methods.base import Method
from crop.methods.baselines.cdpruner import CDPruner
from crop.methods.baselines.controls import AveragePooling, RandomTokens, UniformGrid
from crop.methods.baselines.divprune import DivPrune
from crop.methods.baselines.fastv import fastv
from crop.methods.baselines.pyramiddrop import pyramid_drop
from crop.methods.baselines.sparsevlm import SparseVLM
from crop.methods.baselines.tome import TokenMerging
from crop.methods.baselines.visionzip import VisionZip

__all__ = [
    "BASELINES",
    "AveragePooling",
    "CDPruner",
    "DivPrune",
    "RandomTokens",
    "SparseVLM",
    "TokenMerging",
    "UniformGrid",
    "VisionZip",
    "fastv",
    "pyramid_drop",
]


def _quarters(num_layers: int | None) -> list[int]:
    if num_layers is None:
        raise ValueError(
            "by_name: num_layers must be given for 'pyramiddrop', whose cuts are spread over the depth, got None"
        )
    return [max(1, num_layers * part // 4) for part in (1, 2, 3)]


# (fraction that is left in the end, decoder layers of the model or None) -> method
BASELINES: dict[str, Callable[[float, int | None], Method]] = {
    "random": lambda keep, num_layers: RandomTokens(keep),
    "uniform": lambda keep, num_layers: UniformGrid(keep),
    "average": lambda keep, num_layers: AveragePooling(keep),
    "visionzip": lambda keep, num_layers: VisionZip(keep),
    "divprune": lambda keep, num_layers: DivPrune(keep),
    "cdpruner": lambda keep, num_layers: CDPruner(keep),
    "tome": lambda keep, num_layers: TokenMerging(keep),
    "fastv": lambda keep, num_layers: fastv(keep),
    "sparsevlm": lambda keep, num_layers: SparseVLM(keep),
    "pyramiddrop": lambda keep, num_layers: pyramid_drop(keep, _quarters(num_layers)),
}
