"""Bar charts: three to seven bars with a name below and a number above each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from crop.embedded.scenes.faces import SMALLEST, width
from crop.embedded.scenes.names import COLORS, SIZE, numbers, words
from crop.embedded.scenes.records import Question, Run, Thing, around, ask, place
from crop.embedded.scenes.sheet import Sheet


def build(sheet: Sheet) -> Iterator[Question]:
    """Draw the chart and yield what can be asked about it."""
    rng, hard = sheet.rng, sheet.hardness
    count = rng.randint(2 if hard < 0.5 else 3, round(3 + 4 * hard))
    size, face = max(SMALLEST, round(18 * sheet.scale(0.55, 1.3))), sheet.face()
    labels = words(rng, count, 2, 4)
    step = max(width(label, face, size) for label in labels) + 0.9 * size
    while count * step > SIZE - 24 and count > 2:
        count -= 1
    labels, values = labels[:count], numbers(rng, count, 5, 99)
    step = min(step * rng.uniform(1, 1.6), (SIZE - 24) / count)
    high = rng.uniform(110, 250)
    wide, tall = count * step + 16, high + 4.2 * size
    x, y = sheet.place(wide, tall)
    sheet.paper((x, y, x + wide, y + tall))
    base = y + 2 * size + high
    # Mostly one colour each; in some charts two colours take turns, so that a name is needed.
    palette = rng.sample(sorted(COLORS), max(count, 2) if rng.random() < 0.7 else 2)
    bars: list[tuple[Thing, Run, Run]] = []
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        middle, half = x + 8 + (i + 0.5) * step, step * rng.uniform(0.22, 0.36)
        top = base - high * int(value) / 100
        bar = sheet.paint("bar", (middle - half, top, middle + half, base), palette[i % len(palette)])
        number = sheet.write(value, middle, top - 0.8 * size, face, size, anchor="m")
        name = sheet.write(label, middle, base + 1.1 * size, face, size, anchor="m")
        bars.append((bar, name, number))
    sheet.pen.line((x + 4, base, x + wide - 4, base), (60,) * 3, 2)
    yield from questions(sheet, bars)


def questions(sheet: Sheet, bars: list[tuple[Thing, Run, Run]]) -> Iterator[Question]:
    """What can be asked about bars, each with its name and number."""
    rng = sheet.rng
    colors = [bar.color for bar, _, _ in bars]
    whole = [around(bar.box, name.box, number.box) for bar, name, number in bars]
    yield ask("count", "how many bars are there", str(len(bars)), *whole)
    for word, best in (("tallest", max), ("shortest", min)):
        i = best(range(len(bars)), key=lambda k: int(bars[k][2].text))
        yield ask("compare", f"which bar is the {word}", bars[i][1], *whole)
    for (bar, name, number), box in zip(bars, whole, strict=True):
        yield ask("value", f"what is the value of {name.text}", number, box, clues=(name,))
        yield ask("color", f"what color is the bar of {name.text}", bar.color, box, clues=(name,))
        yield ask("field", f"which bar has {number.text}", name, box, clues=(number,))
        if colors.count(bar.color) == 1:
            yield ask("value", f"what is the value of the {bar.color} bar", number, box)
            yield ask("text", f"what stands below the {bar.color} bar", name, box)
        yield place(f"the bar of {name.text}", bar.box, (name,), name.box)
    for i, (_, name, _) in enumerate(bars[:-1]):
        right = bars[i + 1][1]
        if rng.random() < 0.5:
            yield ask("relation", f"which bar is right of {name.text}", right, whole[i], whole[i + 1], clues=(name,))
        else:
            yield ask("relation", f"which bar is left of {right.text}", name, whole[i], whole[i + 1], clues=(right,))
    for i, j in rng.sample(pairs := list(combinations(range(len(bars)), 2)), min(3, len(pairs))):
        tall = rng.random() < 0.5
        best = (max if tall else min)((i, j), key=lambda k: int(bars[k][2].text))
        text = f"which is {'taller' if tall else 'shorter'} {bars[i][1].text} or {bars[j][1].text}"
        yield ask("compare", text, bars[best][1], whole[i], whole[j], clues=(bars[i][1], bars[j][1]))
