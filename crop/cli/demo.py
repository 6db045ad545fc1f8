"""The demo: rendered pictures, asked with and without pruning, and what the model got to see of them."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from crop.cli.ask import EMBEDDED, Answer, Asker, load
from crop.cli.visualize import contact_sheet, outlined, overlay
from crop.embedded import LONGEST, scenes
from crop.localizers.base import Localizer, WholeLocalizer
from crop.methods.base import Method
from crop.methods.registry import by_name

KEEP = 0.11
ROUNDS = 5  # of the timing
Way = tuple[Method | None, Localizer]


def demo(out: Path, *, count: int = 6, seed: int = 0) -> None:
    """Print a table of answers and write the pictures.

    Args:
        out: folder, made where it is missing.
        count: pictures; the kinds take turns.
        seed: which pictures.
    Raises:
        UsageError: the embedded model is not installed. OSError: the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    with console.status("loading the embedded model"):
        asker = load(EMBEDDED, "cpu", "auto")
        find = asker.localizer("head")
    ways: tuple[Way, Way] = (None, WholeLocalizer()), (by_name("crop", KEEP), find)
    rows, sheet = [], []
    examples = track(scenes.examples(count, seed), "asking", total=count, console=console, transient=True)
    for number, (scene, question) in enumerate(examples):
        plain, pruned = (_ask(asker, scene, question, way, LONGEST) for way in ways)
        rounds = [[_first_token(_ask(asker, scene, question, way, 1)) for way in ways] for _ in range(ROUNDS)]
        times = tuple(map(median, zip(*rounds, strict=True)))
        seen = overlay(scene.image, *pruned.images[0].drawing)
        scene.image.save(out / f"{number:02d}-{scene.picture}.png")
        seen.save(out / f"{number:02d}-{scene.picture}-seen.png")
        rows.append((question, plain, pruned, times))
        line = f"truth: {question.answer}    unpruned: {plain.text}    pruned: {pruned.text}"
        sheet.append(((outlined(scene.image, pruned.region), seen), f"{question.text}?", line))
    contact_sheet(sheet).save(out / "contact_sheet.png")
    _print(console, rows)
    written = f"Pictures: {out / 'contact_sheet.png'}, and beside it each picture and what was seen of it."
    console.print(written, soft_wrap=True, markup=False)


def _ask(asker: Asker, scene: scenes.Scene, question: scenes.Question, way: Way, max_new_tokens: int) -> Answer:
    method, localizer = way
    return asker.ask(scene.image, question.text, method=method, localizer=localizer, max_new_tokens=max_new_tokens)


def _first_token(answer: Answer) -> float:
    return answer.seconds["total"] - answer.seconds["decode"]


def _print(console: Console, rows: list[tuple[scenes.Question, Answer, Answer, tuple[float, ...]]]) -> None:
    table = Table(
        caption=f"Speed: time to the first token, unpruned / pruned, localizer included; medians of {ROUNDS}."
    )
    table.add_column("question")
    for title, width in (("truth", 0), ("unpruned", 0), ("pruned", 0), ("region", 6), ("tokens", 9), ("speed", 0)):
        table.add_column(title, no_wrap=not width, max_width=width or None)  # what is left is the question's
    hits, spent = [0, 0], [0.0, 0.0]
    for question, plain, pruned, times in rows:
        cells = []
        for place, answer in enumerate((plain, pruned)):
            right = answer.text == question.answer
            hits[place] += right
            spent[place] += times[place]
            cells.append(Text(answer.text, "green" if right else "red"))
        region, tokens = pruned.region, pruned.tokens
        sure = f"{'whole' if region.is_whole else f'{region.area:.0%}'} ({region.confidence:.2f})"
        steps = f"{tokens.before} > {tokens.after_plc} > {tokens.after_ilp}"
        table.add_row(question.text, question.answer, *cells, sure, steps, f"{times[0] / times[1]:.2f}x")
    console.print(table)
    count = len(rows)
    average = sum(pruned.tokens.layer_average for _, _, pruned, _ in rows) / count
    final = sum(pruned.tokens.after_ilp for _, _, pruned, _ in rows) / count
    console.print(
        f"[bold]{hits[1]} of {count} right with {final:.0f} of {rows[0][1].tokens.before} vision tokens left "
        f"({average:.0f} on average over the layers), {hits[0]} of {count} unpruned; first token after "
        f"{1000 * spent[1] / count:.0f} ms instead of {1000 * spent[0] / count:.0f}: {spent[0] / spent[1]:.2f} times the speed."
    )
