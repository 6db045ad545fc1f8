"""Prefills of compiled decoder layers: by inductor, or as CUDA graphs that are replayed by the number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.latency.e2e.workload import Model

# Graphs of torch.compile are keyed by the shapes of the inputs, which are those of the tokens that a layer holds.
MODES = {"layers": None, "graphs": "reduce-overhead"}
BACKEND = "inductor"


def compile_layers(model: Model, how: str) -> None:
    """Compile every decoder layer, at its first call and for each length on its own; ``how``: of ``MODES``.

    Raises:
        ValueError: graphs without a CUDA device.
    """
    if how == "graphs" and model.model.device.type != "cuda":
        raise ValueError(f"compiled: graphs need a CUDA device, got {model.model.device}; use layers")
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 1024
    config.fail_on_recompile_limit_hit = True  # or a layer would fall back to the eager loop in silence
    for layer in model.decoder.layers:
        layer.compile(dynamic=False, backend=BACKEND, mode=MODES[how])


@contextmanager
def running(compiled: bool) -> Iterator[None]:
    """Compiled layers run as compiled, or as if they were not."""
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()  # what an earlier answer holds may be overwritten
        yield
