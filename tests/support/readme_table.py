"""README's table of families, from what the contract runs over: `python -m tests.support.readme_table` writes it."""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny_families import FAMILIES

README = Path(__file__).resolve().parents[2] / "README.md"
FENCES = "<!-- families: written by `python -m tests.support.readme_table` -->\n", "<!-- families: end -->\n"


def table() -> str:
    """What the contract runs over, as README shows it."""
    lines = ["| family | class | attention | `patch` needs, with a region |", "|---|---|---|---|"]
    for family in FAMILIES.values():
        needs = "" if family.processor is None else "`processor`, `image_size`"
        lines.append(f"| {family.title} | `{family.classes}` | {', '.join(family.attentions)} | {needs} |")
    return "\n".join(lines) + "\n"


def now() -> tuple[str, str, str]:
    """README before the table, the table, README after it."""
    before, rest = README.read_text().split(FENCES[0])
    table, after = rest.split(FENCES[1])
    return before + FENCES[0], table, FENCES[1] + after


if __name__ == "__main__":
    before, _, after = now()
    README.write_text(before + table() + after)
