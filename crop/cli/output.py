"""What ``crop ask`` prints: text for people, JSON for programs."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from crop.cli.ask import STAGES, Answer, Asker
from crop.geometry.region import Region


def as_json(
    options: argparse.Namespace, asker: Asker, localizer: str, pruned: Answer, plain: Answer | None
) -> dict[str, Any]:
    """The answer, and that without pruning where asked for, as one object.

    ``region`` is that of a single image, ``images`` tells of each, ``tokens`` of all together.
    """
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
        "prune_encoder": options.prune_encoder,
        "localizer": localizer,
        "region": _region(pruned.images[0].region) if len(pruned.images) == 1 else None,
        "images": [{"region": _region(image.region), "tokens": asdict(image.tokens)} for image in pruned.images],
        "tokens": asdict(pruned.tokens),
        "seconds": pruned.seconds,
        "overlay": options.overlay,
        "compare": compare,
    }


def _region(region: Region) -> dict[str, Any]:
    return {
        "boxes": [list(box) for box in region.boxes],
        "confidence": region.confidence,
        "area": region.area,
        "reason": region.reason,
    }


def where(region: Region, localizer: str) -> str:
    """A region in words: its boxes, how sure, how large, by whom."""
    boxes = "  ".join(",".join(f"{value:.3f}" for value in box) for box in region.boxes)
    place = "whole image" if region.is_whole else boxes
    return f"{place}  (confidence {region.confidence:.2f}, {region.area:.0%} of the image, by {localizer})"


def speed(pruned: Answer, plain: Answer) -> str:
    """How the total times compare."""
    ratio = plain.seconds["total"] / pruned.seconds["total"]
    return f"{ratio:.2f} times the speed of the unpruned run, localizer included"


def print_answer(
    options: argparse.Namespace, localizer: str, pruned: Answer, plain: Answer | None, overlay: str | None
) -> None:
    """The answer, where it comes from, what it took; ``overlay``: the picture that was written."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_row("answer", Text(pruned.text, "bold green"))
    if plain is not None:
        facts.add_row("unpruned", Text(plain.text, "bold"))
    for number, image in enumerate(pruned.images, 1):
        title = "region" if len(pruned.images) == 1 else f"region {number}"
        facts.add_row(title, Text(where(image.region, localizer)))
        if image.region.reason:
            facts.add_row("because", Text(image.region.reason))
    tokens = pruned.tokens
    facts.add_row(
        "tokens",
        f"{tokens.before} before, {tokens.encoded} encoded, {tokens.after_plc} after PLC, {tokens.after_ilp} after ILP; "
        f"layer average {tokens.layer_average:.1f}",
    )
    times = Table(box=None, padding=(0, 2, 0, 0))
    columns = [("pruned" if options.method != "none" or options.prune_encoder else "time", pruned)] + (
        [("unpruned", plain)] if plain else []
    )
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
        console.print(f"\n{speed(pruned, plain)}")
    if overlay:
        console.print(f"overlay written to {overlay}", soft_wrap=True, markup=False)
