"""Tables in the pages, from what the tests run over: `python -m tests.support.readme_table` writes them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path

from crop.models import families
from tests.support.families.entry import Family
from tests.support.tiny_families import FAMILIES, get_config
from tests.support.ways import WAYS

ROOT = Path(__file__).resolve().parents[2]
FENCES = re.compile(
    r"(<!-- \w+: written by `python -m tests\.support\.readme_table` -->\n)(.*?)(<!-- \w+: end -->\n)", re.S
)


def what_is_supported() -> str:
    """README's table: families that need and refuse the same share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, family in FAMILIES.items():
        model_type = get_config(name).model_type
        needs = "-" if family.processor is None else "`processor`, `image_size`"
        rows.setdefault((needs, refused(family, model_type)), []).append(title(family))
    lines = ["| family | with a region `patch` needs | refused |", "|---|---|---|"]
    for (needs, without), members in sorted(rows.items(), key=lambda row: len(row[0][1])):
        lines.append(f"| {', '.join(dict.fromkeys(members))} | {needs} | {without} |")
    return "\n".join(lines) + "\n"


def where_layouts_are() -> str:
    """The table of crop/models/README.md: which file has the `images` function of which family."""
    files: dict[str, dict[str, str]] = {}
    for name, family in FAMILIES.items():
        model_type = get_config(name).model_type
        files.setdefault(families()[model_type].images.__module__, {})[title(family)] = model_type
    lines = ["| file | layouts | families, `model_type` |", "|---|---|---|"]
    for module, names in files.items():
        about = str(importlib.import_module(module).__doc__).rstrip(".")
        named = ", ".join(f"{name} (`{model_type}`)" for name, model_type in names.items())
        lines.append(f"| `{module.split('.')[-1]}.py` | {about} | {named} |")
    return "\n".join(lines) + "\n"


def title(family: Family) -> str:
    """Its name alone, without what is tested."""
    return re.split("[:,(]", family.title)[0].strip()


def refused(family: Family, model_type: str) -> str:
    """What a family cannot do that others can."""
    named = {"flash_attention_2": "flash attention", "uniform": "static caches", "compact": '`positions="compact"`'}
    found = [] if families()[model_type].videos else ["video"]
    return ", ".join(found + [what for name, what in named.items() if name in family.refuses]) or "-"


def what_works() -> str:
    """The table of crop/patching/README.md: every way of use, and where it is refused."""
    lines = ["| way of use | in a block |", "|---|---|"]
    for way in WAYS.values():
        found = f"refused: {way.why}" if way.refused else "right"
        if way.cache == "uniform":
            found += ", where the family has static caches"
        if way.unable:
            found += "; transformers itself fails for " + "; ".join(
                f"{', '.join(title(FAMILIES[name]) for name in names)} ({why})"
                for why, names in grouped(way.unable).items()
            )
        lines.append(f"| {way.title} | {found} |")
    return "\n".join(lines) + "\n"


def grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Those that share a reason."""
    found: dict[str, list[str]] = {}
    for name, why in reasons.items():
        found.setdefault(why, []).append(name)
    return found


TABLES = {
    ROOT / "README.md": what_is_supported,
    ROOT / "crop" / "models" / "README.md": where_layouts_are,
    ROOT / "crop" / "patching" / "README.md": what_works,
}


def now(page: Path) -> tuple[str, str, str]:
    """A page before its table, the table, the page after it."""
    before, begin, table, end, after = FENCES.split(page.read_text(encoding="utf-8"))
    return before + begin, table, end + after


if __name__ == "__main__":
    for page, table in TABLES.items():
        before, _, after = now(page)
        page.write_text(before + table() + after)
