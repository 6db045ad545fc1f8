"""Held-out answers of the embedded model: while it trains, and through the public path."""

from __future__ import annotations

import collections
import random

import torch

from bench.training.embedded_data import NUM_PATCHES, Encoder, asked, encode
from bench.training.embedded_model import answer_logits, tower_features
from bench.training.grounding import BOX_KIND, box_questions
from crop import embedded
from crop.embedded import scenes

HELD_OUT = 10_000_000  # first seed of the held-out range; training seeds stay below


@torch.no_grad()
def quick_scores(model, encoder: Encoder, count: int, first: int = HELD_OUT) -> dict[str, list[bool]]:
    """Exact answers per kind with all tokens; teacher-forced, which for exact answers equals greedy decoding."""
    scores = collections.defaultdict(list)
    device = model.device
    for seed in range(first, first + count, 8):
        drawn = [scenes.scene(s) for s in range(seed, min(seed + 8, first + count))]
        items = [encode(s, encoder) for s in drawn]
        features = tower_features(model, torch.stack([torch.from_numpy(i["patches"]) for i in items]), None)
        ids, target = (
            torch.stack([torch.from_numpy(i[n]) for i in items]).long().to(device) for n in ("ids", "target")
        )
        keep = torch.arange(NUM_PATCHES).expand(len(items), -1)
        right = (answer_logits(model, features, keep, ids).argmax(3) == target) | (target == -100)
        for scene, row in zip(drawn, right.all(2).tolist(), strict=True):
            for question, ok in zip(asked(scene), row, strict=False):
                scores[question.kind].append(ok)
    return scores


def format_scores(scores: dict[str, list[bool]]) -> str:
    kinds = [k for k in (*scenes.LOCAL_KINDS, *scenes.GLOBAL_KINDS, BOX_KIND) if k in scores]
    local = [ok for k in scenes.LOCAL_KINDS for ok in scores.get(k, ())]
    parts = [f"{k} {sum(scores[k]) / len(scores[k]):.3f}" for k in kinds]
    return " ".join(parts) + f" | all local {sum(local) / max(1, len(local)):.3f} (n={len(local)})"


def evaluate(directory: str, count: int) -> None:
    """Greedy answers of the exported files through the public path: processor, left padding, generate."""
    model, processor = embedded.load(directory=directory)
    scores = collections.defaultdict(list)
    for seed in range(HELD_OUT + 1000, HELD_OUT + 1000 + count):  # beyond the pictures watched while training
        scene = scenes.scene(seed)
        questions = random.Random(seed).sample(scene.questions, min(8, len(scene.questions)))
        questions += box_questions(scene)[seed % len(scene.things) :][:1]
        answers = embedded.answer(model, processor, [scene.image] * len(questions), [q.text for q in questions])
        for question, text in zip(questions, answers, strict=True):
            scores[question.kind].append(text == question.answer)
    print(format_scores(scores))
    print("questions per kind: " + " ".join(f"{k} {len(v)}" for k, v in scores.items()))
