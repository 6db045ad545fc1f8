"""What each patch shows, as dense labels: no patch is told more than lies in it."""

from __future__ import annotations

import numpy as np

from crop.embedded.scenes.names import CHARACTERS, COLORS, GRID, PATCH, SHAPES
from crop.embedded.scenes.records import Box, Scene, Spot

KINDS = ("shape", "sign", "bar")
HEADS = {  # classes per label; class 0 is "none" everywhere
    "kind": len(KINDS) + 1, "color": len(COLORS) + 1, "shape": len(SHAPES) + 1,
    "character": len(CHARACTERS) + 1,
}  # fmt: skip
COVERED = 0.3  # share of a patch that a thing must cover to be what the patch shows


def patch_of(spot: Spot) -> int:
    """Index of the patch that holds a pixel."""
    x, y = (min(max(int(v // PATCH), 0), GRID - 1) for v in spot)
    return y * GRID + x


def box_mask(boxes: tuple[Box, ...]) -> np.ndarray:
    """(576,) bool: patches that overlap a normalised box by more than a pixel."""
    mask = np.zeros((GRID, GRID), bool)
    slack = 1 / PATCH
    for x0, y0, x1, y1 in boxes:
        columns = slice(int(x0 * GRID + slack), int(np.ceil(x1 * GRID - slack)))
        mask[int(y0 * GRID + slack) : int(np.ceil(y1 * GRID - slack)), columns] = True
    return mask.reshape(-1)


def shown(scene: Scene, labels: np.ndarray) -> np.ndarray:
    """(576,) bool: patches with a label, and those that hold a part of a letter whose centre lies elsewhere."""
    lines = np.array([run.box for run in scene.runs]) / (PATCH * GRID)
    return box_mask(tuple(map(tuple, lines))) | (labels > 0).any(1)


def patch_labels(scene: Scene) -> np.ndarray:
    """(576, len(HEADS)) uint8: kind, colour and outline of the thing seen in each patch, and the character centred in it."""
    label = np.zeros((GRID * GRID, len(HEADS)), np.uint8)
    ids = np.asarray(scene.ids).reshape(GRID, PATCH, GRID, PATCH)
    for number, thing in enumerate(scene.things, 1):
        cover = (ids == number).mean((1, 3)).reshape(-1)
        seen = cover >= min(COVERED, cover.max())
        label[seen, 0] = 1 + KINDS.index(thing.kind)
        label[seen, 1] = 1 + list(COLORS).index(thing.color)
        if thing.shape is not None:  # only where the outline runs: the inside of a circle does not look round
            label[seen & (cover < 0.98), 2] = 1 + SHAPES.index(thing.shape)
    for run in scene.runs:
        for character, spot in zip(run.text, run.spots, strict=True):
            label[patch_of(spot), 3] = 1 + CHARACTERS.index(character)
    return label
