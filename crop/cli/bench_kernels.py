"""The operators of this installation, timed: compiled kernel against plain torch, beside the least that must be moved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from crop.ops import use_backend
from crop.selftest.cases import CASES, Case
from crop.selftest.timing import copy_bandwidth, graph_times, interleave

BACKENDS = {"kernel": "native", "plain torch": "twin"}


@torch.no_grad()
def measure_kernels(
    only: Sequence[str], device: torch.device, rounds: int, seconds: float | None, full: bool = True
) -> Iterator[dict[str, Any]]:
    """A row per case, right before fast: a wrong result stands in the place of its time.

    Args:
        only: names of ``CASES``. device: "cpu", or the current GPU.
        rounds: of timing. seconds: after which no case begins; None: all do. full: False, small tensors, for a rehearsal.
    Returns:
        Microseconds per call, medians: on a GPU in graph replay with a cold L2 (eager where one of the two cannot be captured).
        "timed": which of these, the same for both. "faults": how many of the two are wrong or fail; "note" says how.
        A case for which time was left over has a note alone.
        "floor us": the bytes of every implementation over the bandwidth of a copy, on a GPU.
    """
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
    start = time.monotonic()
    for name in only:
        for case in CASES[name](device, full):
            if seconds is not None and time.monotonic() - start > seconds:
                yield {"op": case.op, "shape": case.shape, "note": f"not run, nor what follows: {seconds:g} s are over"}
                return
            yield _row(case, device, rounds, bandwidth)


def _row(case: Case, device: torch.device, rounds: int, bandwidth: float | None) -> dict[str, Any]:
    def call(backend: str) -> Any:
        with use_backend(backend):
            return case.crop()

    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "MB": case.bytes / 1e6}
    row["floor us"] = case.bytes / bandwidth * 1e6 if bandwidth else None
    calls, notes = {}, []
    for name, backend in BACKENDS.items():
        try:
            error = case.error(call(backend))
        except RuntimeError as failure:  # not built, no room
            notes.append(f"{name} fails: {str(failure).splitlines()[0][:100]}")
            continue
        if error:
            notes.append(f"{name} is wrong: off by {error:.3g}")
            continue
        calls[name] = lambda backend=backend: call(backend)
    row["timed"], times = _times(calls, device, rounds)
    row |= {f"{name} us": times.get(name) for name in BACKENDS}
    both = len(times) == len(BACKENDS) and times["kernel"] > 0
    row["times as fast"] = times["plain torch"] / times["kernel"] if both else None
    return row | {"faults": len(notes), "note": "; ".join(notes)}


def _times(calls: dict[str, Any], device: torch.device, rounds: int) -> tuple[str, dict[str, float]]:
    """ "cold" or "eager", and microseconds of each: one kind of time, as they are to be compared."""
    if not calls:
        return "", {}
    if device.type == "cuda":
        found = {name: graph_times(call, rounds, device) for name, call in calls.items()}
        kind = "eager" if any(one["cold"] is None for one in found.values()) else "cold"
        return kind, {name: one[kind] for name, one in found.items()}
    return "eager", {name: 1e6 * one.median for name, one in interleave(calls, rounds=rounds).items()}
