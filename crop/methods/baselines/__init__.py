"""Peers to compare with: plain controls and published methods, as methods of this package.

Each was written from its paper; what departs from it stands in the class. None looks at the region. ``keep`` is a
fraction in (0, 1] or a token count (of ``pyramid_drop`` a fraction).

    controls                      before the decoder           inside it
    random    RandomTokens        visionzip    VisionZip       fastv         InnerLLMPruning(rows="last")
    uniform   UniformGrid         divprune     DivPrune        pyramiddrop   Pyramid
    average   AveragePooling      cdpruner     CDPruner        sparsevlm     SparseVLM
                                  tome         TokenMerging    dart          Dart
                                  scope        Scope           autoprune     Pyramid
                                  vispruner    VisPruner
                                  hiprune      HiPrune
"""

from __future__ import annotations

from collections.abc import Callable

from crop.methods.base import Method
from crop.methods.baselines.autoprune import auto_prune
from crop.methods.baselines.cdpruner import CDPruner
from crop.methods.baselines.controls import AveragePooling, RandomTokens, UniformGrid
from crop.methods.baselines.dart import Dart
from crop.methods.baselines.divprune import DivPrune
from crop.methods.baselines.fastv import fastv
from crop.methods.baselines.hiprune import HiPrune
from crop.methods.baselines.pyramiddrop import pyramid_drop
from crop.methods.baselines.scope import Scope
from crop.methods.baselines.sparsevlm import SparseVLM
from crop.methods.baselines.tome import TokenMerging
from crop.methods.baselines.visionzip import VisionZip
from crop.methods.baselines.vispruner import VisPruner

__all__ = [
    "BASELINES",
    "AveragePooling",
    "CDPruner",
    "Dart",
    "DivPrune",
    "HiPrune",
    "RandomTokens",
    "Scope",
    "SparseVLM",
    "TokenMerging",
    "UniformGrid",
    "VisPruner",
    "VisionZip",
    "auto_prune",
    "fastv",
    "pyramid_drop",
]


def _depth(num_layers: int | None, name: str) -> int:
    if num_layers is None:
        raise ValueError(
            f"by_name: num_layers must be given for {name!r}, whose cuts are spread over the depth, got None"
        )
    return num_layers


def _quarters(num_layers: int) -> list[int]:
    return [max(1, num_layers * part // 4) for part in (1, 2, 3)]


def _eighths(num_layers: int) -> list[int]:
    return sorted({max(1, num_layers * part // 8) for part in (1, 2, 3, 4, 5)})


# (fraction that is left in the end, decoder layers of the model or None) -> method
BASELINES: dict[str, Callable[[float, int | None], Method]] = {
    "random": lambda keep, num_layers: RandomTokens(keep),
    "uniform": lambda keep, num_layers: UniformGrid(keep),
    "average": lambda keep, num_layers: AveragePooling(keep),
    "visionzip": lambda keep, num_layers: VisionZip(keep),
    "divprune": lambda keep, num_layers: DivPrune(keep),
    "cdpruner": lambda keep, num_layers: CDPruner(keep),
    "scope": lambda keep, num_layers: Scope(keep),
    "vispruner": lambda keep, num_layers: VisPruner(keep),
    "hiprune": lambda keep, num_layers: HiPrune(keep),
    "tome": lambda keep, num_layers: TokenMerging(keep),
    "fastv": lambda keep, num_layers: fastv(keep),
    "sparsevlm": lambda keep, num_layers: SparseVLM(keep),
    "pyramiddrop": lambda keep, num_layers: pyramid_drop(keep, _quarters(_depth(num_layers, "pyramiddrop"))),
    "dart": lambda keep, num_layers: Dart(keep),
    "autoprune": lambda keep, num_layers: auto_prune(keep, _eighths(_depth(num_layers, "autoprune"))),
}
