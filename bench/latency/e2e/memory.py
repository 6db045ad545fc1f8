"""Peak memory of a call: torch's allocator on a GPU, the resident size of the process on Linux."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call holds at its peak above what was held before it; None where this cannot be measured.

    On CUDA: what torch has allocated. On CPU: growth of the resident size, after memory that was freed before has gone
    back to the system and the kernel's high-water mark has been set back.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        CLEAR.write_text("5")
    except (OSError, AttributeError):
        call()
        return None
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of the process: "VmRSS" now, "VmHWM" at most."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
