"""Regions that miss: the true one moved, or a box anywhere."""

from __future__ import annotations

import random

from crop.geometry.region import Region

QUARTER, WHOLE = 0.25, 1.0


def shifted(true: Region, by: float, rng: random.Random) -> Region:
    """Every box moved by ``by`` of its width and height, in one random diagonal direction; turned round at the border."""
    sign_x, sign_y = rng.choice((-1, 1)), rng.choice((-1, 1))
    boxes = []
    for x0, y0, x1, y1 in true.boxes:
        dx, dy = by * (x1 - x0) * sign_x, by * (y1 - y0) * sign_y
        dx = dx if 0 <= x0 + dx and x1 + dx <= 1 else -dx
        dy = dy if 0 <= y0 + dy and y1 + dy <= 1 else -dy
        # A box wider than half the image cannot leave its place both ways: as far as it goes.
        dx, dy = min(max(dx, -x0), 1 - x1), min(max(dy, -y0), 1 - y1)
        boxes.append((x0 + dx, y0 + dy, x1 + dx, y1 + dy))
    return Region(tuple(boxes))


def anywhere(true: Region, rng: random.Random) -> Region:
    """A box of the size of the bounds of all boxes, at a random place."""
    left, top, right, bottom = zip(*true.boxes, strict=True)
    width, height = max(right) - min(left), max(bottom) - min(top)
    x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return Region.box(x, y, x + width, y + height)
