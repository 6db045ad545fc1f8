"""What can be said of the CUDA kernels without a GPU: what the compiler makes of them (registers, shared memory, spills, warps
of an SM) and, from the emulator of the tests, the bytes they ask of global memory against the floor.

    python -m bench.kernels.static [--archs 80 90 100] [--out bench/results/kernels_static.txt]

`compile_kernels` and `disassemble` also serve the tests that hold the kernels to their budget.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = ("attention_mass", "select", "pack", "compact", "spread", "saliency", "adaptive_pool")
REGISTERS, MAX_WARPS = 65536, {"86": 48, "89": 48, "120": 48}  # of an SM; 64 warps where nothing is said
SHARED = {"80": 164, "86": 100, "89": 100, "90": 228, "100": 228, "120": 100}  # KiB of an SM
DRIVER_SHARED = 1024  # bytes of every block that the driver keeps for itself


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str  # e.g. mass_mma_kernel<128, 1, 0>
    arch: str
    registers: int
    shared: int  # bytes per block
    spilled: int  # bytes of stores and loads
    stack: int

    def warps(self, threads: int) -> int:
        """Warps of an SM that run at once in blocks of `threads`, by registers, shared memory and slots."""
        block = threads // 32
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256) // block
        by_shared = SHARED[self.arch] * 1024 // (self.shared + DRIVER_SHARED)
        return min(by_registers, by_shared, MAX_WARPS.get(self.arch, 64) // block, 32) * block


def find_nvcc() -> str | None:
    """The toolkit's compiler, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(Path(home, "bin", "nvcc")) or shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """The disassembler: from the toolkit, or from the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    folders = [*Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"), Path("/usr/local/cuda/bin")]
    both = [f for f in folders if Path(f, "cuobjdump").exists() and Path(f, "nvdisasm").exists()]
    return str(Path(both[0], "cuobjdump")) if both else shutil.which("cuobjdump") if shutil.which("nvdisasm") else None


def compile_kernels(folder: Path, archs: Sequence[str]) -> list[Kernel]:
    """Compile every source for every architecture into `folder`/<source>.<arch>.cubin; spills and warnings are errors.

    Raises:
        RuntimeError: the compiler refused, with its words.
    """

    def build(job: tuple[str, str]) -> list[Kernel]:
        source, arch = job
        command = [find_nvcc(), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Werror", "all-warnings",
                   "-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror",
                   CSRC / "cuda" / f"{source}.cu", "-o", folder / f"{source}.{arch}.cubin"]  # fmt: skip
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source}.cu for sm_{arch}:\n{done.stdout}{done.stderr}")
        return _parse(done.stderr, arch)

    jobs = [(source, arch) for source in SOURCES for arch in archs]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return sorted((k for group in pool.map(build, jobs) for k in group), key=lambda k: (k.name, int(k.arch)))


def _parse(text: str, arch: str) -> list[Kernel]:
    kernels = []
    for part in text.split("Compiling entry function '")[1:]:
        used = re.search(r"Used (\d+) registers", part)
        stack, stores, loads = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())  # fmt: skip
        shared = re.search(r"(\d+) bytes smem", part)
        kernels.append(Kernel(short_name(part.split("'")[0]), arch, int(used.group(1)),
                              int(shared.group(1)) if shared else 0, stores + loads, stack))  # fmt: skip
    return kernels


TYPES = {
    "6__half": "half",
    "13__nv_bfloat16": "bf16",
    "NS0_11ManyColumnsE": "many",
    "NS0_10FewColumnsE": "few",
    "f": "float",
}


def short_name(mangled: str) -> str:
    """mass_mma_kernel<128, 1, 0> of a mangled name. The anonymous namespace carries a hash, so it is left out."""
    name, rest = re.search(r"_cu_[0-9a-f]{8}\d+([a-z]\w*?_kernel)(.*)", mangled).groups()
    if not rest.startswith("I"):
        return name
    words, rest = [], rest[1:]
    while not rest.startswith("E"):
        known = next((t for t in TYPES if rest.startswith(t)), None)
        if known:
            words.append(TYPES[known])
            rest = rest[len(known) :]
        else:
            value, rest = re.match(r"L[a-z](\d+)E(.*)", rest).groups()
            words.append(value)
    return f"{name}<{', '.join(words)}>"


def disassemble(folder: Path, arch: str) -> dict[str, list[str]]:
    """Instructions of every kernel of compiled sources, e.g. "HMMA.16816.F32.BF16 R84, R36, R68, RZ"."""
    code: dict[str, list[str]] = {}
    for source in SOURCES:
        path = folder / f"{source}.{arch}.cubin"
        text = subprocess.run([find_cuobjdump(), "-sass", path], check=True, capture_output=True, text=True).stdout
        for part in re.split(r"Function : ", text)[1:]:
            lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][^;]*?) ;", part)
            code[short_name(part.split()[0])] = lines
    return code


def threads_of(name: str) -> int:
    """Threads of a block, as the launchers choose them."""
    values = re.findall(r"\d+", name.partition("<")[2])
    if name.startswith("mass_mma"):
        return 128 if int(values[1]) > 1 or int(values[0]) > 128 else 256
    if name.startswith("lse_mma"):
        return 256 if int(values[0]) > 128 else 512
    if name.startswith("select"):
        return int(values[0])
    if name.startswith(("pack", "invert_index", "spread", "saliency_weight")):
        return 1024
    return 128 if name.startswith(("mass", "lse")) else 256


def rows(kernels: Sequence[Kernel]) -> list[dict[str, object]]:
    """The table: one row per kernel and architecture."""
    return [
        {"kernel": k.name, "sm": k.arch, "threads": threads_of(k.name), "registers": k.registers, "shared bytes": k.shared,
         "spilled bytes": k.spilled, "warps of an SM": k.warps(threads_of(k.name))}
        for k in kernels
    ]  # fmt: skip


def table(rows: Sequence[dict[str, object]]) -> str:
    """Aligned text. (bench.common has the same, but needs torch.)"""
    lines = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def traffic() -> list[dict[str, object]]:
    """Bytes of global memory per operator, counted by the emulator on one shape each.

    distinct: different bytes read and written. floor: what every implementation must read and write. asked: with what a
    kernel reads again; most of that comes from L1 and L2.
    """
    import torch

    from crop import ops
    from crop.selftest.cases import region_plan
    from tests.csrc.emulator import Emulated, missing

    if missing():
        return []
    emulated, bf16 = Emulated(), torch.bfloat16
    torch.manual_seed(0)
    query, key = torch.randn(1, 32, 8, 128).to(bf16), torch.randn(1, 8, 576, 128).to(bf16)
    index, lse = torch.arange(576)[None], torch.full((1, 32, 8), 3.0)
    many, most = torch.randn(1, 32, 64, 128).to(bf16), torch.full((1, 32, 64), 3.0)
    wide, long = torch.randn(1, 4, 121, 256).to(bf16), torch.randn(1, 4, 720, 256).to(bf16)
    places, shift = torch.arange(720)[None], torch.full((1, 4, 121), 6.0)
    score, kept = torch.rand(1, 8192), torch.arange(0, 576, 4)[None]
    stays = torch.ones(1, 640, dtype=torch.bool)
    stays[:, 32:608] = False
    width = 64 + 144
    hidden = torch.randn(1, 576, 4096).to(bf16)
    caches = [torch.randn(1, 8, 576, 128).to(bf16) for _ in range(2)]
    plan, tokens = region_plan(24), torch.randn(576, 1024).to(bf16)
    grad = torch.randn(plan.num_out, 1024).to(bf16)
    alike = torch.randn(576, 576)
    inputs = key.nbytes + query.nbytes + 8 * 576 + 4 * 576  # and index, mass
    pooled = tokens.nbytes + grad.nbytes
    back = (grad, None, None, torch.empty(0), plan.offsets, plan.inverse, None, "mean")
    cases = [
        ("attention_mass, lse given", "B1 N576 M8 32/8 heads d128 bf16", inputs + lse.nbytes,
         lambda: ops.attention_mass(query, key, index, lse=lse)),
        ("attention_mass, lse given", "the same, M64", key.nbytes + many.nbytes + 8 * 576 + 4 * 576 + most.nbytes,
         lambda: ops.attention_mass(many, key, index, lse=most)),
        ("attention_mass, lse given", "B1 N720 M121 4/4 heads d256 bf16, queries shared",
         wide.nbytes + long.nbytes + shift.nbytes + 12 * 720, lambda: ops.attention_mass(wide, long, places, lse=shift)),
        ("attention_mass, lse computed", "as the first", inputs, lambda: ops.attention_mass(query, key, index)),
        ("select", "B1 N8192 k2048", score.nbytes + 8 * 2048, lambda: ops.select(score, 2048)),
        ("pack", "B1 L640, 64 and 144 stay", 640 + kept.nbytes + 8 * (width + 640),
         lambda: ops.pack(stays, width, kept=kept + 32)),
        ("compact", "hidden D4096 + K + V, 144 of 576, bf16", 2 * 144 * (4096 + 2 * 8 * 128) * 2 + kept.nbytes,
         lambda: ops.compact([hidden, *caches], kept, token_dim=[1, 2, 2])),
        ("spread", "N576 k64, two at once", 4 * 576 * 63 + 8 * 64, lambda: ops.spread(alike, alike[0], 64, 2)),
        ("saliency", "576x1024 bf16", tokens.nbytes + 12 * 576, lambda: ops.saliency(tokens, index)),
        ("adaptive_pool", f"24x24x1024 -> {plan.num_out} bf16", pooled, lambda: ops.adaptive_pool(tokens, plan)),
        ("adaptive_pool, gradient", "the same", pooled,
         lambda: torch.ops.crop.adaptive_pool_backward.default(*back)),
    ]  # fmt: skip
    rows = []
    for op, shape, floor, call in cases:
        with emulated.active(), torch.no_grad():
            emulated.statistics()
            call()
        counts = emulated.statistics()
        read, distinct, _, written = (
            sum(c[k] for c in counts.values()) for k in ("read", "read_distinct", "written", "written_distinct")
        )
        rows.append({"operator": op, "shape": shape, "launches": sum(c["launches"] for c in counts.values()),
                     "floor bytes": floor, "distinct bytes": distinct + written, "asked bytes": read + written,
                     "distinct / floor": f"{(distinct + written) / floor:.3f}"})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", default=["80", "90", "100"], choices=SHARED)
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    if find_nvcc() is None:
        parser.exit(1, "bench.kernels.static: nvcc must be installed, found none\n")
    from bench.common import header

    release = subprocess.run(
        [find_nvcc(), "--version"], check=True, capture_output=True, text=True
    ).stdout.splitlines()[-2]
    with tempfile.TemporaryDirectory() as folder:
        text = f"{header()}\n{'compiler:':14}{release}\n\n{table(rows(compile_kernels(Path(folder), args.archs)))}"
    if moved := traffic():
        text += f"\n\n{table(moved)}\n\ntimes on a GPU: not measured"
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
