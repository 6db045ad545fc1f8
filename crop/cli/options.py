"""Options of the command line: numbers, regions, devices, and which of them go together."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import runpy
import sys
from collections.abc import Callable, Sequence

from crop.geometry.region import Region
from crop.localizers.pretrained import one_line
from crop.localizers.registry import localizer_names
from crop.methods.registry import method_names

DTYPES = ("auto", "float32", "bfloat16", "float16")
SECOND_MODELS = ("clip", "detector", "vlm")
NO_PATH = ("attention", "box", "cascade", "ocr", "union", "whole")  # localizers that load nothing
NO_LAYER = (*SECOND_MODELS, "head", "ocr", "cascade", "union", "box", "whole")
NEEDED = {  # extra -> module -> package that brings it
    "demo": {"transformers": "transformers", "PIL": "pillow", "rich": "rich"},
    "app": {"transformers": "transformers", "PIL": "pillow", "gradio": "gradio"},
}


class UsageError(Exception):
    """Something the user can put right: a wrong path, a family that is not supported."""


# What ends in one line for the user: wrong use, what the package refuses, no such model, no extra, no room on the device.
REFUSED = (UsageError, ValueError, OSError, ImportError, RuntimeError)


def number(kind: type, low: float, high: float, what: str) -> Callable[[str], float]:
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


fraction = number(float, sys.float_info.min, 1.0, "a number above 0 and at most 1")
count = number(int, 1, sys.maxsize, "a whole number of at least 1")
natural = number(int, 0, sys.maxsize, "a whole number of at least 0")


def need_packages(command: str, extra: str = "demo") -> None:
    """Refuse a command whose packages are missing. UsageError: names them and the extra that brings them."""
    missing = [name for module, name in NEEDED[extra].items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f'crop {command} needs {", ".join(missing)}: pip install "crop-vlm[{extra}]"')


def add_model_options(parser: argparse.ArgumentParser, answers: bool = True) -> None:
    """Which model answers, where and how: read by ``crop.cli.ask.load_chosen``; and ``--plugin``.

    Args:
        answers: it answers in words, so many at most.
    """
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="embedded",
                       help="embedded (default), a folder, or a Hugging Face hub name; Qwen-VL and others need the extra vision")  # fmt: skip
    group.add_argument("--plugin", action="append", default=[], metavar="FILE.py|MODULE",
                       help="import this first: code that registers localizers or methods of your own")  # fmt: skip
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)")
    group.add_argument("--dtype", choices=DTYPES, default="auto")
    group.add_argument("--device-map", metavar="MAP",
                       help="how accelerate places a large model, e.g. auto; instead of --device")  # fmt: skip
    group.add_argument("--attn-implementation", metavar="NAME", help="sdpa, eager, flash_attention_2, ...")
    group.add_argument("--trust-remote-code", action="store_true",
                       help="run code that comes with the model; without it, nothing of that kind runs or asks")  # fmt: skip
    if answers:
        group.add_argument("--max-new-tokens", type=count, default=32, metavar="N", help="of an answer (default 32)")


def load_plugin(name: str) -> None:
    """Import a module, or run a file, that registers localizers or methods. UsageError: there is none."""
    try:
        if name.endswith(".py"):
            runpy.run_path(name)
        else:
            importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise UsageError(f"--plugin {name} cannot be loaded: {error}") from error


def check_options(options: argparse.Namespace) -> None:
    """Refuse unknown methods and localizers (plug-ins had their turn), and options that the localizer would not read.

    Raises:
        UsageError: names those that are known, says what goes with what.
    """
    name, path = options.localizer, options.localizer_model
    names = {"--method": (options.method, method_names()), "--localizer": (name, localizer_names())}
    for option, (given, known) in names.items():
        if given is not None and given not in known:
            raise UsageError(f"{option} must be one of {', '.join(known)}, got {given!r}")
    if options.layer is not None and (options.region or name in NO_LAYER):
        raise UsageError("--layer must come with --localizer attention")
    if options.min_confidence is not None and (options.region or name in ("box", "whole")):
        raise UsageError("--min-confidence must come with a localizer that looks at the image")
    if name in SECOND_MODELS and path is None:
        raise UsageError(f"--localizer {name} must come with --localizer-model PATH")
    if path is not None and (name is None or name in NO_PATH):
        raise UsageError(f"--localizer-model must come with --localizer {', '.join(SECOND_MODELS)} or head")
    if options.region and name not in (None, "box"):
        raise UsageError(f"--region must come without --localizer {name}: the box is given already")
    if name == "box" and not options.region:
        raise UsageError("--localizer box must come with --region X0,Y0,X1,Y1")


def parse_region(texts: Sequence[str], size: tuple[int, int], name: str = "--region") -> Region:
    """What ``--region`` says of one image.

    Args:
        texts: boxes X0,Y0,X1,Y1 as fractions, or px:X0,Y0,X1,Y1 in pixels; several joined by "+"; "whole".
        size: (width, height) of the upright image.
        name: of the option, for errors.
    Raises:
        UsageError: not four numbers, pixels without "px:", or no box of the image.
    """
    if list(texts) == ["whole"]:
        return Region.whole()
    boxes = []
    for text in texts:
        pixels = text.startswith("px:")
        for part in text.removeprefix("px:").split("+"):
            try:
                box = tuple(float(number) for number in part.split(","))
                if len(box) != 4:
                    raise ValueError
            except ValueError:
                raise UsageError(f"{name} must be four numbers X0,Y0,X1,Y1, got {part!r}") from None
            if not pixels and max(box) >= 2:  # up to there it may reach a little over the edge
                raise UsageError(
                    f"{name} must be fractions of width and height, got {part!r}; for pixels write px:{part}"
                )
            width, height = size if pixels else (1, 1)
            boxes.append((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    try:
        return Region(tuple(boxes))
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def page_numbers(text: str) -> tuple[int, ...]:
    """A parser of pages for argparse: "1,3-5"."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            pages = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            pages = range(0)
        if not pages or pages[0] < 1 or len(pages) > 1000:
            raise argparse.ArgumentTypeError(f"must be page numbers such as 1,3-5, got {text}")
        found += pages
    return tuple(found)


def choose_device(name: str | None) -> str:
    """The device asked for; None: a GPU where there is one. UsageError: it cannot be used."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        raise UsageError(f"--device {name} cannot be used: {one_line(error)}") from error
    return name
