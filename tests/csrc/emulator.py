"""Builds the emulator with g++ (once per content) and puts it in the place of the native module."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crop.ops import dispatch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
BASE = ["-std=c++20", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
RACE = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "--param=tsan-distinguish-volatile=1"]
FLAVOURS = {  # flags of kernels, of the runtime, of the linker
    "plain": (["-O2"], ["-O2"], []),
    "asan": (["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fsanitize-recover=address"],
             ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address", "-fsanitize-recover=address"], ["-fsanitize=address"]),
    "race": (["-O1", *RACE], ["-O2", "-DSIMT_RACE"], []),
}  # fmt: skip
RUNTIME = ("simt", "warp", "shared", "check", "hooks", "reports")  # sources of the emulator itself
POLICIES = {"forward": 0, "reverse": 1, "random": 2}
OPERATORS = (
    "attention_mass",
    "select",
    "pack",
    "compact",
    "invert_index",
    "spread",
    "saliency",
    "adaptive_pool",
    "adaptive_pool_backward",
)


def toolkit() -> Path | None:
    """Folder of the CUDA toolkit's headers: types and half precision arithmetic, no library."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parent.parent]
    return next((Path(home, "include") for home in homes if home and Path(home, "include/cuda_bf16.h").exists()), None)


def missing(flavour: str = "plain") -> str | None:
    """Why the emulator cannot run here, or None."""
    if not shutil.which("g++") or not toolkit():
        return "the emulator needs g++ and the headers of the CUDA toolkit"
    if flavour == "asan" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        return "the sanitizer build runs in a process of its own"
    return None


def _gcc(*arguments: str) -> None:
    env = {
        name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
    }  # the sanitizer is not for the compiler
    subprocess.run(["g++", *arguments], check=True, env=env)


def _compile(source: Path, flags: list[str]) -> Path:
    """Object file of a source as it and the headers are now; compiled unless it is in the cache."""
    digest = hashlib.sha256(repr(flags).encode())
    for path in (source, *sorted({*HERE.glob("*.h"), *CSRC.rglob("*.*h")})):
        digest.update(path.name.encode() + path.read_bytes())
    target = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}.o")
        _gcc(*BASE, *flags, "-c", str(source), "-o", str(unfinished))
        unfinished.replace(target)  # at once: somebody else may compile the same
    return target


def build(flavour: str, kernels: tuple[Path, ...], host: tuple[Path, ...] = (), link: tuple[str, ...] = ()) -> Path:
    """Build an emulator around CUDA sources, two compilers at a time.

    Args:
        flavour: of FLAVOURS.
        kernels: CUDA sources, compiled with simt.h ahead.
        host: C++ sources with Python bindings, the same in every flavour.
        link: flags of the linker.
    Returns:
        The shared library.
    """
    import pybind11

    kernel_flags, runtime_flags, link_flags = FLAVOURS[flavour]
    system = [f"-isystem{toolkit()}"]
    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    bindings = ["-g0", "-DCROP_HAVE_CUDA=1", '-DCROP_CUDA_ARCHS=""', '-DCROP_NVCC=""', *python]
    jobs = [(source, [*system, "-x", "c++", "-include", str(HERE / "simt.h"), *kernel_flags]) for source in kernels]
    jobs += [(HERE / f"{name}.cpp", [*system, *runtime_flags]) for name in RUNTIME]
    jobs += [(source, bindings) for source in host]
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    digest = hashlib.sha256(repr((objects, link)).encode())
    target = CACHE / f"{flavour}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}.so")
        _gcc("-shared", *link_flags, *link, *map(str, objects), "-o", str(unfinished))
        unfinished.replace(target)
    return target


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    """The emulator's own interface: emu_config, emu_take, emu_give_back, emu_report, emu_statistics."""
    emu = ctypes.CDLL(str(path))
    emu.emu_report.restype = ctypes.c_char_p
    emu.emu_take.restype = ctypes.c_void_p
    if hasattr(emu, "emu_statistics"):
        emu.emu_statistics.restype = ctypes.c_char_p
    return emu


@functools.cache
def _module(flavour: str) -> tuple[Any, ctypes.CDLL]:
    kernels = tuple(sorted(path for path in CSRC.rglob("*.cu") if path.stem != "cuda_error"))
    wraps = tuple(f"-Wl,--wrap=launch_{name}" for name in OPERATORS)
    host = (CSRC / "bindings.cpp", *sorted((CSRC / "host").glob("*.cpp")), HERE / "operators.cpp")
    path = build(flavour, kernels, host, wraps)
    spec = importlib.util.spec_from_file_location(f"crop_emulated_{flavour}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, load(path)


def in_sanitizer_process(tests: str, keyword: str) -> None:
    """Run tests with AddressSanitizer ahead of Python; AssertionError with their output if one fails."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    options = "detect_leaks=0:halt_on_error=0:suppress_equal_pcs=0:detect_stack_use_after_return=0"
    env = os.environ | {"LD_PRELOAD": library.strip(), "EMU_BUILD": "asan", "ASAN_OPTIONS": options}
    command = [sys.executable, "-m", "pytest", "-x", "-k", keyword, "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


class EmulatorReport(AssertionError):
    """The emulator found a fault in a kernel."""


@dataclass(frozen=True)
class Emulated:
    """Stands where `crop._C` stands: operators on CPU tensors run the CUDA launchers on the emulator."""

    flavour: str = "race"
    policy: str = "forward"
    seed: int = 0
    residents: int = 1
    cluster: int = 8  # blocks of the largest; 1 before sm_90
    without: tuple[str, int] = ("", 0)  # file and line of a barrier that lets everybody through
    has_cuda = True

    def __getattr__(self, name: str) -> Any:
        module, emu = _module(self.flavour)
        function = getattr(module, name)
        if not name.startswith(OPERATORS):
            return function
        if name.endswith("scratch"):
            return lambda device, *args: function(0, *args)

        def launch(device: int, target: int, *args: Any) -> int:
            emu.emu_config(POLICIES[self.policy], self.seed, self.residents, self.cluster)
            emu.emu_without(self.without[0].encode(), self.without[1])
            code = function(0, 0, *args)
            report = emu.emu_report().decode()
            if code > 0 or report:
                text = report or module.last_error()
                raise EmulatorReport(f"{name} ({self.flavour}, {self.policy}, seed {self.seed}):\n{text}")
            return code

        return launch

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Operators on CPU tensors run on the emulator inside the block."""
        before, dispatch.native = dispatch.native, self
        try:
            yield
        finally:
            dispatch.native = before

    def statistics(self) -> dict[str, dict[str, int]]:
        """Race build: per kernel what it did since the last call, see emu_statistics."""
        names = ("launches", "blocks", "threads", "switches", "static_bytes", "dynamic_bytes")
        names += ("read", "read_distinct", "written", "written_distinct")
        lines = _module(self.flavour)[1].emu_statistics().decode().splitlines()
        rows = [line.split("\t") for line in lines]
        return {row[0]: dict(zip(names, map(int, row[1:]), strict=True)) for row in rows}
