"""Which implementation runs: the compiled one of `crop._C`, or its twin in plain torch and numpy."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

# None where nothing was compiled. Any other import failure is a broken installation and must be seen.
native: Any = importlib.import_module("crop._C") if importlib.util.find_spec("crop._C") else None

chosen: ContextVar[str] = ContextVar("crop_backend", default="auto")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation of the operators, and of planning, inside a `with` block (per thread and per asyncio task).

    Args:
        name: "auto": compiled code; plain torch for CPU tensors where nothing was compiled. "native": compiled code or
            RuntimeError. "twin": plain torch (`crop.reference`) and numpy.
    Raises:
        ValueError: unknown name.
    """
    if name not in ("auto", "native", "twin"):
        raise ValueError(f'use_backend: name must be "auto", "native" or "twin", got {name!r}')
    token = chosen.set(name)
    try:
        yield
    finally:
        chosen.reset(token)


def planner() -> Any:
    """The compiled functions that plan on the host; None: their twins in numpy are to run."""
    return None if chosen.get() == "twin" else native
