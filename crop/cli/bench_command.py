"""``crop bench``: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from crop.cli.options import UsageError, choose_device, count, need_packages, number

EXAMPLES = """\
examples:
  crop bench kernels                             compiled kernels against plain torch, on the GPU where there is one
  crop bench prefill --tokens 576 2880           a prefill of a random decoder of 300 M parameters, pruned against unpruned
  crop bench kernels --json bench/results/kernels_h100.json
      figures with device, versions and commit (CROP_COMMIT where there is no git), to be committed
"""
KERNELS = ("pipeline", "mass", "select", "pack", "compact", "spread", "saliency", "pool")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``crop bench``."""
    parser.add_argument("what", choices=("kernels", "prefill"), help="operators alone, or a whole prefill")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument(
        "--rounds", type=count, metavar="N", help="timed rounds (default: 20 of kernels, 5 of a prefill)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here, one by one")
    parser.add_argument("--time", type=number(float, 0, 1e9, "seconds"), metavar="SECONDS",
                        help="kernels: begin no case after so many seconds")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=KERNELS, help="kernels: cases of these operators")
    parser.add_argument("--tokens", type=count, nargs="+", metavar="N", help="prefill: vision tokens, multiples of 576")
    parser.add_argument("--contenders", metavar="TEXT", default="", help="prefill: those whose name holds this")


def run(options: argparse.Namespace) -> int:
    """Time, print, write. Returns 0; 1 where a kernel is wrong or fails. UsageError: options of the other bench."""
    need_packages("bench")
    import torch

    from crop.cli.report import header, save, table

    rows: list[dict[str, Any]] = []
    device = torch.device(choose_device(options.device))
    print(f"{header()}\n", flush=True)
    for row in _kernels(options, device) if options.what == "kernels" else _prefill(options, device):
        rows.append(row)
        if options.json:
            save(options.json, rows)  # what is measured stays, whatever comes
    if rows:
        print(table(rows))
    return int(any(row.get("faults") for row in rows))


def _kernels(options: argparse.Namespace, device: Any) -> Any:
    from crop.cli.bench_kernels import measure_kernels

    if options.tokens or options.contenders:
        raise UsageError("--tokens and --contenders must come with prefill, got kernels")
    return measure_kernels(options.only or KERNELS, device, options.rounds or 20, options.time)


def _prefill(options: argparse.Namespace, device: Any) -> Any:
    from crop.cli.bench_prefill import measure_prefill

    if options.only or options.time is not None:
        raise UsageError("--only and --time must come with kernels, got prefill")
    tokens = options.tokens or [576, 2880]
    if any(number % 576 for number in tokens):
        raise UsageError(f"--tokens must be multiples of 576, got {tokens}")
    return measure_prefill(tokens, device, options.rounds or 5, options.contenders)
