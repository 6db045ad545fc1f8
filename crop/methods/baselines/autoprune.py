"""AutoPrune: a logistic curve says how many tokens each layer keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from crop.methods.compose import Pyramid
from crop.methods.ilp import InnerLLMPruning


def auto_prune(keep: float, layers: Sequence[int], steepness: float = 8.0) -> Pyramid:
    """At many layers tokens leave by the attention of the last row, their number along a logistic curve.

    Args:
        keep: fraction that is left after the last layer. layers: where tokens leave, ascending.
        steepness: of the curve over the layers.
    Source: AutoPrune (arXiv 2509.23931). Departures: one curve for all questions, whose middle is that of the layers; the
        paper's depends on the mutual information of text and image, which would have to be read back from the device.
    """
    middle = (len(layers) - 1) / 2
    curve = [1 / (1 + math.exp(steepness * (n - middle) / len(layers))) for n in range(-1, len(layers))]
    high, low = curve[0], curve[-1]
    stages = [keep + (1 - keep) * (value - low) / (high - low) for value in curve[1:]]
    return Pyramid(
        tuple(
            InnerLLMPruning(share, layer=layer, rows="last", ring=0)
            for share, layer in zip(stages, layers, strict=True)
        )
    )
