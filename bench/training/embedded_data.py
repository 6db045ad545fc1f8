"""What the embedded model is trained on: rendered pictures as patches, labels per patch, and questions as token ids."""

from __future__ import annotations

import collections
import random

import numpy as np
import torch
from torch import Tensor

from bench.training.grounding import box_questions
from crop.embedded import scenes, things

NUM_PATCHES = things.GRID**2
MAX_QUESTIONS, MAX_BOXES, MAX_LENGTH = 32, 8, 13
EMPHASIS = {"box": 5.0, "count": 2.0, "total": 2.0, "date": 1.5, "shapes": 1.5, "picture": 0.2, "receipt": 0.2}
WHERE = [f"{v} {h}" for v in ("top", "middle", "bottom") for h in ("left", "center", "right")]
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
KINDS = ("shape", "sign", "shop", "date", "item", "total")
HEADS = {  # classes per patch label; class 0 is "none" everywhere
    "kind": len(KINDS) + 1, "color": len(things.COLORS) + 1, "shape": len(things.SHAPES) + 1,
    "word": len(things.DRAWN_WORDS) + 1, "tens": 11, "ones": 11, "where": 10, "character": len(CHARACTERS) + 1,
    "same_color": 7, "same_shape": 7, "things": 7,
}  # fmt: skip


def patch_labels(scene: scenes.Scene) -> np.ndarray:
    """(256, len(HEADS)) uint8: what the thing under each patch is."""
    label = np.zeros((things.GRID, things.GRID, len(HEADS)), np.uint8)
    for thing in scene.things:
        digits = f"{thing.value:>2}" if thing.value else "  "
        same = [sum(getattr(o, a) == getattr(thing, a) for o in scene.things) for a in ("color", "shape")]
        row = [
            1 + KINDS.index(thing.kind),
            1 + list(things.COLORS).index(thing.color) if thing.color else 0,
            1 + things.SHAPES.index(thing.shape) if thing.shape else 0,
            1 + things.DRAWN_WORDS.index(thing.word) if thing.word else 0,
            0 if digits[0] == " " else 1 + int(digits[0]),
            0 if digits[1] == " " else 1 + int(digits[1]),
            1 + WHERE.index(thing.where) if thing.where and thing.color else 0,
            0,
            *((same[0], same[1], len(scene.things)) if thing.kind == "shape" else (0, 0, 0)),
        ]
        x0, y0, x1, y1 = thing.cells
        label[y0:y1, x0:x1] = row
        for x, y, character in thing.text:
            label[y, x, list(HEADS).index("character")] = 1 + CHARACTERS.index(character)
    return label.reshape(NUM_PATCHES, -1)


def region_mask(question: scenes.Question) -> np.ndarray:
    """(256,) bool: patches whose centre lies in the question's boxes."""
    centre = (np.arange(things.GRID) + 0.5) / things.GRID
    mask = np.zeros((things.GRID, things.GRID), bool)
    for x0, y0, x1, y1 in question.boxes:
        mask |= ((centre >= y0) & (centre < y1))[:, None] & ((centre >= x0) & (centre < x1))[None]
    return mask.reshape(-1)


class Encoder:
    """Words to token ids, without the tokenizer's overhead (the test suite checks that both agree)."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.ids = vocabulary

    def __call__(self, text: str) -> list[int]:
        return [self.ids[t] for w in text.split() for t in (w if w.isdigit() else (w,))]


def asked(scene: scenes.Scene) -> tuple[scenes.Question, ...]:
    """The questions of a picture that training and the held-out figures use."""
    return (*scene.questions[:MAX_QUESTIONS], *box_questions(scene)[:MAX_BOXES])


def encode(scene: scenes.Scene, encoder: Encoder) -> dict[str, np.ndarray]:
    """One picture as arrays: patches, patch labels and its questions."""
    rows = MAX_QUESTIONS + MAX_BOXES
    pixels = np.asarray(scene.image).reshape(things.GRID, things.PATCH, things.GRID, things.PATCH, 3)
    out = {
        # (row, column, channel, y, x): the order of a flattened convolution kernel
        "patches": pixels.transpose(0, 2, 4, 1, 3).reshape(NUM_PATCHES, -1).copy(),
        "labels": patch_labels(scene),
        "ids": np.zeros((rows, MAX_LENGTH), np.int16),
        "target": np.full((rows, MAX_LENGTH), -100, np.int16),
        "region": np.zeros((rows, NUM_PATCHES), bool),
        "local": np.zeros(rows, bool),
        "weight": np.zeros(rows, np.float32),
        "picture": np.array(things.PICTURES.index(scene.picture), np.uint8),
    }
    questions = asked(scene)
    count = collections.Counter(q.kind for q in questions)
    for i, question in enumerate(questions):
        text, answer = (
            encoder(question.text + " ?"),
            [*encoder(question.answer), encoder.ids["</s>"]],
        )
        line = text + answer[:-1]
        out["ids"][i, : len(line)] = line
        out["target"][i, len(text) - 1 : len(line)] = answer
        out["region"][i], out["local"][i] = region_mask(question), question.local
        if question.kind == "shapes":  # a global question for the user; attention is led to the shapes all the same
            out["region"][i], out["local"][i] = out["labels"][:, 0] > 0, True
        # Every kind equally likely, except that hard ones are asked more, trivial ones and counts of one less.
        weight = EMPHASIS.get(question.kind, 1.0) / count[question.kind]
        out["weight"][i] = weight * (0.4 if question.kind == "count" and question.answer == "1" else 1)
    return out


class Reservoir:
    """Recently rendered pictures; each is used several times before a new one takes its place."""

    def __init__(self, encoder: Encoder, first_seed: int, stride: int, size: int, hardness: float = 1.0) -> None:
        self.encoder, self.seed, self.stride, self.size, self.hardness = (
            encoder,
            first_seed,
            stride,
            size,
            hardness,
        )
        self.store: list[dict[str, Tensor]] = []
        self.cursor = 0
        self.rng = random.Random(first_seed)

    def add(self, count: int, features: object = None) -> None:
        fresh = []
        for picture in self.rng.choices(things.PICTURES, (4, 3, 3), k=count):
            drawn = scenes.scene(self.seed, picture=picture, hardness=self.hardness)
            fresh.append({k: torch.from_numpy(v) for k, v in encode(drawn, self.encoder).items()})
            self.seed += self.stride
        if features is not None:
            for item, feature in zip(fresh, features(torch.stack([f["patches"] for f in fresh])), strict=True):
                item["features"] = feature
        for item in fresh:
            if len(self.store) < self.size:
                self.store.append(item)
            else:
                self.store[self.cursor] = item
                self.cursor = (self.cursor + 1) % self.size

    def draw(self, count: int) -> list[dict[str, Tensor]]:
        return self.rng.sample(self.store, count)


def keep_tokens(labels: Tensor, count: int) -> Tensor:
    """(B, count) ascending patch ids: things first, background at random."""
    noise = torch.rand(labels.shape[:2]) + 2 * (labels[..., 0] > 0)
    return noise.topk(count, 1).indices.sort(1).values
