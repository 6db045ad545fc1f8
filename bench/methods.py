"""The methods that benches compare, by name: the one place that knows where they come from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from crop.methods import Method, by_name, method_names

Make = Callable[[float, int], Method]  # (fraction that is left in the end, decoder layers of the model) -> method
OURS = {"ILP": "ilp", "PLC": "plc", "diverse": "diverse", "both": "crop"}  # names of the tables


def ours(keep: float) -> dict[str, Method]:
    """Ours with default settings, by the names of the tables; they need a region."""
    return {name: by_name(kind, keep) for name, kind in OURS.items()}


def others() -> dict[str, Make]:
    """What ours is compared with: baselines, and whatever else is registered; they get the whole image as region."""
    names = [name for name in method_names() if name not in (*OURS.values(), "none")]
    return {name: partial(by_name, name) for name in names}
