"""README's table of families, from what the contract runs over: `python -m tests.support.readme_table` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from crop.models import families
from tests.support.families.entry import Family
from tests.support.tiny_families import FAMILIES, get_config

README = Path(__file__).resolve().parents[2] / "README.md"
FENCES = "<!-- families: written by `python -m tests.support.readme_table` -->\n", "<!-- families: end -->\n"


def table() -> str:
    """What the contract runs over, as README shows it: families that need and refuse the same share a row."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, family in FAMILIES.items():
        model_type = get_config(name).model_type
        title = re.split("[:,(]", family.title)[0].strip()
        needs = "-" if family.processor is None else "`processor`, `image_size`"
        rows.setdefault((needs, refused(family, model_type)), {})[title] = model_type
    lines = ["| family and `model_type` | with a region `patch` needs | refused |", "|---|---|---|"]
    for (needs, without), members in sorted(rows.items(), key=lambda row: len(row[0][1])):
        named = ", ".join(f"{title} `{model_type}`" for title, model_type in members.items())
        lines.append(f"| {named} | {needs} | {without} |")
    return "\n".join(lines) + "\n"


def refused(family: Family, model_type: str) -> str:
    """What a family cannot do that others can."""
    named = {"flash_attention_2": "flash attention", "uniform": "static caches", "compact": '`positions="compact"`'}
    found = [] if families()[model_type].videos else ["video"]
    return ", ".join(found + [what for name, what in named.items() if name in family.refuses]) or "-"


def now() -> tuple[str, str, str]:
    """README before the table, the table, README after it."""
    before, rest = README.read_text().split(FENCES[0])
    table, after = rest.split(FENCES[1])
    return before + FENCES[0], table, FENCES[1] + after


if __name__ == "__main__":
    before, _, after = now()
    README.write_text(before + table() + after)
