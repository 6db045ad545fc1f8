"""The demo: rendered pictures, asked with and without pruning, and what the model got to see of them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from crop.cli.ask import EMBEDDED, Answer, load
from crop.cli.visualize import contact_sheet, outlined, overlay
from crop.embedded import scenes
from crop.localizers.base import WholeLocalizer
from crop.methods.registry import by_name

KEEP = 0.11
LONGEST = 5  # tokens of an answer, with the one that ends it


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
        method, whole = by_name("crop", KEEP), WholeLocalizer()
        first, question = next(scenes.examples(1, seed))
        for each, localizer in ((method, find), (None, whole)):  # warm up, so that the times are fair
            asker.ask(first.image, question.text, method=each, localizer=localizer, max_new_tokens=LONGEST)
    rows, sheet = [], []
    examples = track(scenes.examples(count, seed), "asking", total=count, console=console, transient=True)
    for number, (scene, question) in enumerate(examples):
        plain = asker.ask(scene.image, question.text, method=None, localizer=whole, max_new_tokens=LONGEST)
        pruned = asker.ask(scene.image, question.text, method=method, localizer=find, max_new_tokens=LONGEST)
        seen = overlay(scene.image, *pruned.images[0].drawing)
        scene.image.save(out / f"{number:02d}-{scene.picture}.png")
        seen.save(out / f"{number:02d}-{scene.picture}-seen.png")
        rows.append((question, plain, pruned))
        line = f"truth: {question.answer}    unpruned: {plain.text}    pruned: {pruned.text}"
        sheet.append(((outlined(scene.image, pruned.region), seen), f"{question.text}?", line))
    contact_sheet(sheet).save(out / "contact_sheet.png")
    _print(console, rows)
    written = f"Pictures: {out / 'contact_sheet.png'}, and beside it each picture and what was seen of it."
    console.print(written, soft_wrap=True, markup=False)


def _print(console: Console, rows: list[tuple[scenes.Question, Answer, Answer]]) -> None:
    table = Table(caption="Speed: unpruned time / pruned time, localizer included.")
    table.add_column("question")
    for title in ("truth", "unpruned", "pruned", "region", "tokens", "speed"):
        table.add_column(title, no_wrap=True)
    hits, times, costs = [0, 0], [0.0, 0.0], 0.0
    for question, plain, pruned in rows:
        cells = []
        for place, answer in enumerate((plain, pruned)):
            right = answer.text == question.answer
            hits[place] += right
            times[place] += answer.seconds["total"]
            cells.append(Text(answer.text, "green" if right else "red"))
        costs += pruned.seconds["localizer"]
        region, tokens = pruned.region, pruned.tokens
        sure = f"{'whole' if region.is_whole else f'{region.area:.0%}'} ({region.confidence:.2f})"
        steps = f"{tokens.before} > {tokens.after_plc} > {tokens.after_ilp}"
        ratio = plain.seconds["total"] / pruned.seconds["total"]
        table.add_row(question.text, question.answer, *cells, sure, steps, f"{ratio:.2f}x")
    console.print(table)
    count = len(rows)
    average = sum(pruned.tokens.layer_average for *_, pruned in rows) / count
    final = sum(pruned.tokens.after_ilp for *_, pruned in rows) / count
    console.print(
        f"[bold]{hits[1]} of {count} right with {final:.0f} of {rows[0][1].tokens.before} vision tokens left "
        f"({average:.0f} on average over the layers), {hits[0]} of {count} unpruned; "
        f"{times[0] / times[1]:.2f} times the speed, {times[0] / (times[1] - costs):.2f} times without the localizer."
    )
