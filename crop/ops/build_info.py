"""What this installation was built with."""

from __future__ import annotations

import platform
from typing import Any

import torch

from crop.ops import dispatch


def build_info() -> dict[str, Any]:
    """Describe the compiled kernels of this installation.

    Returns:
        ``native``: whether kernels were compiled at all; ``cuda``, ``cuda_archs``, ``nvcc``: the GPU part;
        ``cpu_isas``, ``cpu_isa``: instruction sets compiled and the one in use; versions of the others.
    """
    info: dict[str, Any] = {"native": dispatch.native is not None, "cuda": False, "cuda_archs": "", "nvcc": ""}
    info |= {"cpu_isas": [], "cpu_isa": "", "compiler": ""}
    if dispatch.native is not None:
        info |= dispatch.native.build_info()
    return info | {"torch": torch.__version__, "python": platform.python_version()}
