"""The rendered pictures that the benches ask about: their seeds, groups of questions and budgets, and the embedded model."""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path

import torch

from crop import embedded
from crop.cli.ask import EMBEDDED, Asker, load
from crop.embedded import scenes
from crop.geometry.region import Box

NUM_TOKENS = scenes.GRID**2
BUDGETS = (0.3333, 0.2222, 0.1111, 0.0556)  # 192, 128, 64 and 32 tokens
# Use -> first seed, 100,000 pictures at most each: "1" and "2" are the two disjoint sets of the headlines, "try" is for
# experiments and choices, "train" and "fit" for a head. The model was trained on seeds below 20,000,000 and watched on
# the next 100,000; examples begin at scenes.UNSEEN.
SEEDS = {"1": 40_000_000, "2": 50_000_000, "try": 32_000_000, "train": 30_000_000, "fit": 31_000_000}
GROUNDING, TEXT = "grounding", "local text"
GROUPS = {  # kind of question -> row of the tables
    **dict.fromkeys(set(scenes.LOCAL_KINDS) - {"color", "shape"}, TEXT),
    **dict.fromkeys(("color", "shape"), "colour, shape"),
    **dict.fromkeys(("relation", "compare"), "relations"), "count": "counting",
    **dict.fromkeys(scenes.GLOBAL_KINDS, "global"), scenes.BOX_KIND: GROUNDING,
}  # fmt: skip
NAMES = {*scenes.COLORS, *scenes.SHAPES} | set(map(scenes.plural, scenes.SHAPES))


@lru_cache(maxsize=16)
def draw(seed: int) -> scenes.Scene:
    """The picture of a seed."""
    return scenes.scene(seed)


def shown(scene: scenes.Scene) -> set[str]:
    """Words for what a picture shows, and the words written in it."""
    found = {str(value) for thing in scene.things for value in (thing.color, thing.shape) if value}
    return (
        found | {scenes.plural(thing.shape) for thing in scene.things if thing.shape} | {run.text for run in scene.runs}
    )


def named(text: str) -> set[str]:
    """The words of a question for what a picture may show."""
    return {word for word in text.split() if word in NAMES or not word.islower()}


def blocks(answer: str) -> Box | None:
    """The box that an answer names in blocks; None: it names none."""
    region = scenes.box_region(answer)
    return None if region is None else region.boxes[0]


def ask_model(folder: Path | None, device: str, dtype: str) -> Asker:
    """The embedded model, or one trained like it whose weights, and head if it has one, lie in a folder."""
    if folder is None:
        return load(EMBEDDED, device, dtype)
    precision = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    head = folder / embedded.HEAD.name
    model, processor = embedded.load(device, precision, directory=folder)
    return Asker(model, processor, embedded.prompt, head if head.is_file() else None)


def add_options(parser: argparse.ArgumentParser, seeds: str) -> None:
    """Which model is asked about which pictures; ``seeds``: the use of ``SEEDS`` unless another one is named."""
    parser.add_argument("--model", type=Path, help="folder of weights; default: those of the package")
    parser.add_argument("--set", choices=("1", "2", "try"), default=seeds, help="pictures: of the headlines, or to try")
    parser.add_argument("--first", type=int, help="seed of the first picture, in the place of --set")


def first_seed(options: argparse.Namespace) -> int:
    """The first picture that ``add_options`` read."""
    return SEEDS[options.set] if options.first is None else options.first
