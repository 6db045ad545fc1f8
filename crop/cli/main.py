"""The command ``crop``: ask a model about a picture, see a demo, see what was built."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crop.geometry.region import Region
from crop.localizers import LOCALIZERS
from crop.localizers.base import WholeLocalizer
from crop.methods.registry import by_name

if TYPE_CHECKING:
    from PIL.Image import Image

    from crop.cli.ask import Answer, Asker
    from crop.localizers.base import Localizer

METHODS = ("crop", "plc", "ilp", "none")
SECOND_MODELS = ("clip", "detector", "vlm")
DTYPES = ("auto", "float32", "bfloat16", "float16")
NEEDED = {"transformers": "transformers", "PIL": "pillow", "rich": "rich"}

EXAMPLES = """\
examples:
  crop demo                                          six rendered pictures, pruned against unpruned
  crop ask receipt.png "what is the total"           the embedded model finds the region itself
  crop ask photo.jpg "what color is the car" --model llava-hf/llava-1.5-7b-hf --compare
  crop info                                          which kernels were built
"""
ASK_EXAMPLES = """\
examples:
  crop ask receipt.png "what is the total"
      localize by the head that comes with the embedded model, keep 11 % of the vision tokens
  crop ask receipt.png "what is the total" --region 0.1,0.6,0.9,0.8 --overlay seen.png
      you know where to look; write a picture of what the model got to see
  crop ask photo.jpg "what does the sign say" --model Qwen/Qwen2.5-VL-3B-Instruct \\
      --method ilp --keep 0.25 --device cuda --dtype bfloat16 --compare
      another model and method, and the unpruned answer and time beside it
  crop ask receipt.png "what is the total" --json | jq .tokens
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after ``crop``; None: those of the process.
    Returns:
        Exit status 0. Wrong use ends in SystemExit(2) with one line on stderr.
    """
    options = _parser().parse_args(arguments)
    return options.run(options, options.parser)


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
        epilog=ASK_EXAMPLES,
        formatter_class=style,
    )
    ask.add_argument("image", metavar="IMAGE", help="picture file")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument(
        "--model",
        default="embedded",
        help="embedded (default), a folder, or a Hugging Face hub name",
    )
    ask.add_argument("--region", action="append", metavar="X0,Y0,X1,Y1",
                     help="where the answer is, as fractions of width and height; may be given several times")  # fmt: skip
    ask.add_argument("--localizer", choices=LOCALIZERS,
                     help="who finds the region: head (trained for the model; default where there is one), attention (the "
                     "model's own, early; default elsewhere), clip, detector, vlm (a second model), ocr (lines of "
                     "text; extra ocr), cascade (head or attention, then ocr), union (both), box (--region), "
                     "whole (nobody: prune by attention alone)")  # fmt: skip
    ask.add_argument("--localizer-model", metavar="PATH",
                     help="folder or hub name of the model for clip, detector or vlm; file of weights for head")  # fmt: skip
    ask.add_argument("--layer", type=_natural, metavar="N",
                     help="decoder layer whose attention finds the region (default: 1/16 of the depth, at least 1)")  # fmt: skip
    ask.add_argument("--min-confidence", type=_fraction, metavar="FRACTION",
                     help="below it the whole image counts as region (default: depends on the localizer)")  # fmt: skip
    ask.add_argument("--method", choices=METHODS, default="crop",
                     help="plc: pool before the language model; ilp: drop inside it; crop: both (default)")  # fmt: skip
    ask.add_argument("--keep", type=_fraction, default=0.11, metavar="FRACTION",
                     help="vision tokens left in the end, above 0 and up to 1 (default 0.11)")  # fmt: skip
    ask.add_argument("--overlay", metavar="OUT.png", help="write a picture of what was kept, pooled and dropped")
    ask.add_argument("--compare", action="store_true",
                     help="also answer without pruning (and warm up first, so that the times are fair)")  # fmt: skip
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    ask.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)")
    ask.add_argument("--dtype", choices=DTYPES, default="auto")
    ask.add_argument("--max-new-tokens", type=_count, default=32, metavar="N")
    ask.set_defaults(run=_ask, parser=ask)

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
    demo.add_argument("--count", type=_count, default=6, metavar="N", help="pictures (default 6)")
    demo.add_argument("--seed", type=_natural, default=0, metavar="N", help="other pictures (default 0)")
    demo.set_defaults(run=_demo, parser=demo)

    info = commands.add_parser("info", help="what was built", description="Print what was built, and versions.")
    info.set_defaults(run=_info, parser=info)
    return parser


def _number(kind: type, low: float, high: float, what: str) -> Callable[[str], float]:
    """A parser of numbers in [low, high] for argparse, with ``what`` as its complaint."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
        return value

    return parse


_fraction = _number(float, sys.float_info.min, 1.0, "a number above 0 and at most 1")
_count = _number(int, 1, sys.maxsize, "a whole number of at least 1")
_natural = _number(int, 0, sys.maxsize, "a whole number of at least 0")


# crop info


def _info(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import crop

    for name, value in crop.build_info().items():
        print(f"{name:<14} {value}")
    return 0


# crop demo


def _demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _need(parser, "demo")
    from crop.cli.ask import UsageError
    from crop.cli.demo import demo

    try:
        demo(Path(options.out), count=options.count, seed=options.seed)
    except (UsageError, OSError) as error:
        parser.error(str(error))
    return 0


def _need(parser: argparse.ArgumentParser, command: str) -> None:
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(f'crop {command} needs {", ".join(missing)}: pip install "crop-vlm[demo]"')


# crop ask


def _ask(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _need(parser, "ask")
    region = _region(options, parser)
    image = _open(options.image, parser)
    if options.overlay and not Path(options.overlay).resolve().parent.is_dir():
        parser.error(f"--overlay must be in an existing folder, got {options.overlay}")
    from rich.console import Console

    from crop.cli.ask import UsageError, load

    status = Console(stderr=True)
    try:
        with status.status(f"loading {options.model}"):
            asker = load(options.model, _device(options.device, parser), options.dtype)
        name = options.localizer or _default_localizer(options, asker, region)
        settings = {key: getattr(options, key) for key in ("layer", "min_confidence")}
        localizer = asker.localizer(name, region, path=options.localizer_model, **settings)
        with status.status("asking"):
            pruned, plain = _answers(options, asker, image, localizer)
    except (UsageError, ValueError, OSError, ImportError) as error:  # what the package refuses, no such model, no extra
        parser.error(str(error).strip().splitlines()[0])
    if options.overlay:
        from crop.cli.visualize import overlay

        try:
            overlay(image, pruned.layout, pruned.plan, pruned.kept, pruned.region).save(options.overlay)
        except (OSError, ValueError) as error:  # ValueError: Pillow on an unknown ending
            parser.error(f"--overlay {options.overlay} cannot be written: {error}")
    if options.json:
        print(json.dumps(_as_json(options, asker, name, pruned, plain), indent=2))
    else:
        _print(options, name, pruned, plain)
    return 0


def _default_localizer(options: argparse.Namespace, asker: Asker, region: Region | None) -> str:
    if region is not None:
        return "box"
    if options.method == "none":
        return "whole"
    return "attention" if asker.head is None or options.layer is not None else "head"


def _answers(
    options: argparse.Namespace, asker: Asker, image: Image, localizer: Localizer
) -> tuple[Answer, Answer | None]:
    method, plain = by_name(options.method, options.keep), None
    length = options.max_new_tokens
    if options.compare:
        for warm_up in (method, None):
            asker.ask(image, options.question, method=warm_up, localizer=localizer, max_new_tokens=1)
    pruned = asker.ask(image, options.question, method=method, localizer=localizer, max_new_tokens=length)
    if options.compare:
        plain = asker.ask(image, options.question, method=None, localizer=WholeLocalizer(), max_new_tokens=length)
    return pruned, plain


def _region(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Region | None:
    if options.layer is not None and (options.region or options.localizer not in (None, "attention")):
        parser.error("--layer must come with --localizer attention")
    if options.min_confidence is not None and (options.region or options.localizer in ("box", "whole")):
        parser.error("--min-confidence must come with a localizer that looks at the image")
    if options.localizer in SECOND_MODELS and options.localizer_model is None:
        parser.error(f"--localizer {options.localizer} must come with --localizer-model PATH")
    if options.localizer_model is not None and options.localizer not in (*SECOND_MODELS, "head"):
        parser.error(f"--localizer-model must come with --localizer {', '.join(SECOND_MODELS)} or head")
    if options.region and options.localizer not in (None, "box"):
        parser.error(f"--region must come without --localizer {options.localizer}: the box is given already")
    if not options.region:
        if options.localizer == "box":
            parser.error("--localizer box must come with --region X0,Y0,X1,Y1")
        return None
    boxes = []
    for text in options.region:
        try:
            boxes.append(tuple(float(part) for part in text.split(",")))
            if len(boxes[-1]) != 4:
                raise ValueError
        except ValueError:
            parser.error(f"--region must be four numbers X0,Y0,X1,Y1, got {text!r}")
    try:
        return Region(tuple(boxes))
    except ValueError as error:
        parser.error(f"--region: {error}")


def _open(path: str, parser: argparse.ArgumentParser) -> Image:
    from crop.cli.images import open_image

    try:
        return open_image(path)
    except (OSError, ValueError) as error:
        parser.error(f"IMAGE: {str(error).removeprefix('open_image: source ')}")


def _device(name: str | None, parser: argparse.ArgumentParser) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        parser.error(f"--device {name} cannot be used: {str(error).splitlines()[0]}")
    return name


def _as_json(
    options: argparse.Namespace, asker: Asker, localizer: str, pruned: Answer, plain: Answer | None
) -> dict[str, Any]:
    compare = None
    if plain is not None:
        compare = {
            "answer": plain.text,
            "tokens": asdict(plain.tokens),
            "seconds": plain.seconds,
            "speedup": plain.seconds["total"] / pruned.seconds["total"],
        }
    return {
        "question": options.question,
        "answer": pruned.text,
        "model": options.model,
        "device": str(asker.model.device),
        "dtype": str(asker.model.dtype).removeprefix("torch."),
        "method": options.method,
        "keep": options.keep,
        "localizer": localizer,
        "region": {
            "boxes": [list(box) for box in pruned.region.boxes],
            "confidence": pruned.region.confidence,
            "area": pruned.region.area,
            "reason": pruned.region.reason,
        },
        "tokens": asdict(pruned.tokens),
        "seconds": pruned.seconds,
        "overlay": options.overlay,
        "compare": compare,
    }


def _print(options: argparse.Namespace, localizer: str, pruned: Answer, plain: Answer | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from crop.cli.ask import STAGES

    facts = Table.grid(padding=(0, 2))
    facts.add_row("answer", Text(pruned.text, "bold green"))
    if plain is not None:
        facts.add_row("unpruned", Text(plain.text, "bold"))
    region, tokens = pruned.region, pruned.tokens
    boxes = "whole image" if region.is_whole else "  ".join(",".join(f"{v:.3f}" for v in box) for box in region.boxes)
    facts.add_row(
        "region",
        f"{boxes}  (confidence {region.confidence:.2f}, {region.area:.0%} of the image, by {localizer})",
    )
    if region.reason:
        facts.add_row("because", Text(region.reason))
    facts.add_row(
        "tokens",
        f"{tokens.before} before, {tokens.after_plc} after PLC, {tokens.after_ilp} after ILP; "
        f"layer average {tokens.layer_average:.1f}",
    )
    times = Table(box=None, padding=(0, 2, 0, 0))
    columns = [("pruned" if options.method != "none" else "time", pruned)] + ([("unpruned", plain)] if plain else [])
    times.add_column("stage")
    for title, _ in columns:
        times.add_column(f"{title} ms", justify="right")
    for stage in STAGES:
        style = "bold" if stage == "total" else None
        times.add_row(stage, *(f"{1000 * answer.seconds[stage]:.1f}" for _, answer in columns), style=style)
    console = Console(highlight=False)
    console.print(facts)
    console.print()
    console.print(times)
    if plain is not None:
        ratio = plain.seconds["total"] / pruned.seconds["total"]
        console.print(f"\n{ratio:.2f} times the speed of the unpruned run, localizer included")
    if options.overlay:
        console.print(f"overlay written to {options.overlay}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
