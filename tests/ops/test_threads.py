"""The threads of the CPU kernels: what the system refuses, floating-point settings, code of one instruction set."""

from __future__ import annotations

import contextlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crop.ops import dispatch

CPU = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
compiled = pytest.mark.skipif(dispatch.native is None, reason="no kernels were compiled")

# Takes the path of the compiled module, which does not need torch: no other library has threads here.
REFUSED = """
import array, importlib.util, os, resource, sys
spec = importlib.util.spec_from_file_location("crop._C", sys.argv[1])
C = importlib.util.module_from_spec(spec); spec.loader.exec_module(C)
images, tokens = 64, 4096
score = array.array("f", range(tokens)) * images
kept = array.array("q", [0]) * images

def call():
    kept[:] = array.array("q", [-7]) * images
    code = C.select(-1, 4, score.buffer_info()[0], 0, 0, 0, [1] * images, kept.buffer_info()[0], images, tokens, 1)
    assert code == 0 and set(kept) == {tokens - 1}, (code, kept)
    return len(os.listdir("/proc/self/task"))

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), before[1]))  # a thread's stack does not fit
few = call(), call()
resource.setrlimit(resource.RLIMIT_AS, before)
print(*few, call())
"""


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_refused_threads_come_later() -> None:
    """Without a thread to be had the caller does the work; the next call tries again."""
    command = [sys.executable, "-c", REFUSED, dispatch.native.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["1", "1", "4"], done.stdout + done.stderr


@contextlib.contextmanager
def flush_denormal(flush: bool) -> Iterator[None]:
    """The setting is one of the calling thread."""
    if not torch.set_flush_denormal(flush):
        pytest.skip("this CPU always keeps denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@compiled
def test_threads_flush_denormals_as_the_caller() -> None:
    cells, dim = 4096, 256
    tokens, out = torch.full((2 * cells, dim), 1e-40), torch.empty(cells, dim)
    members = torch.arange(2 * cells, dtype=torch.int32)
    offsets = torch.arange(0, 2 * cells + 1, 2, dtype=torch.int32)
    for flush in (False, True, False) * 10:
        with flush_denormal(flush):
            code = dispatch.native.adaptive_pool(
                -1, 4, tokens.data_ptr(), members.data_ptr(), offsets.data_ptr(), 0, out.data_ptr(), 0,
                2 * cells, dim, 2 * cells, cells, dim, 0, 0,
            )  # fmt: skip
        assert code == 0 and bool((out == 0).all() if flush else (out > 0).all())


@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("nm"), reason="no g++ or nm")
@pytest.mark.parametrize("source", sorted(CPU.glob("*.cpp")), ids=lambda path: path.stem)
def test_code_of_one_instruction_set_is_named_so(source: Path, tmp_path: Path) -> None:
    """The linker keeps one copy of an inline function: one under a common name might be the AVX-512 one everywhere."""
    flags = ["-march=x86-64-v4"] if platform.machine() == "x86_64" else []
    done = tmp_path / "source.o"
    command = ["g++", "-std=c++17", "-O0", *flags, "-DCROP_ISA=probe", "-c", str(source), "-o", str(done)]
    subprocess.run(command, check=True)  # -O0: inline functions have code of their own
    names = subprocess.run(["nm", "-C", "--defined-only", "-g", done], capture_output=True, text=True, check=True)
    others = [line for line in names.stdout.splitlines() if "crop::probe::" not in line]
    assert names.stdout and others == []
