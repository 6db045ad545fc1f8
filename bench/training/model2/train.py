"""The training loop: three stages, budgets in CPU time, checkpoints, held-out figures in a log."""

from __future__ import annotations

import collections
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.model2 import pages
from bench.training.model2.data import Item, Reservoir, choose, keep_tokens, pack
from bench.training.model2.model import (
    AIDS,
    EARLY_LAYERS,
    NUM_PATCHES,
    build,
    export,
    text_hidden,
    tower_features,
    use_layers,
)
from bench.training.model2.scores import answer_scores, patch_scores, summary
from bench.training.muon import Muon


@dataclass(frozen=True)
class Stage:
    """What one stage does.

    Args:
        batch: pictures of a step. reuse: times a picture is used. store: pictures held.
        matrix_lr, other_lr: peak learning rates. full: share of the budget after which every patch is kept.
        some: share of the steps before that in which every patch is kept.
        aside: pictures of a second batch, for the tower alone. slow: factor of the tower's learning rates.
    """

    name: str
    batch: int
    reuse: float
    store: int
    matrix_lr: float
    other_lr: float
    full: float
    some: float
    aside: int = 0
    slow: float = 1.0


STAGES = (
    # the tower alone, dense labels
    Stage("tower", 32, 2.0, 1500, 0.02, 2e-3, 0.75, 0.0),
    # packed questions, the first decoder layers; the tower goes on learning labels, its features are some steps old
    Stage("decoder", 16, 2.0, 600, 0.02, 2e-3, 0.97, 0.0, aside=64, slow=0.5),
    # everything
    Stage("joint", 16, 2.0, 800, 0.008, 8e-4, 0.85, 0.15, aside=64),
)


@dataclass
class Options:
    """How a run is made: folder, CPU minutes per stage, the question tokens of a picture, weights of the aids."""

    out: Path
    minutes: tuple[float, ...]
    room: int = 176
    mass: float = 0.15
    patch: float = 0.3
    save_every: float = 600
    score_every: float = 1200
    log_every: int = 50
    stages: tuple[Stage, ...] = field(default=STAGES)


class Trainer:
    """A run: model, heads for dense labels, optimiser and clock; resumed if its folder holds a checkpoint."""

    def __init__(self, options: Options) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register("aided", AIDS)
        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.model = build()
        self.model.model.language_model.set_attn_implementation("aided")
        self.heads = nn.Linear(self.model.config.vision_config.hidden_size, sum(pages.HEADS.values()))
        self.state = {"stage": 0, "elapsed": 0.0, "step": 0, "pictures": 0}
        self.optimiser_state: dict | None = None
        self.checkpoint = options.out / "checkpoint.pt"
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=False)
            self.model.load_state_dict(saved["model"])
            self.heads.load_state_dict(saved["heads"])
            self.state, self.optimiser_state = saved["state"], saved["optimiser"]
            self.say(f"resumed: {self.state}")
        torch.manual_seed(1000 + self.state["step"])

    def say(self, text: str) -> None:
        """A line in the log, and on the screen."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        with open(self.options.out / "log.txt", "a", encoding="utf-8") as log:
            log.write(line + "\n")

    def save(self, optimiser: Muon) -> None:
        """Write the checkpoint beside the old one, then put it in its place."""
        part = self.checkpoint.with_suffix(".part")
        parts = {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
        torch.save(parts | {"state": self.state, "optimiser": optimiser.state_dict()}, part)
        part.replace(self.checkpoint)

    def run(self) -> None:
        """All stages that have a budget left."""
        for number, stage in enumerate(self.options.stages):
            budget = 60 * self.options.minutes[number]
            if number < self.state["stage"] or budget <= 0:
                continue
            if number > self.state["stage"]:
                self.state.update(stage=number, elapsed=0.0)
                self.optimiser_state = None
            if not self.train(stage, budget):
                return
        self.say("done")

    def parameters(self, stage: Stage) -> list[tuple[str, nn.Parameter]]:
        """What a stage trains; all else is frozen."""
        tower = self.model.model.vision_tower
        vision = [(f"vision.{n}", p) for n, p in tower.named_parameters() if "post_layernorm" not in n]
        vision += [(f"heads.{n}", p) for n, p in self.heads.named_parameters()]
        language = [(f"text.{n}", p) for n, p in self.model.named_parameters() if "vision_tower" not in n]
        named = {"tower": vision, "decoder": vision + language, "joint": vision + language}[stage.name]
        unused = set(map(id, use_layers(self.model, None if stage.name == "joint" else EARLY_LAYERS)))
        named = [(n, p) for n, p in named if id(p) not in unused]
        for p in (*self.model.parameters(), *self.heads.parameters()):
            p.requires_grad_(False)
        for _, p in named:
            p.requires_grad_(True)
        return named

    def train(self, stage: Stage, budget: float) -> bool:
        """One stage up to its budget; False if it was stopped."""
        options, state = self.options, self.state
        named = self.parameters(stage)
        optimiser = Muon(named, stage.matrix_lr, stage.other_lr, stage.slow)
        if self.optimiser_state is not None:
            optimiser.load_state_dict(self.optimiser_state)
        features = self.frozen_features if stage.name == "decoder" else None
        hardness = self.hardness(stage, state["elapsed"] / budget)
        data = Reservoir(1 + state["pictures"], stage.store, hardness)
        data.add(min(stage.store, max(4 * stage.batch, 512)), features)
        start, saved, scored = time.process_time() - state["elapsed"], time.time(), time.time()
        fresh, last, meter = 0.0, time.process_time(), collections.Counter()
        while state["elapsed"] < budget:
            fraction = state["elapsed"] / budget
            data.hardness = self.hardness(stage, fraction)
            fresh += stage.batch / stage.reuse
            if fresh >= 16:
                data.add(16, features)
                state["pictures"] += 16
                fresh -= 16
            every = fraction > stage.full or bool(torch.rand(()) < stage.some)
            losses = self.losses(stage, data.draw(stage.batch, stage.name != "decoder"), every, data)
            if stage.aside:
                losses["aside"] = self.options.patch * self.tower_loss(data.draw(stage.aside, True), every=False)
            for _, p in named:
                p.grad = None
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            warm = min(1.0, (state["elapsed"] + 2) / min(120, 0.05 * budget))
            # Linear fall after a plateau: as good as a cosine, and a budget can be extended late.
            optimiser.step(warm * min(1.0, max(0.03, (1 - fraction) / 0.5)))
            state["step"] += 1
            state["elapsed"] = time.process_time() - start
            meter.update({k: float(v.detach()) for k, v in losses.items()})
            meter["n"] += 1
            if meter["n"] == options.log_every:
                rate = stage.batch * meter["n"] / (time.process_time() - last)
                text = " ".join(f"{k} {v / meter['n']:.3f}" for k, v in meter.items() if k != "n")
                self.say(f"{stage.name} {fraction:.3f} step {state['step']} {rate:.1f} pictures/s, {text}")
                meter.clear()
                last = time.process_time()
            if (options.out / "stop").exists():
                self.save(optimiser)
                self.say("stopped")
                return False
            if time.time() - saved > options.save_every:
                self.save(optimiser)
                saved = time.time()
            if time.time() - scored > options.score_every:
                self.score(stage)
                scored = time.time()
            while (options.out / "pause").exists():
                time.sleep(2)
        self.save(optimiser)
        self.score(stage)
        return True

    @staticmethod
    def hardness(stage: Stage, fraction: float) -> float:
        """Curriculum: the first stages grow from easy pictures to the full range in their first quarter."""
        return 1.0 if stage.name == "joint" else min(1.0, 0.3 + 3 * fraction)

    def frozen_features(self, patches: Tensor) -> Tensor:
        """(B, 576, d) tower features in half the memory."""
        with torch.no_grad():
            return tower_features(self.model, patches).bfloat16()

    def losses(self, stage: Stage, items: list[Item], every: bool, data: Reservoir) -> dict[str, Tensor]:
        """Terms of the loss on a batch; ``every``: no background patch is dropped."""
        if stage.name == "tower":
            return {"patch": self.tower_loss(items, every)}
        keep, pick = self.keep(items, every, stage.name != "decoder"), torch.arange(len(items))[:, None]
        if stage.name == "decoder":
            vision = torch.stack([i.features for i in items])[pick, keep].float()
            return self.answer_losses(items, vision, keep, data)
        vision = tower_features(self.model, torch.stack([i.patches for i in items]))  # cheap: it sees every patch
        losses = {"patch": self.options.patch * self.patch_loss(vision, torch.stack([i.labels for i in items]).long())}
        return losses | self.answer_losses(items, vision[pick, keep], keep, data)

    @staticmethod
    def keep(items: list[Item], every: bool, whole: bool) -> Tensor:
        """(B, n) patches to keep. Their number changes from step to step, else the share of background would tell things."""
        extra = NUM_PATCHES if every else int(8 * 32 ** torch.rand(()))
        return keep_tokens(torch.stack([i.needed(whole) for i in items]), extra)

    def tower_loss(self, items: list[Item], every: bool) -> Tensor:
        """The dense labels of the patches kept, from the tower alone."""
        keep, pick = self.keep(items, every, True), torch.arange(len(items))[:, None]
        patches, labels = torch.stack([i.patches for i in items]), torch.stack([i.labels for i in items]).long()
        return self.patch_loss(tower_features(self.model, patches[pick, keep], keep), labels[pick, keep])

    def patch_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the dense labels (B, n, heads), background patches weighing a tenth."""
        logits = self.heads(F.layer_norm(features, features.shape[-1:])).flatten(0, 1)
        labels = labels.flatten(0, 1)
        weight = 0.1 + 0.9 * (labels > 0).any(1)
        parts = logits.split(list(pages.HEADS.values()), 1)
        loss = sum(F.cross_entropy(part, labels[:, i], reduction="none") for i, part in enumerate(parts))
        return (loss * weight).sum() / weight.sum()

    def answer_losses(self, items: list[Item], vision: Tensor, keep: Tensor, data: Reservoir) -> dict[str, Tensor]:
        """Cross-entropy of the answers, and the aids on attention."""
        packed = pack([choose(item, data.rng, room=self.options.room) for item in items])
        prefix = 1 + vision.shape[1]
        rows = torch.arange(len(items))[:, None]
        # The row before the question mark knows what is asked, too.
        aimed = packed.aimed.clone()
        aimed[:, :-1] |= aimed[:, 1:] & (packed.block[:, 1:] == packed.block[:, :-1])
        region = torch.zeros(*packed.ids.shape, prefix, dtype=torch.bool)
        region[..., 1:] = packed.region[rows, packed.block.clamp_min(0)].gather(
            2, keep[:, None].expand(-1, packed.ids.shape[1], -1)
        )
        where = torch.zeros(len(items), NUM_PATCHES, dtype=torch.long)
        where.scatter_(1, keep, 1 + torch.arange(keep.shape[1]).expand(len(items), -1))
        spot = where.gather(1, packed.spot.clamp_min(0))
        AIDS.start(prefix, region, aimed, spot, packed.spot >= 0)
        hidden = text_hidden(self.model, vision, keep, packed.ids, packed.block, packed.place)
        AIDS.on = False
        asked = packed.target != -100
        answer = F.cross_entropy(self.model.lm_head(hidden[asked]), packed.target[asked])
        return {"answer": answer} | {k: self.options.mass * v for k, v in AIDS.losses.items()}

    def score(self, stage: Stage) -> None:
        """Held-out figures in the log and in ``scores.jsonl``, and the weights as they are."""
        self.model.eval()
        record = {"stage": stage.name, **self.state, "patch": patch_scores(self.model, self.heads)}
        self.say("held-out patches: " + " ".join(f"{k} {v:.3f}" for k, v in record["patch"].items()))
        if stage.name != "tower":
            scores = answer_scores(self.model, pruned=1)
            record["answers"] = {way: {k: [sum(v), len(v)] for k, v in kinds.items()} for way, kinds in scores.items()}
            for way, kinds in scores.items():
                self.say(f"held-out {way}: {summary(kinds)}")
            export(self.model, self.options.out / "weights")
        with open(self.options.out / "scores.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        self.model.train()
