"""Tables of families in the pages, from what the contract runs over: `python -m tests.support.readme_table` writes them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from crop.models import families
from tests.support.families.entry import Family
from tests.support.tiny_families import FAMILIES, get_config

ROOT = Path(__file__).resolve().parents[2]
FENCES = "<!-- families: written by `python -m tests.support.readme_table` -->\n", "<!-- families: end -->\n"


def what_is_supported() -> str:
    """README's table: families that need and refuse the same share a row."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, family in FAMILIES.items():
        model_type = get_config(name).model_type
        needs = "-" if family.processor is None else "`processor`, `image_size`"
        rows.setdefault((needs, refused(family, model_type)), {})[title(family)] = model_type
    lines = ["| family and `model_type` | with a region `patch` needs | refused |", "|---|---|---|"]
    for (needs, without), members in sorted(rows.items(), key=lambda row: len(row[0][1])):
        named = ", ".join(f"{name} `{model_type}`" for name, model_type in members.items())
        lines.append(f"| {named} | {needs} | {without} |")
    return "\n".join(lines) + "\n"


def where_layouts_are() -> str:
    """The table of crop/models/README.md: which file has the `images` function of which family."""
    files: dict[str, dict[str, None]] = {}
    for name, family in FAMILIES.items():
        module = families()[get_config(name).model_type].images.__module__
        files.setdefault(module, {})[title(family)] = None
    lines = ["| file | layouts | families |", "|---|---|---|"]
    for module, names in files.items():
        about = str(importlib.import_module(module).__doc__).rstrip(".")
        lines.append(f"| `{module.split('.')[-1]}.py` | {about} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def title(family: Family) -> str:
    """Its name alone, without what is tested."""
    return re.split("[:,(]", family.title)[0].strip()


def refused(family: Family, model_type: str) -> str:
    """What a family cannot do that others can."""
    named = {"flash_attention_2": "flash attention", "uniform": "static caches", "compact": '`positions="compact"`'}
    found = [] if families()[model_type].videos else ["video"]
    return ", ".join(found + [what for name, what in named.items() if name in family.refuses]) or "-"


TABLES = {ROOT / "README.md": what_is_supported, ROOT / "crop" / "models" / "README.md": where_layouts_are}


def now(page: Path) -> tuple[str, str, str]:
    """A page before its table, the table, the page after it."""
    before, rest = page.read_text().split(FENCES[0])
    table, after = rest.split(FENCES[1])
    return before + FENCES[0], table, FENCES[1] + after


if __name__ == "__main__":
    for page, table in TABLES.items():
        before, _, after = now(page)
        page.write_text(before + table() + after)
