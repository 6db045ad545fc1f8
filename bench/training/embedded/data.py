"""Pictures as training sees them: patches, dense labels, and questions as token ids, packed behind a picture."""

from __future__ import annotations

import collections
import itertools
import random
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.training.embedded import labels as dense
from bench.training.embedded.model import NUM_PATCHES, vocabulary
from crop.embedded import scenes

TOKEN = re.compile(r"[A-Z0-9]|[^\w\s]|[a-z]+")
EMPHASIS = {"global": 0.3, "relation": 1.5, "count": 1.5, "compare": 1.5, "text": 2.0, "box": 2.0}
SHARES = dict(zip(scenes.PICTURES, (4, 5, 3, 3, 2, 4), strict=True))  # letters on colours are the slowest to be learnt
WORDS = vocabulary()


def called() -> tuple[Tensor, Tensor]:
    """(vocabulary,) head of the dense labels and its class that each word calls, -1 and 0 for all others."""
    head, number = torch.full((len(WORDS),), -1), torch.zeros(len(WORDS), dtype=torch.long)
    for at, names in enumerate((dense.KINDS, tuple(scenes.COLORS), scenes.SHAPES)):
        for i, name in enumerate(names, 1):
            for word in {name, scenes.plural(name)} & set(WORDS):
                head[WORDS[word]], number[WORDS[word]] = at, i
    return head, number


CALLED = called()


@dataclass
class Line:
    """One question and its answer as tokens.

    Args:
        ids: (L,) question, then the answer without its end.
        target: (L,) the token that each row must name, -100 where none.
        spot: (L,) patch of the character that a row is about: its own in a question, the next one in an answer; or -1.
        region: (576,) bool patches that the answer needs.
        kind, weight: kind of the question and how often it is asked.
    """

    ids: Tensor
    target: Tensor
    spot: Tensor
    region: Tensor
    local: bool
    kind: str
    weight: float


@dataclass
class Item:
    """One picture and its questions.

    Args:
        patches: (576, 768) uint8. labels: (576, heads) uint8. shown: (576,) bool, see ``labels.shown``.
        before: (576,) patch of the character before the first one that a patch holds, 576: that is the first of its line,
            -1: it holds none.
    """

    patches: Tensor
    labels: Tensor
    shown: Tensor
    before: Tensor
    lines: list[Line]
    picture: str

    def needed(self, whole: bool) -> Tensor:
        """(576,) bool: patches not to drop: all that a letter touches if ``whole``, else the one that holds its centre."""
        return self.shown if whole else (self.labels > 0).any(1)


@dataclass
class Pack:
    """Questions of several pictures, packed; (B, text) each but region (B, questions, 576)."""

    ids: Tensor
    block: Tensor
    place: Tensor
    target: Tensor
    spot: Tensor
    aimed: Tensor  # rows that should look at the region
    region: Tensor


def tokens(text: str) -> list[int]:
    """Token ids of a text, as the tokenizer makes them."""
    return [WORDS[t] for t in TOKEN.findall(text)]


def encode_line(question: scenes.Question, weight: float) -> Line:
    """A question as tokens with the patches its characters are read from."""
    text, answer = tokens(question.text + " ?"), [*tokens(question.answer), WORDS["</s>"]]
    target = [-100] * (len(text) - 1) + answer
    characters = [t in scenes.CHARACTERS for t in TOKEN.findall(question.text + " ?")]
    clues = iter(question.clues)
    spot = [dense.patch_of(next(clues)) if c else -1 for c in characters]
    # The first character of a word can lie anywhere; from the second on it is clear which word is meant.
    spot = [s if i and characters[i - 1] else -1 for i, s in enumerate(spot)]
    if question.spots:
        spot[-1] = dense.patch_of(question.spots[0])
        spot += [*map(dense.patch_of, question.spots[1:]), -1]
    else:
        spot += [-1] * (len(answer) - 1)
    region = torch.from_numpy(dense.box_mask(question.boxes))
    ids, target, spot = (torch.tensor(v) for v in (text + answer[:-1], target, spot))
    return Line(ids, target, spot, region, question.local, question.kind, weight)


def encode(scene: scenes.Scene) -> Item:
    """A picture as tensors."""
    grid, patch = scenes.GRID, scenes.PATCH
    pixels = np.asarray(scene.image).reshape(grid, patch, grid, patch, 3)
    # (row, column, channel, y, x): the order of a flattened convolution kernel
    patches = torch.from_numpy(pixels.transpose(0, 2, 4, 1, 3).reshape(NUM_PATCHES, -1).copy())
    labels = dense.patch_labels(scene)
    count = collections.Counter(q.kind for q in scene.questions)
    lines = []
    for question in scene.questions:
        # Every kind as likely as every other, but for hard and for trivial ones.
        weight = EMPHASIS.get(question.kind, 1.0) / count[question.kind]
        weight *= 0.5 if question.kind == "count" and question.answer == "1" else 1
        lines.append(encode_line(question, weight * min(count[question.kind], 3)))
    shown = torch.from_numpy(dense.shown(scene, labels))
    return Item(patches, torch.from_numpy(labels), shown, before(scene), lines, scene.picture)


def before(scene: scenes.Scene) -> Tensor:
    """See ``Item``."""
    found = torch.full((NUM_PATCHES,), -1)
    for run in scene.runs:
        held = list(map(dense.patch_of, run.spots))
        if held and found[held[0]] < 0:
            found[held[0]] = NUM_PATCHES
        for left, right in itertools.pairwise(held):
            if right != left and found[right] < 0:
                found[right] = left
    return found


def choose(item: Item, rng: random.Random, *, count: int = 1000, room: int = 100_000) -> list[Line]:
    """Different questions of a picture, in proportion to their weights (exponential clocks).

    Args:
        count: most of them. room: most tokens that they may have together.
    """
    chosen = []
    for line in sorted(item.lines, key=lambda line: rng.expovariate(line.weight))[:count]:
        room -= len(line.ids)
        if room >= 0:
            chosen.append(line)
    return chosen


def pack(chosen: list[list[Line]]) -> Pack:
    """Questions of each picture one after the other, padded to the longest picture."""
    length = max(sum(len(line.ids) for line in lines) for lines in chosen)
    most = max(map(len, chosen))
    size = (len(chosen), length)
    ids, place = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    block, target, spot = (torch.full(size, v, dtype=torch.long) for v in (-1, -100, -1))
    aimed = torch.zeros(size, dtype=torch.bool)
    region = torch.zeros(len(chosen), most, NUM_PATCHES, dtype=torch.bool)
    for i, lines in enumerate(chosen):
        at = 0
        for j, line in enumerate(lines):
            rows = slice(at, at + len(line.ids))
            ids[i, rows], target[i, rows], spot[i, rows] = line.ids, line.target, line.spot
            block[i, rows], place[i, rows] = j, torch.arange(len(line.ids))
            if line.local:
                aimed[i, rows] = line.target != -100
            region[i, j] = line.region
            at += len(line.ids)
    return Pack(ids, block, place, target, spot, aimed, region)


class Reservoir:
    """Recently rendered pictures; each is used several times before a new one takes its place.

    Args:
        first_seed: of the pictures. size: pictures held. hardness: of new pictures, see ``scenes.scene``.
    """

    def __init__(self, first_seed: int, size: int, hardness: float = 1.0) -> None:
        self.seed, self.size, self.hardness = first_seed, size, hardness
        self.store: list[Item] = []
        self.cursor, self.rng = 0, random.Random(first_seed)
        self.queues: dict[tuple[int, bool], list[list[Item]]] = {}

    def add(self, count: int) -> None:
        """Render pictures."""
        for picture in self.rng.choices(list(SHARES), list(SHARES.values()), k=count):
            item = encode(scenes.scene(self.seed, picture=picture, hardness=self.hardness))
            self.seed += 1
            if len(self.store) < self.size:
                self.store.append(item)
            else:
                self.store[self.cursor] = item
                self.cursor = (self.cursor + 1) % self.size

    def draw(self, count: int, whole: bool) -> list[Item]:
        """A batch of pictures that need about as many patches each, so that few background patches fill it up."""
        queue = self.queues.setdefault((count, whole), [])
        if not queue:
            pool = self.rng.sample(self.store, 4 * count)
            pool.sort(key=lambda item: int(item.needed(whole).sum()))
            queue += [pool[i : i + count] for i in range(0, len(pool), count)]
            self.rng.shuffle(queue)
        return queue.pop()


def keep_tokens(needed: Tensor, extra: int) -> Tensor:
    """(B, n) ascending patch ids: as many as the fullest picture needs and ``extra`` more, the others at random."""
    count = min(NUM_PATCHES, int(needed.sum(1).max()) + extra)
    return (torch.rand(needed.shape) + 2 * needed).topk(count, 1).indices.sort(1).values
