"""Held-out figures: labels per patch, and exact answers per kind of question with all or some of the tokens."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.embedded import labels as dense
from bench.training.embedded.data import Item, Line, choose, encode, pack
from bench.training.embedded.model import NUM_PATCHES, text_hidden, tower_features
from crop.embedded import scenes

HELD_OUT = 20_000_000  # first seed of the held-out range; training seeds stay below
KINDS = (*scenes.LOCAL_KINDS, *scenes.RELATION_KINDS, *scenes.GLOBAL_KINDS, scenes.BOX_KIND)


@torch.no_grad()
def patch_scores(model: nn.Module, heads: nn.Module, count: int = 48, first: int = HELD_OUT) -> dict[str, float]:
    """Share of labelled patches named right, per label, and of patches without a character seen as such."""
    right, total = collections.Counter(), collections.Counter()
    for seed in range(first, first + count, 8):
        items = [encode(scenes.scene(s)) for s in range(seed, seed + 8)]
        labels = torch.stack([i.labels for i in items]).long()
        features = tower_features(model, torch.stack([i.patches for i in items]))
        parts = heads(F.layer_norm(features, features.shape[-1:])).split(list(dense.HEADS.values()), 2)
        for i, (name, part) in enumerate(zip(dense.HEADS, parts, strict=True)):
            hit, there = part.argmax(2) == labels[..., i], labels[..., i] > 0
            right[name] += int(hit[there].sum())
            total[name] += int(there.sum())
            if name == "character":
                right["none"] += int(hit[~there].sum())
                total["none"] += int((~there).sum())
    return {name: round(right[name] / max(1, n), 3) for name, n in total.items()}


@torch.no_grad()
def exact(model: nn.Module, vision: Tensor, keep: Tensor, lines: list[Line]) -> list[bool]:
    """Whether each question of one picture is answered right; teacher-forced, which for exact answers equals greedy.

    Args:
        vision: (1, n, d) projected features. keep: (1, n) their patches.
    """
    packed = pack([lines])
    hidden = text_hidden(model, vision, keep, packed.ids, packed.block, packed.place)
    right = (model.lm_head(hidden[0]).argmax(1) == packed.target[0]) | (packed.target[0] == -100)
    return [bool(right[packed.block[0] == i].all()) for i in range(len(lines))]


def ways(line: Line) -> dict[str, Tensor]:
    """Patches left (576,) by ways of pruning, drawn anew: a random third, only or without the region, half of the answer."""
    left = {"third": torch.zeros(NUM_PATCHES, dtype=torch.bool)}
    left["third"][torch.randperm(NUM_PATCHES)[: NUM_PATCHES // 3]] = True
    if line.local:
        left |= {"region": line.region, "without": ~line.region}
    read = line.spot[line.target != -100]
    read = read[read >= 0].unique()
    if len(read) > 1:
        left["half"] = torch.ones(NUM_PATCHES, dtype=torch.bool)
        left["half"][read[torch.randperm(len(read))[: len(read) // 2]]] = False
    return left


@torch.no_grad()
def answer_scores(
    model: nn.Module,
    count: int = 32,
    first: int = HELD_OUT,
    questions: int = 16,
    pruned: int = 0,
    see: Callable[[Item], Tensor] | None = None,
) -> dict[str, dict[str, list[bool]]]:
    """Exact answers by way of pruning ("all": none) and kind.

    Args:
        count: pictures. first: their first seed. questions: of each picture. pruned: of these, asked after pruning, too.
        see: what the decoder gets of a picture, (1, 576, d); default: the tower's features, projected.
    """
    scores: dict[str, dict] = collections.defaultdict(lambda: collections.defaultdict(list))
    torch.manual_seed(first)
    for seed in range(first, first + count):
        item = encode(scenes.scene(seed))
        lines = choose(item, random.Random(seed), count=questions)
        project = model.model.multi_modal_projector
        vision = see(item) if see else project(tower_features(model, item.patches[None]))
        every = torch.arange(NUM_PATCHES)[None]
        for line, ok in zip(lines, exact(model, vision, every, lines), strict=True):
            scores["all"][line.kind].append(ok)
        for line in lines[:pruned]:
            for way, left in ways(line).items():
                keep = left.nonzero()[:, 0][None]
                scores[way][line.kind] += exact(model, vision[:, keep[0]], keep, [line])
    return scores


def summary(scores: dict[str, list[bool]]) -> str:
    """Shares per kind, and over all local questions."""
    local = [ok for kind in scenes.LOCAL_KINDS for ok in scores.get(kind, ())]
    parts = [f"{k} {sum(scores[k]) / len(scores[k]):.3f}" for k in KINDS if scores.get(k)]
    return " ".join(parts) + f" | local {sum(local) / max(1, len(local)):.3f} (n={len(local)})"
