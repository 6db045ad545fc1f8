"""What the CUDA compiler makes of the kernels, for three architectures and without a GPU: no spill, a budget of registers
and shared memory, and the instructions that were meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.kernels import static
from bench.kernels.static import Kernel

ARCHS = ("80", "90", "100")
# Kernel: registers at most on sm_80 and 90, on sm_100; bytes of shared memory; warps that must fit on an SM of sm_90.
# 16 warps with 4 KiB of keys each on their way are four times what hides the latency of memory.
BUDGET = {
    r"mass_mma_kernel<64, 1, 0, 0>": (80, 104, 24592, 24),
    r"mass_mma_kernel<(80|96), 1, 0, 0>": (96, 128, 24592, 16),
    r"mass_mma_kernel<128, 1, 0, 0>": (112, 128, 24592, 16),
    r"mass_mma_kernel<64, 2, 0, 0>": (120, 168, 20496, 16),
    r"mass_mma_kernel<(80|96), 2, 0, 0>": (144, 168, 20496, 12),
    r"mass_mma_kernel<(128, 2|256, 1), 0, 0>": (160, 168, 20496, 12),
    r"mass_mma_kernel<64, 2, 0, 1>": (128, 168, 29712, 16),
    r"mass_mma_kernel<(80|96), 2, 0, 1>": (152, 168, 29712, 12),
    r"mass_mma_kernel<(128, 2|256, 1), 0, 1>": (168, 168, 37904, 12),
    r"mass_mma_kernel<128, 1, 1, 0>": (168, 168, 24592, 8),  # a lane loads its elements one by one
    r"mass_mma_kernel<256, 1, 1, 0>": (232, 232, 20496, 8),
    r"lse_mma_kernel<(64|80|96|128), 0>": (88, 112, 9232, 16),
    r"lse_mma_kernel<128, 1>": (120, 128, 9232, 16),
    r"lse_mma_kernel<256, 0>": (128, 144, 5136, 16),
    r"lse_mma_kernel<256, 1>": (184, 232, 5136, 8),
    r"mass_fp32_kernel<(few|many)>": (168, 168, 22800, 12),
    r"lse_fp32_kernel<(few|many)>": (168, 168, 18448, 12),
    r"lse_combine_kernel": (56, 64, 0, 32),
    r"select_kernel<256, 4, 1>": (48, 48, 3104, 40),
    r"select_kernel<1024, (4, 1|8, [01]|16, 1)>": (64, 64, 9248, 32),
    r"pack_kernel": (48, 48, 128, 32),
    r"spread_kernel<[48]>": (64, 64, 512, 32),
    r"saliency_mean_kernel<\w+>": (56, 56, 8320, 32),
    r"saliency_distance_kernel<\w+>": (56, 56, 0, 32),
    r"saliency_weight_kernel": (64, 64, 256, 32),
    r"compact_kernel": (48, 48, 8192, 40),
    r"invert_index_kernel": (32, 32, 0, 64),
    r"pool_kernel<\w+, 0>": (64, 64, 0, 32),
    r"pool_kernel<\w+, [12]>": (80, 80, 0, 24),
    r"pool_backward_kernel<\w+, [02]>": (56, 56, 0, 32),
    r"pool_weighted_backward_kernel<\w+>": (64, 64, 0, 32),
}

pytestmark = pytest.mark.skipif(static.find_nvcc() is None, reason="no nvcc")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Kernel]]:
    """Every source compiled for every architecture, once: spills, local memory and warnings fail here."""
    folder = tmp_path_factory.mktemp("cubins")
    return folder, static.compile_kernels(folder, ARCHS)


def test_budget(built: tuple[Path, list[Kernel]]) -> None:
    used = set()
    for kernel in built[1]:
        rows = [pattern for pattern in BUDGET if re.fullmatch(pattern, kernel.name)]
        assert len(rows) == 1, f"{kernel.name} must have one row in the budget, has {rows}"
        used.add(rows[0])
        registers, registers_100, shared, warps = BUDGET[rows[0]]
        assert kernel.registers <= (registers_100 if kernel.arch == "100" else registers), kernel
        assert kernel.shared <= shared and kernel.spilled == kernel.stack == 0, kernel
        if kernel.arch == "90":
            assert kernel.warps(static.threads_of(kernel.name)) >= warps, kernel
    assert used == set(BUDGET)


@pytest.mark.skipif(static.find_cuobjdump() is None, reason="no cuobjdump and nvdisasm")
def test_instructions(built: tuple[Path, list[Kernel]]) -> None:
    """Tensor cores and 16-byte accesses where they are meant, local memory and loops over registers nowhere."""
    for arch in ("80", "90"):
        code = static.disassemble(built[0], arch)
        assert set(code) == {kernel.name for kernel in built[1]}
        for name, lines in code.items():

            def count(pattern: str, lines: list[str] = lines) -> int:
                return sum(bool(re.match(pattern, line)) for line in lines)

            assert count(r"(LDL|STL)\b") == 0, name
            # Dependent launches exist from sm_90 on: wait for the kernel ahead, let the next one start.
            assert (count("ACQBULK"), count("PREEXIT")) == ((1, 1) if arch == "90" else (0, 0)), name
            # And nothing is touched before, nor read as if nobody could be writing it.
            touched = next(
                i for i, line in enumerate(lines) if re.match(r"(LDG|LDGSTS|STG|ATOMG|REDG?|LD|ST|CCTL)\b", line)
            )
            assert arch == "80" or touched > next(i for i, line in enumerate(lines) if line.startswith("ACQBULK")), name
            assert count(r"LDG\S*\.CONSTANT") == 0, name
            wide, wide_stores = count(r"LDG\.E\.\S*128"), count(r"STG\.E\.\S*128")
            if mma := re.fullmatch(r"mass_mma_kernel<(\d+), (\d), (\d), (\d)>|lse_mma_kernel<(\d+), (\d)>", name):
                dim, tiles, checked, staged = map(int, mma.group(1, 2, 3, 4) if mma[1] else (mma[5], 1, mma[6], 0))
                steps = (dim + 31) // 32 * 2
                assert count("HMMA.16816.F32.BF16") == count(r"HMMA.16816.F32 ") == steps * tiles, name
                assert wide >= (0 if checked else steps * tiles + (0 if staged else steps // 2)), name
                queries = (
                    count(r"LDS\.128"),
                    count(r"LDGSTS\.E\.BYPASS\.128"),
                )  # read 16 bytes at a time, never touched on the way
                assert (min(queries) >= steps // 2) if staged else (queries[1] == 0), name
                # Keys lie in registers as the products want them; between products nothing is moved.
                products = [i for i, line in enumerate(lines) if line.startswith("HMMA.16816.F32.BF16")]
                moves = sum(bool(re.match(r"SEL|MOV|IMAD\.MOV", line)) for line in lines[products[0] : products[-1]])
                assert moves <= (8 if checked else 4), name
                # Two barriers of a cluster, of which the first alone waits for what was written.
                clusters = arch == "90" and mma[1] is not None
                found = count("UCGABAR_ARV"), min(count("UCGABAR_WAIT"), 2), count("MEMBAR")
                assert found == ((2, 2, 1) if clusters else (0, 0, 0)), name
            elif name.startswith(("mass_fp32", "lse_fp32")):
                assert count("HMMA") == 0 and count("FFMA") >= 64 and wide >= 2, name
            elif name.startswith("select"):
                assert count(r"ATOMS\.POPC\.INC") >= 4 and wide >= 1, name
            elif name.startswith("compact"):
                assert wide >= 4 and wide_stores >= 4, name
            elif name.startswith("spread"):
                # Values of 16 tokens are asked for before any is looked at; a choice has one barrier.
                asked = [line.startswith("LDG") for line in lines if re.match(r"LDG|VIMNMX\.U32|IMNMX\.U32", line)]
                assert any(all(asked[i : i + 16]) for i in range(len(asked))), name
            elif re.match(r"saliency_(mean|distance)", name):
                assert wide >= 4, name
            elif name.startswith("pool"):
                rows = 3 if "weighted_backward" in name else 4
                assert wide >= rows and wide_stores >= (4 if "pool_backward" in name else 1), name
