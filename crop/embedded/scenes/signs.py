"""Sign boards with a word of up to twelve characters, anywhere in the picture, in letters of 20 to 42 pixels."""

from __future__ import annotations

from collections.abc import Iterator

from crop.embedded.scenes.faces import SMALLEST, width
from crop.embedded.scenes.names import COLORS, DIRECTIONS, SIZE, few, word
from crop.embedded.scenes.records import Question, ask, place
from crop.embedded.scenes.shapes import neighbour
from crop.embedded.scenes.sheet import Sheet


def build(sheet: Sheet) -> Iterator[Question]:
    """Draw the boards and yield what can be asked about them."""
    rng, hard = sheet.rng, sheet.hardness
    palette = rng.sample(sorted(COLORS), rng.choice((3, 8, 8)))
    seen: set[str] = set()
    for _ in range(rng.randint(1 if hard < 0.5 else 2, round(2 + 5 * hard))):
        size = max(SMALLEST, round(28 * sheet.scale()))
        text = word(rng, few(rng, 2, 12)) if rng.random() < 0.8 else str(rng.randint(10, 99999))
        face, margin = sheet.face(), rng.uniform(0.6, 1.2)
        while (wide := width(text, face, size) + margin * size) > SIZE - 8:
            size -= 1
        high = round(size * rng.uniform(1.6, 2.2))
        corner = sheet.place(wide, high)
        if corner is None or text in seen:
            continue
        seen.add(text)
        x, y = corner
        sheet.paint("sign", (x, y, x + wide, y + high), rng.choice(palette), None, text, face, size)
    things = sheet.things
    colors = [t.color for t in things]
    yield ask("global", "how many signs are there", str(len(things)), local=False)
    for thing in things:
        run, box = thing.run, thing.box
        by_text = f"the sign that says {run.text}"
        yield ask("color", f"what color is {by_text}", thing.color, box, clues=(run,))
        alone = colors.count(thing.color) == 1
        name, clues = (f"the {thing.color} sign", ()) if alone else (by_text, (run,))
        if alone:
            yield ask("text", f"what does {name} say", run, box)
        if rng.random() < 0.5:
            name, clues = by_text, (run,)
        yield place(name, box, clues)
        for direction in DIRECTIONS:
            other = neighbour(things, thing, direction)
            if other is not None:
                near = direction if direction in ("above", "below") else f"{direction} of"
                if rng.random() < 0.6:
                    yield ask(
                        "relation", f"what does the sign {near} {name} say", other.run, box, other.box, clues=clues
                    )
                else:
                    text = f"what color is the sign {near} {name}"
                    yield ask("relation", text, other.color, box, other.box, clues=clues)
    for color in sorted(set(colors)):
        boxes = [t.box for t in things if t.color == color]
        yield ask("count", f"how many {color} signs are there", str(len(boxes)), *boxes)
