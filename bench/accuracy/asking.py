"""What the benches share that ask the embedded model the same questions in several ways."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench.accuracy.data import Item
from bench.common import header, save, table
from bench.pictures import add_options, ask_model, first_seed
from crop import embedded
from crop.cli.ask import Asker
from crop.geometry.region import Region
from crop.methods import Method
from crop.patching.patch import patch
from crop.patching.stats import PruneStats


class Reply(NamedTuple):
    """One answer, its score, and how many vision tokens it took: entering the decoder, after the last cut, on average."""

    text: str
    score: float
    entering: int
    tokens: int
    average: float


@dataclass(frozen=True, eq=False)
class Run:
    """The embedded model, its pictures, and how it is asked."""

    first: int  # seed
    asker: Asker
    batch: int
    json: Path | None

    @property
    def facts(self) -> dict[str, Any]:
        """What a table says about where it comes from."""
        return {"first seed": self.first}

    @staticmethod
    def bar(of: Sequence[Any], name: str) -> Iterable[Any]:
        """The same, with a bar that shows how far it is."""
        return tqdm(of, name, disable=None)

    def finish(self, rows: list[dict[str, Any]], more: Mapping[str, list[dict[str, Any]]]) -> None:
        """Print the tables, and write them where --json says."""
        print(header(), *(table(of) for of in more.values()), table(rows), sep="\n\n")
        if self.json:
            save(self.json, rows, more)


def option_parser(name: str, description: str | None, questions: int) -> argparse.ArgumentParser:
    """The options of these benches; questions: how many by default."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.accuracy.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, "try")
    parser.add_argument("--questions", type=int, default=questions)
    parser.add_argument("--batch", type=int, default=20, help="questions answered together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser


def begin(options: argparse.Namespace) -> Run:
    """The model that the options name, ready to be asked."""
    torch.set_num_threads(options.threads)
    return Run(first_seed(options), ask_model(options.model, "cpu", "auto"), options.batch, options.json)


class Around:
    """What is done around a batch beside the patch; the base does nothing."""

    def batch(self, run: Run, inputs: Any, regions: Sequence[Region], stats: PruneStats) -> AbstractContextManager[Any]:
        """Entered inside the patch, before the model is asked about a batch."""
        return nullcontext()


@torch.no_grad()
def answers(
    run: Run,
    items: Sequence[Item],
    method: Method | None,
    regions: Sequence[Region],
    around: Around | None = None,
    positions: str = "original",
) -> list[Reply]:
    """Greedy answers to all questions, each with its region; ``positions`` as for ``patch``."""
    around, found, asker = around or Around(), [], run.asker
    for start in range(0, len(items), run.batch):
        part = slice(start, start + run.batch)
        asked, images = items[part], [item.picture() for item in items[part]]
        inputs = asker.encode_batch([[image] for image in images], [item.question for item in asked])
        sizes = [image.size for image in images]
        given, where = {"processor": asker.processor, "image_size": sizes, "positions": positions}, list(regions[part])
        with patch(asker.model, method, where, **given) as stats, around.batch(run, inputs, where, stats):
            output = asker.model.generate(**inputs, max_new_tokens=embedded.LONGEST, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in asker.processor.batch_decode(new, skip_special_tokens=True)]
        counts = stats.tokens_after_plc, stats.tokens_after_ilp, stats.layer_average
        found += [
            Reply(text, item.score(text), *count) for item, text, *count in zip(asked, texts, *counts, strict=True)
        ]
    return found
