"""``crop ask``: its options, and what it does."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from crop.cli.options import (
    UsageError,
    add_model_options,
    check_options,
    fraction,
    load_plugin,
    natural,
    need_packages,
    page_numbers,
    parse_region,
)
from crop.geometry.region import Region
from crop.localizers.base import Localizer
from crop.localizers.pretrained import one_line
from crop.localizers.registry import COARSE
from crop.methods.registry import by_name

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
  crop ask page.png "what is the total" --model Qwen/Qwen2.5-VL-7B-Instruct --prune-encoder --localizer ocr
      of a large picture, encode little more than the region
  crop ask receipt.png "what is the total" --json | jq .tokens
  crop ask front.jpg back.jpg "which side is torn" --model ... --region whole --region px:40,60,400,300
  crop ask report.pdf "who signed" --pages 3 --model ...
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``crop ask``."""
    parser.add_argument("images", metavar="IMAGE", nargs="+",
                        help="picture file, PDF file (see --pages), or - for standard input; several are asked about together")  # fmt: skip
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--region", action="append", metavar="X0,Y0,X1,Y1",
                        help="where the answer is, as fractions of width and height, or px:X0,Y0,X1,Y1 in pixels; may be given "
                        "several times for one image, once for each of several (boxes joined by +, or whole)")  # fmt: skip
    parser.add_argument("--localizer", metavar="NAME",
                        help="who finds the region: head (trained for the model; default where there is one), attention (the "
                        "model's own, early; default elsewhere), clip, detector, vlm (a second model), ocr (lines of "
                        "text; extra ocr), cascade (head or attention, then ocr), union (both), box (--region), "
                        "whole (nobody: prune by attention alone)")  # fmt: skip
    parser.add_argument("--localizer-model", metavar="PATH",
                        help="folder or hub name of the model for clip, detector or vlm; file of weights for head")  # fmt: skip
    parser.add_argument("--layer", type=natural, metavar="N",
                        help="decoder layer whose attention finds the region (default: 1/16 of the depth, at least 1)")  # fmt: skip
    parser.add_argument("--min-confidence", type=fraction, metavar="FRACTION",
                        help="below it the whole image counts as region (default: depends on the localizer)")  # fmt: skip
    parser.add_argument("--method", metavar="NAME", default="crop",
                        help="plc: pool before the language model; ilp: drop inside it; crop: both (default); none; a baseline "
                        "such as fastv, visionzip, divprune; or one of a plug-in")  # fmt: skip
    parser.add_argument("--keep", type=fraction, default=0.11, metavar="FRACTION",
                        help="vision tokens left in the end, above 0 and up to 1 (default 0.11)")  # fmt: skip
    parser.add_argument("--prune-encoder", action="store_true",
                        help="encode region and surroundings alone, the rest at low resolution (tiled models, Qwen-VL, GLM-V); "
                        "attention and head then look at a small copy first")  # fmt: skip
    parser.add_argument("--overlay", metavar="OUT.png", help="write a picture of what was kept, pooled and dropped")
    parser.add_argument("--compare", action="store_true",
                        help="also answer without pruning (and warm up first, so that the times are fair)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--pages", type=page_numbers, default=(), metavar="1,3-5",
                        help="pages of a PDF file that has several (extra pdf)")  # fmt: skip
    parser.add_argument("--allow-url", action="store_true",
                        help="fetch an IMAGE that is an http(s) address, up to 64 MiB and 30 s")  # fmt: skip
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Ask, and print the answer. UsageError and what the package refuses: ValueError, OSError, ImportError."""
    need_packages("ask")
    for name in options.plugin:
        load_plugin(name)
    check_options(options)
    _check_question(options.question)
    if options.overlay:
        check_writable(Path(options.overlay))
    pictures = _open(options)
    regions = _regions(options, pictures)
    from rich.console import Console
    from rich.markup import escape

    from crop.cli.ask import load_chosen
    from crop.cli.output import as_json, print_answer

    status = Console(stderr=True)
    with status.status(f"loading {escape(options.model)}"):
        asker = load_chosen(options)
    name = options.localizer or _default_localizer(options, asker)
    settings = {key: getattr(options, key) for key in ("layer", "min_confidence")}
    settings["coarse"] = 4 if options.prune_encoder and name in COARSE else 1
    localizers = [
        asker.localizer(name, region, path=options.localizer_model, **settings)
        for region in (regions or [None])  # one for all images, or one each
    ]
    localizers = localizers if regions else localizers * len(pictures)
    with status.status("asking"):
        pruned, plain = _answers(options, asker, pictures, localizers)
    problem = _draw(options.overlay, pictures, pruned) if options.overlay else None
    if options.json:
        print(json.dumps(as_json(options, asker, name, pruned, plain), indent=2))
    else:
        print_answer(options, name, pruned, plain, None if problem else options.overlay)
    if problem:  # after the answer, which is not lost
        raise UsageError(problem)
    return 0


def check_writable(path: Path) -> None:
    """Refuse a file that a picture cannot be written to, before anything runs.

    Raises:
        UsageError: its folder is not there or not ours to write in, or Pillow writes no such format.
    """
    from PIL import Image

    if not path.resolve().parent.is_dir():
        raise UsageError(f"--overlay must be in an existing folder, got {path}")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UsageError(f"--overlay must end in .png, .jpg, .webp or the like, got {path}")
    target = path if path.exists() else path.resolve().parent
    if path.is_dir() or not os.access(target, os.W_OK):
        raise UsageError(f"--overlay {path} cannot be written: it is a folder, or not yours to write")


def _draw(path: str, pictures: list[Image], answer: Answer) -> str | None:
    """Write what the model saw of all images, side by side; returns what went wrong."""
    from crop.cli.visualize import beside, overlay

    seen = [overlay(picture, *image.drawing) for picture, image in zip(pictures, answer.images, strict=True)]
    try:
        beside(seen).save(path)
    except (OSError, ValueError) as error:
        return f"--overlay {path} cannot be written: {one_line(error)}"


def _check_question(question: str) -> None:
    try:
        question.encode()
    except UnicodeEncodeError:
        shown = question.encode(errors="backslashreplace").decode()
        raise UsageError(f"QUESTION must be text in UTF-8, got bytes that are none: {shown}") from None


def _open(options: argparse.Namespace) -> list[Image]:
    from crop.cli.images import read_pictures

    try:
        return read_pictures(options.images, allow_url=options.allow_url, pages=options.pages)
    except (OSError, ValueError, ImportError) as error:
        text = one_line(error).removeprefix("open_image: source ").removeprefix("read_pictures: ")
        raise UsageError(f"IMAGE: {text}") from error


def _regions(options: argparse.Namespace, pictures: list[Image]) -> list[Region]:
    """One per image, none where none was given."""
    given = options.region or []
    if not given:
        return []
    if len(pictures) == 1:
        return [parse_region(given, pictures[0].size)]
    if len(given) != len(pictures):
        raise UsageError(f"--region must be given once for each of the {len(pictures)} images, got {len(given)}")
    return [parse_region([text], picture.size) for text, picture in zip(given, pictures, strict=True)]


def _default_localizer(options: argparse.Namespace, asker: Asker) -> str:
    if options.region:
        return "box"
    if options.method == "none" and not options.prune_encoder:
        return "whole"
    return asker.default_localizer if options.layer is None else "attention"


def _answers(
    options: argparse.Namespace, asker: Asker, pictures: list[Image], localizers: list[Localizer]
) -> tuple[Answer, Answer | None]:
    """Pruned, and unpruned where that is to be compared."""
    method = by_name(options.method, options.keep, asker.num_layers, encoder=options.prune_encoder)
    how = {"method": method, "localizer": localizers, "max_new_tokens": options.max_new_tokens}
    if options.compare:
        return asker.compare(pictures, options.question, **how)
    return asker.ask(pictures, options.question, **how), None
