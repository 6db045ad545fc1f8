"""``crop ask``: its options, and what it does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from crop.cli.options import (
    DTYPES,
    UsageError,
    check_localizer,
    check_names,
    choose_device,
    count,
    fraction,
    load_plugin,
    natural,
    need_packages,
    parse_region,
)
from crop.geometry.region import Region
from crop.localizers.base import Localizer, WholeLocalizer
from crop.methods.registry import by_name
from crop.models import family_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from crop.cli.ask import Answer, Asker

EXAMPLES = """\
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``crop ask``."""
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--model",
        default="embedded",
        help="embedded (default), a folder, or a Hugging Face hub name",
    )
    parser.add_argument("--region", action="append", metavar="X0,Y0,X1,Y1",
                        help="where the answer is, as fractions of width and height; may be given several times")  # fmt: skip
    parser.add_argument("--localizer", metavar="NAME",
                        help="who finds the region: head (trained for the model; default where there is one), attention (the "
                        "model's own, early; default elsewhere), clip, detector, vlm (a second model), ocr (lines of "
                        "text; extra ocr), cascade (head or attention, then ocr), union (both), box (--region), "
                        "whole (nobody: prune by attention alone)")  # fmt: skip
    parser.add_argument("--localizer-model", metavar="PATH",
                        help="folder or hub name of the model for clip, detector or vlm; file of weights for head")  # fmt: skip
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE.py|MODULE",
                        help="import this first: code that registers localizers or methods of your own")  # fmt: skip
    parser.add_argument("--layer", type=natural, metavar="N",
                        help="decoder layer whose attention finds the region (default: 1/16 of the depth, at least 1)")  # fmt: skip
    parser.add_argument("--min-confidence", type=fraction, metavar="FRACTION",
                        help="below it the whole image counts as region (default: depends on the localizer)")  # fmt: skip
    parser.add_argument("--method", metavar="NAME", default="crop",
                        help="plc: pool before the language model; ilp: drop inside it; crop: both (default); none; a registered "
                        "method; or a baseline, most of which want --localizer whole")  # fmt: skip
    parser.add_argument("--keep", type=fraction, default=0.11, metavar="FRACTION",
                        help="vision tokens left in the end, above 0 and up to 1 (default 0.11)")  # fmt: skip
    parser.add_argument("--overlay", metavar="OUT.png", help="write a picture of what was kept, pooled and dropped")
    parser.add_argument("--compare", action="store_true",
                        help="also answer without pruning (and warm up first, so that the times are fair)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--max-new-tokens", type=count, default=32, metavar="N")


def run(options: argparse.Namespace) -> int:
    """Ask, and print the answer.

    Raises:
        UsageError and what the package refuses: ValueError, OSError, ImportError.
    """
    need_packages("ask")
    for name in options.plugin:
        load_plugin(name)
    check_names(options.method, options.localizer)
    check_localizer(options)
    region = parse_region(options.region) if options.region else None
    image = _open(options.image)
    if options.overlay and not Path(options.overlay).resolve().parent.is_dir():
        raise UsageError(f"--overlay must be in an existing folder, got {options.overlay}")
    from rich.console import Console

    from crop.cli.ask import load
    from crop.cli.output import as_json, print_answer

    status = Console(stderr=True)
    with status.status(f"loading {options.model}"):
        asker = load(options.model, choose_device(options.device), options.dtype)
    name = options.localizer or _default_localizer(options, asker, region)
    settings = {key: getattr(options, key) for key in ("layer", "min_confidence")}
    localizer = asker.localizer(name, region, path=options.localizer_model, **settings)
    with status.status("asking"):
        pruned, plain = _answers(options, asker, image, localizer)
    if options.overlay:
        from crop.cli.visualize import overlay

        try:
            overlay(image, pruned.layout, pruned.plan, pruned.kept, pruned.region).save(options.overlay)
        except (OSError, ValueError) as error:  # ValueError: Pillow on an unknown ending
            raise UsageError(f"--overlay {options.overlay} cannot be written: {error}") from error
    if options.json:
        print(json.dumps(as_json(options, asker, name, pruned, plain), indent=2))
    else:
        print_answer(options, name, pruned, plain)
    return 0


def _open(path: str) -> Image:
    from crop.cli.images import open_image

    try:
        return open_image(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"IMAGE: {str(error).removeprefix('open_image: source ')}") from error


def _default_localizer(options: argparse.Namespace, asker: Asker, region: Region | None) -> str:
    if region is not None:
        return "box"
    if options.method == "none":
        return "whole"
    return "attention" if asker.head is None or options.layer is not None else "head"


def _answers(
    options: argparse.Namespace, asker: Asker, image: Image, localizer: Localizer
) -> tuple[Answer, Answer | None]:
    num_layers = len(family_of(asker.model).language_model(asker.model).layers)
    method, plain = by_name(options.method, options.keep, num_layers), None
    length = options.max_new_tokens
    if options.compare:
        for warm_up in (method, None):
            asker.ask(image, options.question, method=warm_up, localizer=localizer, max_new_tokens=1)
    pruned = asker.ask(image, options.question, method=method, localizer=localizer, max_new_tokens=length)
    if options.compare:
        plain = asker.ask(image, options.question, method=None, localizer=WholeLocalizer(), max_new_tokens=length)
    return pruned, plain
