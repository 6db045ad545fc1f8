"""What ``crop ask`` prints: text for people, JSON for programs."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from crop.cli.ask import STAGES, Answer, Asker


def as_json(
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


def print_answer(options: argparse.Namespace, localizer: str, pruned: Answer, plain: Answer | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

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
