"""FastV: tokens leave at one early layer, by the attention of the last row."""

from __future__ import annotations

from typing import Literal

from crop.methods.ilp import InnerLLMPruning


def fastv(keep: float | int, layer: int | Literal["auto"] = "auto") -> InnerLLMPruning:
    """At decoder layer 2 (or the first that can) the tokens with most attention from the last row stay.

    Args:
        keep: fraction or count. layer: where the others leave.
    Source: FastV (arXiv 2403.06764). Departures: attention is read without eager mode; positions stay original.
    """
    return InnerLLMPruning(keep, layer=layer, rows="last", ring=0)
