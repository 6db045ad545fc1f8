"""Coloured shapes with a short label each, anywhere in the picture, from 35 to 132 pixels wide."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crop.embedded.scenes.faces import SMALLEST
from crop.embedded.scenes.names import COLORS, DIRECTIONS, LABELS, SHAPES, plural
from crop.embedded.scenes.records import Question, Thing, ask, place
from crop.embedded.scenes.sheet import Sheet

SIDE = 88  # pixels at scale 1


def neighbour(things: list[Thing], thing: Thing, direction: str) -> Thing | None:
    """The nearest other thing in a direction, None where it is not clear which that is."""
    axis, sign = DIRECTIONS.index(direction) // 2, 1 if direction in ("right", "below") else -1
    found = []
    for other in things:
        step = [sign * (b - a) for a, b in zip(thing.center, other.center, strict=True)]
        if other is not thing and step[axis] > 0:
            if abs(step[1 - axis]) < 1.2 * step[axis]:
                clear = abs(step[1 - axis]) < 0.7 * step[axis]
                found.append((step[axis] + abs(step[1 - axis]), clear, other))
    found.sort(key=lambda f: f[0])
    if not found or not found[0][1] or (len(found) > 1 and found[1][0] < 1.25 * found[0][0]):
        return None
    return found[0][2]


def build(sheet: Sheet) -> Iterator[Question]:
    """Draw the shapes and yield what can be asked about them."""
    rng, hard = sheet.rng, sheet.hardness
    count = rng.randint(2 if hard < 0.5 else 3, round(3 + 6 * hard))
    # Few colours or shapes in some pictures, else the answer to a counting question is nearly always one.
    palette = rng.sample(sorted(COLORS), rng.choice((2, 3, 8)))
    kinds = rng.sample(SHAPES, rng.choice((2, 4, 6)))
    labels: set[str] = set()
    for _ in range(count):
        side = round(SIDE * sheet.scale())
        corner = sheet.place(side, side)
        if corner is None:
            continue
        size = max(SMALLEST, round(rng.uniform(0.3, 0.36) * side))
        longest = min(3, max(1, int(0.85 * side / (0.84 * size))))
        label = "".join(rng.choices(LABELS, k=rng.randint(1, longest)))
        while label in labels:
            label = "".join(rng.choices(LABELS, k=longest))
        labels.add(label)
        x, y = corner
        sheet.paint(
            "shape", (x, y, x + side, y + side), rng.choice(palette), rng.choice(kinds), label, sheet.face(), size
        )
    yield ask("global", "how many shapes are there", str(len(sheet.things)), local=False)
    yield from questions(sheet)


def names(things: list[Thing], thing: Thing) -> list[str]:
    """The ways to call a thing by colour and shape that fit it alone."""
    found = []
    for name, same in (
        (f"the {thing.color} {thing.shape}", lambda o: (o.color, o.shape) == (thing.color, thing.shape)),
        (f"the {thing.shape}", lambda o: o.shape == thing.shape),
        (f"the {thing.color} shape", lambda o: o.color == thing.color),
    ):
        if sum(map(same, things)) == 1:
            found.append(name)
    return found


def questions(sheet: Sheet) -> Iterator[Question]:
    """What can be asked about the shapes of a picture."""
    things, rng = sheet.things, sheet.rng
    called = [names(things, t) for t in things]
    for thing, known in zip(things, called, strict=True):
        run, box = thing.run, thing.box
        label = f"the shape with {run.text}"
        yield ask("color", f"what color is {label}", thing.color, box, clues=(run,))
        yield ask("shape", f"what shape has {run.text}", str(thing.shape), box, clues=(run,))
        if known:
            name = rng.choice(known)
            yield ask("text", f"what is written on {name}", run, box)
            yield place(name, box)
            if known[-1].endswith("shape"):
                yield ask("shape", f"what shape is {thing.color}", str(thing.shape), box)
            if f"the {thing.shape}" in known:
                yield ask("color", f"what color is the {thing.shape}", thing.color, box)
        else:
            name = label
            yield place(label, box, (run,))
        for direction in DIRECTIONS:
            other = neighbour(things, thing, direction)
            if other is not None:
                clues = () if known else (run,)
                near = direction if direction in ("above", "below") else f"{direction} of"
                what, answer = rng.choice(
                    (
                        (f"what is written on the shape {near}", other.run),
                        (f"what color is the shape {near}", other.color),
                    )
                )
                yield ask("relation", f"{what} {name}", answer, box, other.box, clues=clues)
    for values in (sorted({t.color for t in things}), sorted({str(t.shape) for t in things})):
        for value in values:
            boxes = [t.box for t in things if value in (t.color, t.shape)]
            noun = f"{value} shapes" if value in COLORS else plural(value)
            yield ask("count", f"how many {noun} are there", str(len(boxes)), *boxes)
    pairs = [(i, j) for i in range(len(things)) for j in range(len(things)) if i != j and called[i] and called[j]]
    pixels = np.bincount(np.asarray(sheet.ids).ravel(), minlength=1 + len(things))
    for i, j in rng.sample(pairs, min(3, len(pairs))):
        large, small = (i, j) if pixels[1 + i] > pixels[1 + j] else (j, i)
        sides = [things[k].box[2] - things[k].box[0] for k in (large, small)]
        if sides[0] > 1.3 * sides[1]:  # larger in every way
            word = rng.choice(("larger", "smaller"))
            answer = called[large if word == "larger" else small][0].removeprefix("the ")
            text = f"which is {word} {called[i][0]} or {called[j][0]}"
            yield ask("compare", text, answer, things[i].box, things[j].box)
