"""Tables: named rows and columns of numbers and codes, with or without rules."""

from __future__ import annotations

from collections.abc import Iterator

from crop.embedded.scenes.faces import SMALLEST, width
from crop.embedded.scenes.names import SIZE, numbers, words
from crop.embedded.scenes.records import Question, Run, around, ask, place
from crop.embedded.scenes.sheet import Sheet


def build(sheet: Sheet) -> Iterator[Question]:
    """Draw the table and yield what can be asked about it."""
    rng, hard = sheet.rng, sheet.hardness
    rows, columns = rng.randint(2, round(3 + 3 * hard)), rng.randint(2, 3 + (hard > 0.5))
    size, face = max(SMALLEST, round(20 * sheet.scale(0.5, 1.3))), sheet.face()
    heads = words(rng, columns, 2, 4)
    sides = words(rng, rows, 3, 6, heads)
    cells = numbers(rng, rows * columns, 0, 999)

    def pad() -> tuple[list[float], float]:
        named = max(width(s, face, size) for s in sides) + size
        wide = max(width(t, face, size) for t in (*heads, *cells)) + 0.9 * size
        return [named, *[wide] * columns], max(17.0, 1.5 * size)

    widths, pitch = pad()
    while sum(widths) > SIZE - 10 or (rows + 1) * pitch > SIZE - 10:
        size -= 1
        if size < SMALLEST:  # too many columns for the smallest letters
            size, columns, heads, cells = SMALLEST, columns - 1, heads[:-1], cells[: rows * (columns - 1)]
        widths, pitch = pad()
    pitch = min(pitch * rng.uniform(1, 1.4), (SIZE - 10) / (rows + 1))
    x, y = sheet.place(sum(widths), (rows + 1) * pitch)
    sheet.paper((x - 1, y - 1, x + sum(widths), y + (rows + 1) * pitch))
    edges = [x + sum(widths[:i]) for i in range(columns + 2)]
    if rng.random() < 0.6:
        for row in range(rows + 2):
            sheet.pen.line((x, y + row * pitch, edges[-1], y + row * pitch), (170,) * 3)
        for edge in edges if rng.random() < 0.6 else ():
            sheet.pen.line((edge, y, edge, y + (rows + 1) * pitch), (170,) * 3)

    def cell(text: str, column: int, row: int) -> Run:
        at = y + (row + 0.5) * pitch
        if column == 0:
            return sheet.write(text, edges[0] + 0.3 * size, at, face, size)
        return sheet.write(text, edges[column + 1] - 0.45 * size, at, face, size, anchor="r")

    top = [cell(head, 1 + i, 0) for i, head in enumerate(heads)]
    side = [cell(name, 0, 1 + j) for j, name in enumerate(sides)]
    body = [[cell(cells[j * columns + i], 1 + i, 1 + j) for i in range(columns)] for j in range(rows)]
    yield from questions(sheet, top, side, body)


def questions(sheet: Sheet, top: list[Run], side: list[Run], body: list[list[Run]]) -> Iterator[Question]:
    """What can be asked about the cells of a table, given its column heads, row names and cells by row."""
    rng = sheet.rng
    yield ask("count", "how many rows are there", str(len(side)), *(s.box for s in side))
    yield ask("count", "how many columns are there", str(len(top)), *(t.box for t in top))
    spread = [(j, i) for j in range(len(side)) for i in range(len(top))]
    for j, i in rng.sample(spread, min(6, len(spread))):
        need = (side[j].box, top[i].box, body[j][i].box)
        text = f"what is the {top[i].text} of {side[j].text}"
        yield ask("cell", text, body[j][i], *need, clues=(top[i], side[j]))
        yield ask("row", f"which row has {body[j][i].text}", side[j], around(need[0], need[2]), clues=(body[j][i],))
    for j, i in rng.sample(spread, min(3, len(spread))):
        other = rng.choice([k for k in range(len(side)) if k != j])
        more = rng.random() < 0.5
        best = (max if more else min)((j, other), key=lambda k: int(body[k][i].text))
        text = f"which has {'more' if more else 'less'} {top[i].text} {side[j].text} or {side[other].text}"
        need = (side[j].box, side[other].box, top[i].box, body[j][i].box, body[other][i].box)
        yield ask("compare", text, side[best], *need, clues=(top[i], side[j], side[other]))
    for j, run in enumerate(side):
        yield place(run.text, run.box, (run,))
        if j + 1 < len(side):
            yield ask("relation", f"which row is below {run.text}", side[j + 1], run.box, side[j + 1].box, clues=(run,))
    for j, i in rng.sample(spread, min(4, len(spread))):
        if i + 1 < len(top):
            one, two = body[j][i], body[j][i + 1]
            yield ask("relation", f"what is right of {one.text}", two, one.box, two.box, clues=(one,))
            yield ask("relation", f"what is left of {two.text}", one, one.box, two.box, clues=(two,))
