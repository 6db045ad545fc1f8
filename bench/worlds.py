"""An embedded model and the pictures that it was made for, so that no table needs to know which of them it asks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image

from bench.training import grounding
from bench.training.model2 import pages
from crop import embedded
from crop.cli.ask import EMBEDDED, Asker, load
from crop.embedded import scenes, things
from crop.geometry.region import Region

GROUNDING = "grounding"


class Drawn(NamedTuple):
    """A picture and what can be asked about it; each question has ``kind``, ``text``, ``answer``, ``boxes``, ``local``.

    ``shown``: words for what it shows, and the words written in it.
    """

    image: Image
    questions: tuple[Any, ...]
    shown: frozenset[str]


@dataclass(frozen=True)
class World:
    """Pictures, and the model that knows them.

    Args:
        name: on the command line.
        ask: (folder of weights or None, device, dtype) -> the model, ready to be asked.
        draw: seed -> picture and its questions, those for a place in blocks (group ``GROUNDING``) among them.
        named: text of a question -> the words in it for what a picture may show.
        groups: kind of question -> group of the tables.
        budgets: fractions of the tokens in the tables. num_tokens: of a picture.
        max_new_tokens: of the longest answer, its end included.
        seeds: use -> first seed. "1" and "2" are the two disjoint sets of the headlines, 100,000 pictures at most each;
            "try" is for experiments and choices, "train" and "fit" for a head.
    """

    name: str
    ask: Callable[[Path | None, str, str], Asker]
    draw: Callable[[int], Drawn]
    named: Callable[[str], set[str]]
    groups: Mapping[str, str]
    budgets: tuple[float, ...]
    num_tokens: int
    max_new_tokens: int
    seeds: Mapping[str, int]


@lru_cache(maxsize=16)
def _embedded(seed: int) -> Drawn:
    drawn = scenes.scene(seed)
    shown = {str(value) for thing in drawn.things for value in (thing.color, thing.shape, thing.word) if value}
    shown |= {f"{thing.shape}s" for thing in drawn.things if thing.shape}
    return Drawn(drawn.image, (*drawn.questions, *grounding.box_questions(drawn)), frozenset(shown))


def _embedded_names(text: str) -> set[str]:
    known = {*things.COLORS, *things.SHAPES, *things.DRAWN_WORDS} | {f"{shape}s" for shape in things.SHAPES}
    return set(text.split()) & known


@lru_cache(maxsize=16)
def _pages(seed: int) -> Drawn:
    drawn = pages.scene(seed)
    shown = {str(value) for thing in drawn.things for value in (thing.color, thing.shape) if value}
    shown |= {f"{thing.shape}s" for thing in drawn.things if thing.shape} | {run.text for run in drawn.runs}
    return Drawn(drawn.image, drawn.questions, frozenset(shown))


def _pages_names(text: str) -> set[str]:
    known = {*pages.COLORS, *pages.SHAPES} | {f"{shape}s" for shape in pages.SHAPES}
    return {word for word in text.split() if word in known or not word.islower()}


def _ask_embedded(folder: Path | None, device: str, dtype: str) -> Asker:
    return load(EMBEDDED if folder is None else str(folder), device, dtype)


def _ask_pages(folder: Path | None, device: str, dtype: str) -> Asker:
    if folder is None:
        raise ValueError("pages: model must be a folder of exported weights, got none; give --model")
    model, processor = embedded.load(
        device, torch.float32 if dtype == "auto" else getattr(torch, dtype), directory=folder
    )
    head = folder / "head.safetensors"
    return Asker(model, processor, pages_prompt, pages_tidy, head if head.is_file() else None)


def pages_prompt(question: str) -> str:
    """The text that the second model was trained to answer; capitals and digits are what stands in the picture."""
    return f"<image> {question.strip().rstrip('?').strip()} ?"


def pages_tidy(text: str) -> str:
    """Decoded text as an answer: characters are tokens of their own, so those that follow each other are joined."""
    return re.sub(r"(?<=[A-Z0-9.]) (?=[A-Z0-9.])", "", " ".join(text.split()))


_TEXT = "local text"
WORLDS = {
    world.name: world
    for world in (
        World(
            name="embedded", ask=_ask_embedded, draw=_embedded, named=_embedded_names, num_tokens=256, budgets=(0.5, 0.33, 0.22, 0.11, 0.055),
            max_new_tokens=5,
            groups={
                **dict.fromkeys(("digit", "word", "sign", "price", "item", "total", "date", "shop"), _TEXT),
                **dict.fromkeys(("color", "shape", "where"), "colour, shape, place"),
                "count": "counting", **dict.fromkeys(scenes.GLOBAL_KINDS, "global"), grounding.BOX_KIND: GROUNDING,
            },
            # Tuned on: 10,500,000 and more. Asked: 10,800,000 (localizers, regions), 10,850,000 (encoder).
            seeds={"1": 10_900_000, "2": 14_000_000, "try": 15_000_000, "train": 9_000_000, "fit": 10_500_000},
        ),
        World(
            name="pages", ask=_ask_pages, draw=_pages, named=_pages_names, num_tokens=576, max_new_tokens=13,
            budgets=(0.3333, 0.2222, 0.1111, 0.0556),  # 192, 128, 64 and 32 tokens
            groups={
                **dict.fromkeys(set(pages.LOCAL_KINDS) - {"color", "shape"}, _TEXT),
                **dict.fromkeys(("color", "shape"), "colour, shape"),
                **dict.fromkeys(("relation", "compare"), "relations"), "count": "counting",
                **dict.fromkeys(pages.GLOBAL_KINDS, "global"), pages.BOX_KIND: GROUNDING,
            },
            # Trained on below 20,000,000, watched from there to 20,100,000.
            seeds={"1": 40_000_000, "2": 50_000_000, "try": 32_000_000, "train": 30_000_000, "fit": 31_000_000},
        ),
    )
}  # fmt: skip


def region_of(question: Any) -> Region:
    """What a question needs of its picture."""
    return Region(tuple(question.boxes))


def blocks(answer: str) -> tuple[float, float, float, float] | None:
    """The box that an answer names in blocks of both worlds' 8 x 8 grid; None: it names none."""
    region = grounding.box_region(answer)
    return None if region is None else region.boxes[0]


def add_world_options(parser: argparse.ArgumentParser, seeds: str) -> None:
    """Which model is asked about which pictures; ``seeds``: the set of ``World.seeds`` unless another one is named."""
    parser.add_argument("--world", choices=WORLDS, default="embedded", help="pictures, and the model made for them")
    parser.add_argument("--model", type=Path, help="folder of its weights; default: those of the package")
    parser.add_argument("--set", choices=("1", "2", "try"), default=seeds, help="pictures: of the headlines, or to try")
    parser.add_argument("--first", type=int, help="seed of the first picture, in the place of --set")


def chosen_world(options: argparse.Namespace) -> tuple[World, int]:
    """What ``add_world_options`` read: the world, and the first seed."""
    world = WORLDS[options.world]
    return world, world.seeds[options.set] if options.first is None else options.first
