"""The command ``crop``: ask a model about a picture, see a demo, see what was built."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from crop.cli import ask_command
from crop.cli.options import UsageError, count, natural, need_packages

EXAMPLES = """\
examples:
  crop demo                                          six rendered pictures, pruned against unpruned
  crop ask receipt.png "what is the total"           the embedded model finds the region itself
  crop ask photo.jpg "what color is the car" --model llava-hf/llava-1.5-7b-hf --compare
  crop info                                          which kernels were built
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after ``crop``; None: those of the process.
    Returns:
        Exit status 0. Wrong use ends in SystemExit(2) with one line on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (UsageError, ValueError, OSError, ImportError) as error:  # what the package refuses, no such model, no extra
        options.parser.error(str(error).strip().splitlines()[0])


def _parser() -> argparse.ArgumentParser:
    import crop

    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "crop",
        description="Region-guided pruning of vision tokens for vision-language models, training-free.",
        epilog=EXAMPLES,
        formatter_class=style,
    )
    parser.add_argument("--version", action="version", version=f"crop {crop.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    ask = commands.add_parser(
        "ask",
        help="ask a model about a picture",
        description="Ask a model about a picture, with most vision tokens pruned away.",
        epilog=ask_command.EXAMPLES,
        formatter_class=style,
    )
    ask_command.add_options(ask)
    ask.set_defaults(run=ask_command.run, parser=ask)

    demo = commands.add_parser(
        "demo",
        help="rendered pictures, pruned against unpruned",
        description="Render pictures, ask the embedded model with and without pruning, write what it saw.",
    )
    demo.add_argument(
        "--out",
        default="crop-demo",
        metavar="DIR",
        help="folder for the pictures (default crop-demo)",
    )
    demo.add_argument("--count", type=count, default=6, metavar="N", help="pictures (default 6)")
    demo.add_argument("--seed", type=natural, default=0, metavar="N", help="other pictures (default 0)")
    demo.set_defaults(run=_demo, parser=demo)

    info = commands.add_parser("info", help="what was built", description="Print what was built, and versions.")
    info.set_defaults(run=_info, parser=info)
    return parser


def _info(options: argparse.Namespace) -> int:
    import crop

    for name, value in crop.build_info().items():
        print(f"{name:<14} {value}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    need_packages("demo")
    from crop.cli.demo import demo

    demo(Path(options.out), count=options.count, seed=options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
