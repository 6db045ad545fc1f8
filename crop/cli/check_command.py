"""``crop check``: its options, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from crop.cli.options import UsageError, add_model_options, load_plugin, need_packages

EXAMPLES = """\
examples:
  crop check                                     kernels against their twins, extras, the embedded model end to end
  crop check --model Qwen/Qwen2.5-VL-7B-Instruct --device cuda --dtype bfloat16
      does crop work with this checkpoint
exit status: 0 where all is right (slow or missing parts allowed), 1 where something is wrong or refused
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``crop check``."""
    add_model_options(parser, answers=False)


def run(options: argparse.Namespace) -> int:
    """Check and print line by line. Returns the exit status."""
    for name in options.plugin:
        load_plugin(name)
    bad = 0
    for finding in _findings(options):
        print(f"{finding.status:<8} {finding.subject:<26} {finding.detail}", flush=True)
        bad += not finding.good
    print(f"\n{'all is right' if not bad else f'{bad} wrong or refused, see above'}")
    return int(bad > 0)


def _findings(options: argparse.Namespace) -> Iterator:
    import torch

    from crop.selftest.check import Finding, check_kernels, check_operators

    yield from check_kernels()
    for kind in ("cpu", "cuda"):
        if kind == "cpu" or torch.cuda.is_available():
            yield from check_operators(torch.device(kind))
    from crop.cli.check import check_model, check_packages

    yield from check_packages()
    try:
        need_packages("check")
        from crop.cli.ask import load_chosen
        from crop.embedded.scenes import scene

        asker = load_chosen(options)
    except UsageError as error:
        yield Finding("refused", "model", str(error))
        return
    picture = scene(0).image.resize((448, 336))
    yield from check_model(asker, picture)
