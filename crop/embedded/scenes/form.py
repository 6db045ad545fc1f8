"""Forms: lines that hold a name and an entry, each in its own face, size and place."""

from __future__ import annotations

from collections.abc import Iterator

from crop.embedded.scenes.faces import SMALLEST, width
from crop.embedded.scenes.names import SIZE, few, word, words
from crop.embedded.scenes.records import Box, Question, Run, around, ask, place
from crop.embedded.scenes.sheet import DARK, Sheet


def build(sheet: Sheet) -> Iterator[Question]:
    """Draw the form and yield what can be asked about it."""
    rng, hard = sheet.rng, sheet.hardness
    count = rng.randint(2, round(3 + 4 * hard))
    if rng.random() < 0.6:
        sheet.paper((rng.randint(0, 12), rng.randint(0, 12), SIZE - rng.randint(1, 12), SIZE - rng.randint(1, 12)))
    y, lines = rng.uniform(4, 40), []
    known = words(rng, count, 3, 7)
    used = set(known)
    for name in known:
        entry = word(rng, few(rng, 3, 12)) if rng.random() < 0.6 else str(rng.randint(10, 999999))
        face, other, size = sheet.face(), sheet.face(), max(SMALLEST, round(24 * sheet.scale()))
        gap = rng.uniform(0.8, 3)
        while (
            full := width(name, face, size) + width(entry, other, size) + gap * size
        ) > SIZE - 28 and size > SMALLEST:
            size -= 1
        pitch = max(20, 1.5 * size)
        if full > SIZE - 28 or y + pitch > SIZE - 6 or entry in used:
            continue
        used.add(entry)
        x = rng.uniform(14, SIZE - 14 - full)
        ink = rng.choice((DARK, DARK, (20, 40, 130), (120, 20, 30)))
        left = sheet.write(name, x, y + pitch / 2, face, size, ink)
        right = sheet.write(entry, x + full, y + pitch / 2, other, size, ink, anchor="r")
        if rng.random() < 0.4:
            low = y + pitch / 2 + 0.6 * size
            sheet.pen.line((right.box[0], low, right.box[2], low), (120,) * 3)
        lines.append((left, right))
        y += pitch + rng.uniform(0, 2 * max(0.0, (SIZE - 10 - y) / (count + 2) - pitch) + 8)
    yield from questions(lines)


def overlap(one: Box, other: Box) -> float:
    """Pixels that two boxes have in common from left to right; none: 0 or less."""
    return min(one[2], other[2]) - max(one[0], other[0])


def questions(lines: list[tuple[Run, Run]]) -> Iterator[Question]:
    """What can be asked about pairs of a name and its entry, from top to bottom."""
    whole = [around(name.box, entry.box) for name, entry in lines]
    yield ask("count", "how many fields are there", str(len(lines)), *whole)
    for i, ((name, entry), box) in enumerate(zip(lines, whole, strict=True)):
        yield ask("text", f"what stands beside {name.text}", entry, box, clues=(name,))
        yield ask("field", f"which field has {entry.text}", name, box, clues=(entry,))
        yield place(name.text, name.box, (name,))
        yield place(entry.text, entry.box, (entry,))
        if i + 1 < len(lines):
            near, (below, under) = (box, whole[i + 1]), lines[i + 1]
            yield ask("relation", f"which field is below {name.text}", below, *near, clues=(name,))
            yield ask("relation", f"which field is above {below.text}", name, *near, clues=(below,))
            if overlap(entry.box, under.box) > max(0, overlap(entry.box, below.box)):
                yield ask("relation", f"what stands below {entry.text}", under, *near, clues=(entry,))
