"""Every operator of this installation against its definition: kernel and twin, on small tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from crop import ops
from crop.ops.build_info import build_info
from crop.ops.dispatch import native
from crop.selftest.cases import CASES
from crop.selftest.options import difference, option_calls

Status = Literal["ok", "slow", "missing", "refused", "WRONG"]


@dataclass(frozen=True)
class Finding:
    """What a check found out about one subject.

    Args:
        status: "slow": right, but plain torch in the place of a kernel. "missing": something optional is not there, or this check cannot tell.
            "refused": crop does not work with it, and says why. "WRONG": a result is.
        detail: what was checked, or what is the matter and what to do.
    """

    status: Status
    subject: str
    detail: str

    @property
    def good(self) -> bool:
        """Whether crop can be used all the same."""
        return self.status not in ("refused", "WRONG")


def check_kernels() -> Iterator[Finding]:
    """What was built, on the CPU and for a GPU that is there."""
    info = build_info()
    reinstall = "pip install --force-reinstall crop-vlm"
    if info["native"]:
        yield Finding("ok", "CPU kernels", f"{info['cpu_isa']} in use of {', '.join(info['cpu_isas'])}")
    else:
        yield Finding("slow", "CPU kernels", f"not built: plain torch; with a C++ compiler: {reinstall}")
    if not torch.cuda.is_available():
        yield Finding("missing", "GPU", "torch sees none")
    elif info["cuda"]:
        yield Finding("ok", "CUDA kernels", f"{info['cuda_archs']}, on {torch.cuda.get_device_name()}")
    else:
        yield Finding("refused", "CUDA kernels", f"not built; with nvcc: CROP_BUILD=cuda {reinstall}")


def check_operators(device: torch.device) -> Iterator[Finding]:
    """Every case on small tensors, by the compiled kernels where there are some and by their twins in plain torch; the kernels
    against the twins with every option."""
    compiled = native is not None and (device.type == "cpu" or native.has_cuda)
    backends = {"kernel": "native", "twin": "twin"} if compiled else {"twin": "twin"}
    counts: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    for cases in CASES.values():
        for case in cases(device, False):
            operator = case.op.partition(",")[0]
            for name, backend in backends.items():
                counts[operator] += 1
                try:
                    with ops.use_backend(backend):
                        error = case.error(case.crop())
                except Exception as failure:  # of CUDA, or a TypeError of kernels that were built from another source
                    wrong.setdefault(operator, f"{name}, {case.op}, {case.shape}: {_said(failure)}")
                    continue
                if error:
                    wrong.setdefault(operator, f"{name}, {case.op}, {case.shape}: off by {error:.3g}")
    for operator, what, call in option_calls(device) if compiled else ():
        counts[operator] += 1
        results = []
        try:
            for backend in backends.values():
                with ops.use_backend(backend):
                    results.append(call())
        except Exception as failure:
            wrong.setdefault(operator, f"{what}: {_said(failure)}")
            continue
        if error := difference(*results):
            wrong.setdefault(operator, f"{what}: kernel and twin are {error:.3g} apart")
    for operator, count in counts.items():
        if operator in wrong:
            yield Finding("WRONG", operator, f"on {device.type}: {wrong[operator]}")
        else:
            detail = f"on {device.type}: {count} results, by {' and '.join(backends)}"
            yield Finding("ok" if compiled else "slow", operator, detail)


def _said(failure: Exception) -> str:
    """Its kind and its first line."""
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
