"""Timers: interleaved calls on any device, CUDA-graph replay and copy bandwidth on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
FLUSH = 256 << 20  # bytes: more than the L2 of any GPU. Read, not written: what is written must first leave L2


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and spread over the rounds."""

    median: float
    p10: float
    p90: float


def timing(values: Sequence[float]) -> Timing:
    """Median and deciles of measured values."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), deciles[0], deciles[-1])


def interleave(
    contenders: Mapping[str, Call], *, rounds: int = 20, warmup: int = 2, repeat: int = 1
) -> dict[str, Timing]:
    """Time every contender once per round, in turn, so that a busy machine slows all of them alike.

    Args:
        rounds: timed rounds. warmup: untimed ones. repeat: calls per timing, for work of microseconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, call in contenders.items():
            _synchronize()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            _synchronize()
            if turn >= warmup:
                seconds[name].append((time.perf_counter() - start) / repeat)
    return {name: timing(values) for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def event_us(call: Call, rounds: int) -> float:
    """Median microseconds of a call on the current GPU, by events."""
    times = []
    for turn in range(rounds + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)


def graph(call: Call, repeat: int) -> Call:
    """Replay of a CUDA graph of ``repeat`` calls; the call has run before."""
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(repeat):
            call()
    return captured.replay


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy inside the GPU's memory, reads and writes counted."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (event_us(lambda: target.copy_(source), 20) * 1e-6)


def graph_times(call: Call, rounds: int, device: torch.device) -> dict[str, float | None]:
    """Microseconds of a call on a GPU: "warm" and "cold" (L2 emptied before it) in graph replay, "eager" without.

    "warm" and "cold" are None where the call cannot be captured, because it synchronises or allocates.
    """
    for _ in range(3):
        call()
    repeat = min(20, max(1, int(2000 / event_us(call, 3))))  # two milliseconds of them
    eager = event_us(lambda: [call() for _ in range(repeat)], rounds) / repeat
    data = torch.zeros(FLUSH // 4, device=device)

    def flushed() -> None:
        data.sum()
        call()

    try:
        warm = event_us(graph(call, repeat), rounds) / repeat
        empty, cold = graph(data.sum, 5), graph(flushed, 5)
    except RuntimeError:
        torch.cuda.synchronize()
        return {"warm": None, "cold": None, "eager": eager}
    return {"warm": warm, "cold": max(event_us(cold, rounds) - event_us(empty, rounds), 0.0) / 5, "eager": eager}
