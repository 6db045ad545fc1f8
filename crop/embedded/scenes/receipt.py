"""Receipts: a shop, a date, three to eight lines with prices, and their total."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from crop.embedded.scenes.faces import SMALLEST, width
from crop.embedded.scenes.names import SIZE, words
from crop.embedded.scenes.records import Question, Run, around, ask, place
from crop.embedded.scenes.sheet import Sheet

LABEL = "PAY"


def build(sheet: Sheet) -> Iterator[Question]:
    """Draw the receipt and yield what can be asked about it."""
    rng, hard = sheet.rng, sheet.hardness
    rows = rng.randint(2 if hard < 0.5 else 3, round(3 + 5 * hard))
    size, face = max(SMALLEST, round(20 * sheet.scale(0.5, 1.3))), sheet.face()
    pitch = max(17, round(size * rng.uniform(1.35, 1.7)))
    while (rows + 5) * pitch > SIZE - 10:
        rows -= 1
    items = words(rng, rows, 3, 8, {LABEL})
    (shop,) = words(rng, 1, 4, 10, {LABEL, *items})
    prices: list[int] = []
    while len(set(prices)) < rows:
        prices = [rng.choice((rng.randint(10, 999), rng.randint(1000, 2999))) for _ in range(rows)]
    cost = [f"{p // 100}.{p % 100:02d}" for p in prices]
    total = f"{sum(prices) // 100}.{sum(prices) % 100:02d}"
    date = f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}"
    left = max(width(item, face, size) for item in (*items, LABEL))
    inner = left + width(total, face, size) + size * rng.uniform(1, 4)
    inner = min(max(inner, width(shop, face, size) + 4), SIZE - 30)
    x, y = sheet.place(inner + 20, (rows + 4.5) * pitch)
    x0, x1 = x + 10, x + 10 + inner
    sheet.paper((x, y, x1 + 10, y + (rows + 4.5) * pitch))

    def line(row: float) -> float:
        return y + (row + 0.7) * pitch

    top = sheet.write(shop, (x0 + x1) / 2, line(0), face, size, anchor="m")
    day = sheet.write(date, rng.choice((x0, x1 - width(date, face, size))), line(1), face, size)
    pairs: list[tuple[Run, Run]] = []
    for i, (item, price) in enumerate(zip([*items, LABEL], [*cost, total], strict=True)):
        at = line(i + 2.3 + (0.5 if item == LABEL else 0))
        pairs.append((sheet.write(item, x0, at, face, size), sheet.write(price, x1, at, face, size, anchor="r")))
    for at in (line(1.65), line(rows + 1.9 + 0.15)):
        for start in range(round(x0), round(x1) - 4, 8):
            sheet.pen.line((start, at, start + 4, at), (120,) * 3)
    yield from questions(sheet, top, day, pairs)


def questions(sheet: Sheet, top: Run, day: Run, pairs: list[tuple[Run, Run]]) -> Iterator[Question]:
    """What can be asked about the lines of a receipt, the last of which is the total."""
    rng = sheet.rng
    yield ask("shop", "what is the shop", top, top.box)
    yield ask("date", "what is the date", day, day.box)
    total, lines = pairs[-1], pairs[:-1]
    whole = [around(item.box, price.box) for item, price in lines]
    yield ask("total", "what is the total", total[1], around(total[0].box, total[1].box))
    yield ask("count", "how many items are there", str(len(lines)), *whole)
    for name, run in (("the shop", top), ("the date", day), ("the total", total[1])):
        yield place(name, run.box)
    for i, ((item, price), box) in enumerate(zip(lines, whole, strict=True)):
        yield ask("price", f"what is the price of {item.text}", price, box, clues=(item,))
        yield ask("item", f"which item costs {price.text}", item, box, clues=(price,))
        yield place(item.text, item.box, (item,))
        if i + 1 < len(lines):
            near, after = (box, whole[i + 1]), lines[i + 1][0]
            yield ask("relation", f"which item is below {item.text}", after, *near, clues=(item,))
            yield ask("relation", f"which item is above {after.text}", item, *near, clues=(after,))
    for i, j in rng.sample(pairs := list(combinations(range(len(lines)), 2)), min(3, len(pairs))):
        more = rng.random() < 0.5
        best = (max if more else min)((i, j), key=lambda k: float(lines[k][1].text))
        text = f"which costs {'more' if more else 'less'} {lines[i][0].text} or {lines[j][0].text}"
        yield ask("compare", text, lines[best][0], whole[i], whole[j], clues=(lines[i][0], lines[j][0]))
