"""Methods by name."""

from __future__ import annotations

from typing import Literal

from crop.methods.base import Method, check_choice, check_keep
from crop.methods.compose import Compose
from crop.methods.ilp import InnerLLMPruning
from crop.methods.plc import PreLLMCompression

# Of the way to the last token count, on a logarithmic scale, pooling goes this part. An early layer's attention chooses well for
# a question about a part of the image, less so for one about all of it: with half of the way the embedded model did worse.
POOL_SHARE = 0.75


def by_name(name: Literal["crop", "plc", "ilp", "none"], keep: float) -> Method | None:
    """Method with default settings that ends with a fraction ``keep`` of the vision tokens.

    Args:
        name: "plc" pools to ``keep``; "ilp" prunes to ``keep`` at layer 2; "crop" does both: pooling to
            ``keep ** POOL_SHARE``, then pruning to ``keep``; "none" is the unpruned model.
        keep: fraction in (0, 1]; 1.0 keeps everything (``plan`` and ``select`` return None).
    Returns:
        Method, or None for "none".
    Raises:
        ValueError: unknown name, ``keep`` out of range. TypeError: ``keep`` is not a float.
    Source: own choice; the paper does not publish how it splits a budget between the stages.
    """
    check_choice("by_name", "name", name, ("crop", "plc", "ilp", "none"))
    if not isinstance(keep, float):
        raise TypeError(f"by_name: keep must be a float in (0, 1], got {keep!r}")
    check_keep("by_name", keep)
    if name == "none":
        return None
    if name == "plc":
        return PreLLMCompression(keep=keep)
    if name == "ilp":
        return InnerLLMPruning(keep)
    return Compose(PreLLMCompression(keep=keep**POOL_SHARE), InnerLLMPruning(keep))
