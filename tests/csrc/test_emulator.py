"""The emulator itself: every operation against a scalar model; planted faults are reported, clean kernels are not."""

from __future__ import annotations

import ctypes
import os
import re
from typing import Any

import numpy as np
import pytest

from tests.csrc import emulator

FLAVOURS = ("plain", "race", "asan")
SCHEDULES = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]


class Selftest:
    """Launches kernels of selftest.cu on NumPy arrays: plain ones are inputs, `out` and `both` mark the others."""

    def __init__(self, flavour: str) -> None:
        self.emu = emulator.load(emulator.build(flavour, (emulator.HERE / "selftest.cu",)))

    def __call__(
        self, name: str, *args: Any, policy: str = "forward", seed: int = 0, residents: int = 1, largest: int = 8
    ) -> str:
        """Run; return the report."""
        self.emu.emu_config(emulator.POLICIES[policy], seed, residents, largest)
        values = []
        for i, arg in enumerate(args):
            array, output = arg if isinstance(arg, tuple) else (arg, 0)
            if isinstance(array, np.ndarray):
                label, pointer = f"{name}[{i}]".encode(), ctypes.c_void_p(array.ctypes.data)
                place = self.emu.emu_take(label, pointer, ctypes.c_int64(array.nbytes), 0, None, None, output)
                values.append(ctypes.c_void_p(place))
            else:
                values.append(array)
        code = getattr(self.emu, name)(*values, None)
        self.emu.emu_give_back()
        report = self.emu.emu_report().decode()
        assert (code == 0) == (report == ""), (code, report)
        return report


def out(array: np.ndarray) -> tuple[np.ndarray, int]:
    return array, 1


def both(array: np.ndarray) -> tuple[np.ndarray, int]:
    return array, 2


@pytest.fixture(scope="module", params=FLAVOURS)
def emu(request: Any) -> Selftest:
    reason = emulator.missing(request.param)
    if reason:
        pytest.skip(reason)
    kernels = Selftest(request.param)
    kernels.flavour = request.param
    return kernels


# --- operations against scalar models -------------------------------------------------------------------------------


def collectives_model(v: list[int], mask: int, argument: int, width: int) -> list[list[int]]:
    """One warp: results by operation and lane."""
    lanes = [i for i in range(len(v)) if mask >> i & 1]

    def source(lane: int, kind: str) -> int:
        start = lane // width * width
        stop = start + width
        return {
            "index": start + argument % width,
            "up": lane - argument if lane - argument >= start else lane,
            "down": lane + argument if lane + argument < stop else lane,
            "xor": lane ^ argument if lane ^ argument < stop else lane,
        }[kind]

    def take(lane: int, other: int) -> int:
        return v[other] if other in lanes else -1

    us = [v[i] & 0xFFFFFFFF for i in lanes]
    bits = lambda test: sum(1 << i for i in lanes if test(v[i]))  # noqa: E731
    thousand = lambda x: int(x / 1000)  # noqa: E731
    same = len({thousand(v[i]) for i in lanes}) == 1
    xored = 0
    for u in us:
        xored ^= u
    whole = lambda x: lambda i: x  # noqa: E731
    rows = [lambda i, k=kind: take(i, source(i, k)) for kind in ("index", "up", "down", "xor")]
    rows += [
        whole(bits(lambda x: x & 1)),
        whole(argument in [v[i] for i in lanes]),
        whole(all(v[i] > -100 for i in lanes)),
    ]
    rows += [lambda i: bits(lambda x: x == v[i]), whole(sum(1 << i for i in lanes) if same else 0), whole(same)]
    rows += [whole(sum(v[i] for i in lanes)), whole(min(v[i] for i in lanes)), whole(max(v[i] for i in lanes))]
    rows += [whole(int(np.bitwise_and.reduce(us))), whole(int(np.bitwise_or.reduce(us))), whole(xored), whole(max(us))]
    rows += [lambda i: take(i, i + 1 if i < 31 else i), lambda i: take(i, i ^ 1)]
    return [[row(i) if i in lanes else -1 for i in range(len(v))] for row in rows]


@pytest.mark.parametrize(
    "mask, argument, width", [(0xFFFFFFFF, 3, 32), (0xFFFFFFFF, 5, 8), (0x0F0FFFF1, 17, 16), (1 << 4, 1, 32)], ids=str
)
def test_collectives(emu: Selftest, mask: int, argument: int, width: int) -> None:
    for threads, (policy, seed) in zip((32, 64, 40, 33), SCHEDULES, strict=True):
        if not mask & ((1 << (threads % 32 or 32)) - 1):
            continue  # no lane of the last warp is in the mask
        values = np.random.default_rng(threads).integers(-120, 9, threads, dtype=np.int32)
        values[:4] = 5000
        result = np.full((19, threads), -1, np.int32)
        assert emu("collectives", values, both(result), threads, mask - (1 << 32) if mask >> 31 else mask, argument, width,
                   policy=policy, seed=seed) == ""  # fmt: skip
        for first in range(0, threads, 32):
            warp = values[first : first + 32].tolist()
            expected = np.array(collectives_model(warp, mask, argument, width), dtype=np.int64).astype(np.int32)
            np.testing.assert_array_equal(result[:, first : first + 32], expected)


def test_barriers(emu: Selftest) -> None:
    values = np.arange(-20, 30, dtype=np.int32)
    result = np.zeros((4, 50), np.int32)
    for policy, seed in SCHEDULES:
        assert emu("barriers", values, out(result), 50, policy=policy, seed=seed) == ""
        assert result.tolist() == [np.roll(values, -1).tolist(), [29] * 50, [1] * 50, [1] * 50]


def test_atomics(emu: Selftest) -> None:
    v = np.random.default_rng(0).integers(1, 1 << 20, 64, dtype=np.int32)
    start = np.array([5, 6, 7, 8, -1, 0, 3, 9, 0], np.int32)
    for policy, seed in SCHEDULES:
        at, wrap, total, wide = (
            start.copy(),
            np.array([7, 2], np.uint32),
            np.zeros(1, np.float32),
            np.zeros(2, np.uint64),
        )
        assert (
            emu("atomics", both(at), both(wrap), both(total), both(wide), v, policy=policy, seed=seed, residents=2)
            == ""
        )
        twice = np.tile(v, 2)
        assert at.tolist() == [5 + twice.sum(), 6 - twice.sum(), min(7, v.min()), v.max(), np.bitwise_and.reduce(v),
                               np.bitwise_or.reduce(v), 3, v[3], twice.sum()]  # fmt: skip
        assert wrap.tolist() == [(7 + 128) % 10, (2 - 128) % 10] and total[0] == 64
        assert wide.tolist() == [128 << 32, v.max()]


def test_integers(emu: Selftest) -> None:
    for a, b, c in ((0x80F0_1234, 0x7ABC_DEF0, 0x0000_F4B1), (0, 0x8000_0000, 0x0000_7632), (1, 0xFFFF_FFFF, 33)):
        result = np.zeros(13, np.uint32)
        assert emu("integers", np.array([a, b, c], np.uint32), out(result)) == ""
        wide, pair = a << 32 | b, b << 32 | a
        byte = lambda s: pair >> 8 * (s & 7) & 255 if s < 8 else 255 * (pair >> 8 * (s & 7) + 7 & 1)  # noqa: E731, B023
        signed = lambda x: x - (x >> 31 << 32)  # noqa: E731
        expected = [a.bit_count(), 32 - a.bit_length(), (a & -a).bit_length(), int(f"{a:032b}"[::-1], 2),
                    sum(byte(c >> 4 * i & 15) << 8 * i for i in range(4)), pair << (c & 31) >> 32, pair >> (c & 31),
                    a * b >> 32, wide.bit_count(), 64 - wide.bit_length(), (wide & -wide).bit_length(),
                    min(signed(a), signed(b)), max(a, b)]  # fmt: skip
        assert result.tolist() == [x & 0xFFFFFFFF for x in expected]


@pytest.mark.parametrize("half", [0, 1], ids=["bfloat16", "float16"])
def test_product(emu: Selftest, half: int) -> None:
    """ldmatrix, mma and their fragment maps: small integers are exact."""
    rng = np.random.default_rng(half)
    a, b, c = (rng.integers(-9, 10, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    b[0] += 0.5  # the kernel compares the two sizes of ldmatrix bit by bit

    def stored(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).view(np.uint16) if half else (x.view(np.uint32) >> 16).astype(np.uint16)

    for policy, seed in SCHEDULES:
        d = c.copy()
        assert (
            emu("product", stored(a), stored(np.ascontiguousarray(b.T)), both(d), half, policy=policy, seed=seed) == ""
        )
        np.testing.assert_array_equal(d, a @ b + c)


def test_pieces(emu: Selftest) -> None:
    data = np.random.default_rng(0).integers(0, 256, 896, dtype=np.uint8)
    x = np.linspace(-160, 120, 32, dtype=np.float32)
    result, y = np.zeros(928, np.uint8), np.zeros(32, np.float32)
    assert emu("pieces", data, out(result), x, out(y)) == ""
    expected = data.copy()
    for first, size in ((0, 4), (128, 8), (384, 16)):
        for t in range(32):
            expected[first + size * t + t % (size + 1) : first + size * (t + 1)] = 0
    assert result[:896].tolist() == expected.tolist()
    words = data.view(np.uint32).reshape(-1, 4)
    hinted = words[:2].copy()
    hinted[:, 0] ^= words[2, 0] ^ words[3, 0]
    assert result[896:].tolist() == hinted.view(np.uint8).flatten().tolist()
    exact = np.exp2(x.astype(np.float64))
    np.testing.assert_allclose(y, np.where(exact < 2.0**-126, 0, exact), rtol=1e-6)


@pytest.mark.parametrize("residents", [1, 4])
def test_chain_of_blocks(emu: Selftest, residents: int) -> None:
    for policy, seed in SCHEDULES:
        flag, total = np.zeros(9, np.uint32), np.zeros(9, np.int32)
        result = np.zeros((9, 64), np.int32)
        ticket = np.zeros(1, np.uint32)
        report = emu(
            "chain", both(ticket), both(flag), out(total), out(result), 9, policy=policy, seed=seed, residents=residents
        )
        assert report == ""
        assert (result == np.cumsum(range(9))[:, None]).all()


# --- faults -----------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(5)
DATA = RNG.integers(0, 1000, 256).astype(np.int32)


def histogram(emu: Selftest, fault: int, **how: Any) -> tuple[str, bool]:
    result = np.zeros(16, np.int32)
    report = emu("histogram", both(DATA.copy()) if fault != 13 else DATA.copy(), 256, out(result), fault, **how)
    return report, result.tolist() == np.bincount(DATA & 15, minlength=16).tolist()


def exchange(emu: Selftest, fault: int, **how: Any) -> tuple[str, bool]:
    result = np.zeros(64, np.int32)
    v, t = DATA[:64], np.arange(64)
    report = emu("exchange", v, out(result), fault, **how)
    mixed = np.where(t % 32 < 16, v[t ^ 8], v[t ^ 4])
    return report, result.tolist() == (v[t ^ 1] + mixed[t ^ 2]).tolist()


def pipeline(emu: Selftest, fault: int, **how: Any) -> tuple[str, bool]:
    result, data = np.zeros(32, np.int32), DATA[:160].reshape(5, 32)
    report = emu("pipeline", data, 5, out(result), fault, **how)
    return report, result.tolist() == data.sum(0)[::-1].tolist()


def last_block(emu: Selftest, fault: int, **how: Any) -> tuple[str, bool]:
    total = np.zeros(1, np.int32)
    report = emu(
        "last_block", DATA, out(np.zeros(8, np.int32)), both(np.zeros(1, np.uint32)), out(total), 4, fault, **how
    )
    return report, total[0] == DATA.sum()


def blocks(emu: Selftest, fault: int, **how: Any) -> tuple[str, bool]:
    word, bytes_, flag = np.zeros(1, np.int32), np.zeros(2, np.uint8), np.zeros(1, np.uint32)
    report = emu("blocks", both(word), out(bytes_), both(flag), fault, **how)
    return report, word[0] == 2 and bytes_.tolist() == [1, 2]


def dependent(emu: Selftest, fault: int, **how: Any) -> tuple[str, bool]:
    result = np.zeros(32, np.int32)
    report = emu("dependent", DATA[:32], out(result), fault, **how)
    return report, result.tolist() == DATA[:32].tolist()


def cluster(emu: Selftest, fault: int, *, grid: int = 8, size: int = 4, **how: Any) -> tuple[str, bool]:
    data, result = np.arange(grid * 64, dtype=np.int32), np.zeros(grid * 64, np.int32)
    report = emu("cluster", data, out(result), ctypes.c_int64(grid), size, fault, **how)
    block, t = np.divmod(data, 64)
    there = (block // size * size + (block % size + 1) % size) * 64 + 62 - t % 63
    return report, result[t < 63].tolist() == there[t < 63].tolist()


CLEAN = {"histogram": histogram, "exchange": exchange, "pipeline": pipeline, "last_block": last_block, "blocks": blocks,
         "dependent": dependent, "cluster": cluster}  # fmt: skip
ANY = FLAVOURS
FAULTS = [  # kernel, fault, where it must be reported, in which words
    (histogram, 1, ("race",), "race: .*shared 'bins'"),
    (histogram, 2, ("race",), r"race: write .*selftest.cu:\d+ conflicts with write by thread"),
    (histogram, 3, ("race",), "race: read .*selftest.cu"),
    (histogram, 4, ("race",), r"bounds: read of 4 bytes at 'histogram\[0\]'\+1024 of 1024 at selftest.cu"),
    (histogram, 4, ("asan",), "asan: AddressSanitizer"),
    (histogram, 5, ("race",), r"bounds: write of 4 bytes at 'histogram\[2\]'\+64 of 64"),
    (histogram, 5, ("asan",), "asan: AddressSanitizer"),
    (histogram, 6, ("race",), "uninitialised: atomic of 4 bytes at shared 'bins'"),
    (histogram, 7, ANY, r"barrier-divergence: .*selftest.cu:\d+ and at selftest.cu:\d+"),
    (histogram, 8, ("race",), r"bounds: read of 4 bytes at shared 'bins'\+64"),
    (histogram, 8, ("asan",), "asan: AddressSanitizer"),
    (histogram, 9, ANY, r"deadlock: .*\n *\d+ threads? waits? at selftest.cu:\d+.*\n *1 threads? waits? .*mask ffffffff"),
    (histogram, 10, ("asan",), "undefined: index of an array out of bounds"),
    (histogram, 11, ("asan",), "undefined: null or misaligned access"),
    (histogram, 12, ("asan",), "undefined: overflow of +"),
    (histogram, 13, ("race",), "read-only: write to input 'histogram"),
    (exchange, 1, ("race",), "race: "),
    (exchange, 2, ("race",), "race: "),
    (exchange, 3, ANY, "warp-mask: the caller is not in its mask 0000ffff"),
    (exchange, 4, ANY, "warp-mask: lane .* has ended|warp-mask: lanes .* have ended"),
    (exchange, 5, ANY, "warp-mask: lane.* ended"),
    (exchange, 6, ANY, "warp-operation: lanes of one mask are in different operations"),
    (exchange, 7, ANY, "warp-operation: "),
    (pipeline, 1, ("race",), "race: "),
    (pipeline, 2, ("race",), "race: |uninitialised: "),
    (pipeline, 3, ("race",), "race: write of 4 bytes at shared 'stage'"),
    (pipeline, 4, ("race",), "bounds: read of 4 bytes at 'pipeline"),
    (pipeline, 4, ("asan",), "asan: AddressSanitizer"),
    (pipeline, 5, ANY, "cp.async: a copy is on its way when the thread ends"),
    (last_block, 1, ("race",), "race: .* of another block"),
    (last_block, 2, ("race",), "race: .* of another block"),
    (last_block, 3, ("race",), "race: .* of another block"),
    (last_block, 4, ("race",), "race: .* of another block"),
    (blocks, 1, ("race",), "race: .* of another block"),
    (blocks, 3, ANY, "livelock: everybody waits .*\n *2 threads wait|livelock: everybody waits .*\n *1 threads? wait"),
    (dependent, 1, ("race",), "grid_wait: read of 'dependent.*before it"),
    (dependent, 2, ANY, "grid_wait: a block of a dependent launch ended without it"),
    (cluster, 1, ("race",), "race: .* of another block|uninitialised: "),
    (cluster, 2, ("race",), "cluster: read of shared 'held'.* of a block that has ended"),
    (cluster, 3, ANY, "bounds: no block 4 in a cluster of 4"),
    (cluster, 4, ("race",), "race: .* of another block"),
    (cluster, 6, ("race",), "race: .* of another block"),
]  # fmt: skip


@pytest.mark.parametrize("kernel", CLEAN)
def test_clean_kernels(emu: Selftest, kernel: str) -> None:
    for policy, seed in SCHEDULES:
        for residents in (1, 3):
            report, correct = CLEAN[kernel](emu, 0, policy=policy, seed=seed, residents=residents)
            assert report == "" and correct
    assert blocks(emu, 2) == cluster(emu, 5) == ("", True)


@pytest.mark.parametrize("kernel, fault, flavours, words", FAULTS, ids=lambda v: getattr(v, "__name__", None))
def test_planted_faults(emu: Selftest, kernel: Any, fault: int, flavours: tuple[str, ...], words: str) -> None:
    """Reported under every schedule, in one of the words at least."""
    if emu.flavour not in flavours:
        pytest.skip("another build finds it")
    for policy, seed in SCHEDULES:
        report, _ = kernel(emu, fault, policy=policy, seed=seed, residents=2)
        assert re.search(words, report, re.DOTALL), (policy, seed, report)


def test_launch_limits(emu: Selftest) -> None:
    one = np.zeros(1, np.int32)
    for grid, threads, smem, word in [
        (1 << 32 | 1, 32, 64, "the grid must have"),
        (1, 32, 1 << 33, "too much shared memory"),
        (1, 1025, 64, "1 to 1024 threads, got 1025"),
        (1, 0, 64, "1 to 1024 threads, got 0"),
        (0, 32, 64, "the grid must have"),
        (1, 32, 40 << 10, "too much shared memory, 16384 bytes static and 40960 dynamic"),
        (1, 32, 90 << 10, "too much shared memory"),
    ]:
        assert word in emu("nothing", out(one), ctypes.c_int64(grid), threads, ctypes.c_int64(smem))
    assert emu("nothing", out(one), ctypes.c_int64(1), 32, ctypes.c_int64(60 << 10)) == "" and one[0] == 2


def test_cluster_limits(emu: Selftest) -> None:
    for grid, size, largest in [(6, 4, 8), (6, 3, 8), (16, 16, 8), (8, 2, 1)]:
        report, _ = cluster(emu, 0, grid=grid, size=size, largest=largest)
        assert f"launch: clusters of {size} blocks cannot be made" in report
    assert cluster(emu, 0, grid=3, size=1, largest=1) == cluster(emu, 0, grid=8, size=8) == ("", True)


def test_traffic(emu: Selftest) -> None:
    """Bytes of global memory: asked for, and distinct."""
    if emu.flavour != "race":
        pytest.skip("only the race build sees every access")
    emu.emu.emu_statistics()
    last_block(emu, 0)
    row = emu.emu.emu_statistics().decode().split("\t")
    assert row[0] == "last_block_kernel"
    launches, grid, threads, _, static, dynamic, read, read_distinct, written, written_distinct = map(int, row[1:])
    assert (launches, grid, threads, static, dynamic) == (1, 4, 64, 16, 0)
    assert read == 256 * 4 + 4 * 4 + 8 * 4 and read_distinct == 256 * 4 + 4 + 8 * 4  # input, counter, partial sums
    assert written == 8 * 4 + 4 * 4 + 4 and written_distinct == 8 * 4 + 4 + 4


# --- the sanitizer build ----------------------------------------------------------------------------------------------


def test_sanitizer_build() -> None:
    """AddressSanitizer must be there before Python, hence a process of its own for its share of the tests here."""
    if emulator.missing() or os.environ.get("EMU_BUILD"):
        pytest.skip(emulator.missing() or "this is that process")
    emulator.in_sanitizer_process(__file__, "asan")
