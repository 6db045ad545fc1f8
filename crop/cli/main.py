"""The command ``crop``: ask a model about a picture, see a demo, try a page, see what was built."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from crop.cli import app_command, ask_command, bench_command, check_command, serve_command
from crop.cli.options import REFUSED, count, natural, need_packages
from crop.localizers.pretrained import one_line

EXAMPLES = """\
examples:
  crop demo                                          six rendered pictures, pruned against unpruned
  crop ask receipt.png "what is the total"           the embedded model finds the region itself
  crop ask photo.jpg "what color is the car" --model llava-hf/llava-1.5-7b-hf --compare
  crop app                                           a page in the browser to try it
  crop check                                         is all of it right on this machine
  crop bench kernels                                 how fast are they
  crop info                                          which kernels were built
"""


COMMANDS = {  # name: module with EXAMPLES, add_options and run; in the list of commands; in its own help
    "ask": (ask_command, "ask a model about a picture",
            "Ask a model about a picture, with most vision tokens pruned away."),
    "app": (app_command, "a page in the browser to try it",
            "Serve a page: drop a picture, ask, draw a box; answers with and without pruning (extra app)."),
    "serve": (serve_command, "an OpenAI-compatible server, with a region per request",
              "Serve a model by vLLM; requests say where to look (extra vllm)."),
    "check": (check_command, "does crop work here, and with this model",
              "Verify the operators of this installation, and one model end to end."),
    "bench": (bench_command, "how fast it is here",
              "Time the operators, or a prefill, of this installation."),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: words after ``crop``, None for those of the process.

    Returns:
        Exit status: 0; 130 after Ctrl-C. Wrong use ends in SystemExit(2) with one line on stderr.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a letter shows its code
            stream.reconfigure(errors="backslashreplace")
    try:
        options = _parse(sys.argv[1:] if arguments is None else list(arguments))
        return options.run(options)
    except KeyboardInterrupt:
        print("crop: interrupted", file=sys.stderr)
        return 130
    except REFUSED as error:
        print(f"{options.parser.prog}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _parse(words: list[str]) -> argparse.Namespace:
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

    for name, (command, brief, description) in COMMANDS.items():
        one = commands.add_parser(
            name, help=brief, description=description, epilog=command.EXAMPLES, formatter_class=style
        )
        command.add_options(one)
        one.set_defaults(run=command.run, parser=one)

    demo = commands.add_parser(
        "demo",
        help="rendered pictures, pruned against unpruned",
        description="Render pictures, ask the embedded model with and without pruning, write what it saw.",
    )
    demo.add_argument("--out", default="crop-demo", metavar="DIR", help="folder for the pictures (default crop-demo)")
    demo.add_argument("--count", type=count, default=6, metavar="N", help="pictures (default 6)")
    demo.add_argument("--seed", type=natural, default=0, metavar="N", help="other pictures (default 0)")
    demo.set_defaults(run=_demo, parser=demo)

    info = commands.add_parser("info", help="what was built", description="Print what was built, and versions.")
    info.set_defaults(run=_info, parser=info)

    # Options may stand between the images of a command: a plain parser would take what follows for something else.
    if words and words[0] in commands.choices:
        return commands.choices[words[0]].parse_intermixed_args(words[1:])
    return parser.parse_args(words)


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
