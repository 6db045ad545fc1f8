"""The training loop: six stages, budgets in CPU time, checkpoints, held-out figures in a log."""

from __future__ import annotations

import collections
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from bench.training.embedded import labels as dense
from bench.training.embedded.data import CALLED, Item, Reservoir, choose, keep_tokens, pack
from bench.training.embedded.model import (
    AIDS,
    EARLY_LAYERS,
    NUM_PATCHES,
    NamedPatches,
    build,
    export,
    text_hidden,
    tower_features,
    use_layers,
)
from bench.training.embedded.muon import Muon
from bench.training.embedded.scores import answer_scores, patch_scores, summary

# Of each stage's pictures; a process of several begins so many later.
FIRST_SEED = {
    "tower": 1,
    "decoder": 5_000_000,
    "bridge": 9_000_000,
    "fit": 9_500_000,
    "joint": 10_000_000,
    "refine": 12_000_000,
}
SEEDS_EACH = 400_000


@dataclass(frozen=True)
class Stage:
    """What one stage does.

    Args:
        minutes: CPU time by default. starts_from: stages whose parameters it takes up.
        batch: pictures of a step. reuse: times a picture is used. store: pictures held.
        matrix_lr, other_lr: peak learning rates. layers: decoder layers in use, None: all.
        full: share of the budget after which every patch is kept; some: of the steps before, the share that keeps all.
        easy: share of the budget in which pictures grow from easy ones to the full range.
        aside: pictures of a second batch, for the tower alone. slow: factor of the tower's learning rates.
        fall: share of the budget in which all learning rates fall.
    """

    name: str
    minutes: float
    starts_from: tuple[str, ...] = ()
    batch: int = 8
    reuse: float = 2.0
    store: int = 1000
    matrix_lr: float = 0.02
    other_lr: float = 2e-3
    layers: int | None = None
    full: float = 0.95
    some: float = 0.0
    easy: float = 0.25
    aside: int = 0
    slow: float = 1.0
    fall: float = 0.5


STAGES = {
    stage.name: stage
    for stage in (
        # The tower alone learns to name what each patch shows.
        Stage("tower", 90, batch=16),
        # Meanwhile the decoder learns to answer from embeddings of these names, as if the tower were perfect.
        Stage("decoder", 150, layers=EARLY_LAYERS),
        # The projector learns to turn the tower's features into those embeddings.
        Stage("bridge", 20, ("tower", "decoder"), batch=16, other_lr=4e-3, layers=EARLY_LAYERS, easy=0.0),
        # The tower gives way, too: its features were made for a linear layer behind a norm.
        Stage("fit", 26, ("bridge",), batch=16, matrix_lr=0.01, layers=EARLY_LAYERS, full=0.0, easy=0.0),
        # Everything.
        Stage(
            "joint", 240, ("fit",), matrix_lr=0.01, other_lr=1e-3, full=0.85, some=0.15, easy=0.0, aside=16, slow=0.5
        ),
        # Once more, the tower at its full rate.
        Stage(
            "refine", 260, ("joint",), matrix_lr=0.01, other_lr=1e-3, full=0.85, some=0.15, easy=0.0, aside=32, fall=0.8
        ),
    )
}


@dataclass
class Options:
    """How a stage is run: folder, name, CPU minutes (None: the stage's), question tokens of a picture, weights of aids."""

    out: Path
    stage: str
    minutes: float | None = None
    room: int = 320
    mass: float = 0.15
    patch: float = 0.3
    save_every: float = 600
    score_every: float = 1200
    log_every: int = 50
    stages: dict[str, Stage] = field(default_factory=lambda: STAGES)


class Trainer:
    """One stage of a run: model, heads and embeddings of dense labels, optimiser and clock; resumed if it was begun."""

    def __init__(self, options: Options) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register("aided", AIDS)
        self.options, self.stage = options, options.stages[options.stage]
        self.shared = distributed.is_initialized()  # among processes, each with its part of a batch
        self.rank, self.processes = (distributed.get_rank(), distributed.get_world_size()) if self.shared else (0, 1)
        if self.stage.batch % self.processes:
            raise ValueError(f"Trainer: processes must divide the batch of {self.stage.batch}, got {self.processes}")
        self.budget = 60 * (self.stage.minutes if options.minutes is None else options.minutes)
        options.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.model = build()
        self.model.model.language_model.set_attn_implementation("aided")
        self.heads = nn.Linear(self.model.config.vision_config.hidden_size, sum(dense.HEADS.values()))
        self.named = NamedPatches(self.model.config.text_config.hidden_size)
        self.state = {"stage": self.stage.name, "elapsed": 0.0, "step": 0, "pictures": 0}
        self.checkpoint = options.out / f"{self.stage.name}.pt"
        saved = None
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint)
            self.state = saved["state"]
            self.say(f"resumed: {self.state}")
            self.load(saved["parameters"])
        for name in self.stage.starts_from if saved is None else ():
            self.load(torch.load(options.out / f"{name}.pt")["parameters"])
        self.trained = self.parameters()
        self.optimiser = Muon(self.trained, self.stage.matrix_lr, self.stage.other_lr, self.stage.slow)
        if saved is not None:
            self.optimiser.load_state_dict(saved["optimiser"])
        torch.manual_seed(1000 + self.state["step"] + 1_000_000 * self.rank)

    def modules(self) -> dict[str, nn.Module]:
        """All that is trained, by name."""
        model = self.model.model
        parts = {"vision": model.vision_tower, "heads": self.heads, "projector": model.multi_modal_projector}
        return parts | {"text": model.language_model, "named": self.named}

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the stage trains, by name; all else is frozen."""
        parts = {
            "tower": ("vision", "heads"), "decoder": ("text", "named"), "bridge": ("projector",),
            "fit": ("vision", "heads", "projector"),
            **dict.fromkeys(("joint", "refine"), ("vision", "heads", "projector", "text")),
        }[self.stage.name]  # fmt: skip
        unused = set(map(id, use_layers(self.model, self.stage.layers)))
        unused |= set(map(id, self.model.model.vision_tower.post_layernorm.parameters()))
        chosen = [
            (f"{part}.{n}", p)
            for part in parts
            for n, p in self.modules()[part].named_parameters()
            if id(p) not in unused
        ]
        for module in self.modules().values():
            module.requires_grad_(False)
        for _, p in chosen:
            p.requires_grad_(True)
        return chosen

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Take up what a stage has trained."""
        own = {f"{part}.{n}": p for part, module in self.modules().items() for n, p in module.named_parameters()}
        for name, value in parameters.items():
            own[name].data.copy_(value)

    def save(self) -> None:
        """Write what this stage and those before it have trained beside the old checkpoint, then put it in its place."""
        if self.rank:
            return
        part = self.checkpoint.with_suffix(".part")
        kept = {n: p.data for n, p in self.trained}
        if self.stage.starts_from:
            kept = {f"{part}.{n}": p.data for part, m in self.modules().items() for n, p in m.named_parameters()}
        torch.save({"parameters": kept, "state": self.state, "optimiser": self.optimiser.state_dict()}, part)
        part.replace(self.checkpoint)

    def say(self, text: str) -> None:
        """A line in the stage's log, and on the screen."""
        if self.rank:
            return
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        with open(self.options.out / f"{self.stage.name}.txt", "a", encoding="utf-8") as log:
            log.write(line + "\n")

    def run(self) -> bool:
        """The stage up to its budget; False if it was stopped before."""
        options, stage, state = self.options, self.stage, self.state
        batch, aside = stage.batch // self.processes, stage.aside // self.processes
        first = FIRST_SEED[stage.name] + state["pictures"] + self.rank * SEEDS_EACH
        data = Reservoir(first, stage.store, self.hardness())
        data.add(min(stage.store, max(4 * stage.batch, 256)))
        saved, scored = time.time(), time.time()
        fresh, meter = 0.0, collections.Counter()
        last = spent = time.process_time()
        while state["elapsed"] < self.budget:
            fraction = state["elapsed"] / self.budget
            data.hardness = self.hardness()
            fresh += batch / stage.reuse
            if fresh >= 16:
                data.add(16)
                state["pictures"] += 16
                fresh -= 16
            every = fraction > stage.full or random.Random(state["step"]).random() < stage.some
            losses = self.losses(data.draw(batch, stage.name != "decoder"), every, data)
            if aside:
                losses["aside"] = self.options.patch * self.tower_loss(data.draw(aside, True), every=False)
            for _, p in self.trained:
                p.grad = None
            sum(losses.values()).backward()
            now = time.process_time()
            used, stop = self.share(now - spent, (options.out / f"stop-{stage.name}").exists())
            spent = now
            torch.nn.utils.clip_grad_norm_([p for _, p in self.trained], 1.0)
            warm = min(1.0, (state["elapsed"] + 2) / min(120, 0.05 * self.budget))
            # Linear fall after a plateau: as good as a cosine, and a budget can be extended late.
            self.optimiser.step(warm * min(1.0, max(0.03, (1 - fraction) / stage.fall)))
            state["step"] += 1
            state["elapsed"] += used
            meter.update({k: float(v.detach()) for k, v in losses.items()})
            meter["n"] += 1
            if meter["n"] == options.log_every:
                rate = batch * meter["n"] / (time.process_time() - last)
                text = " ".join(f"{k} {v / meter['n']:.3f}" for k, v in meter.items() if k != "n")
                self.say(f"{fraction:.3f} step {state['step']} {rate:.1f} pictures/s, {text}")
                meter.clear()
                last = time.process_time()
            if stop:
                self.save()
                self.say("stopped")
                return False
            if time.time() - saved > options.save_every:
                self.save()
                saved = time.time()
            if time.time() - scored > options.score_every:
                self.score()
                scored = time.time()
            while (options.out / "pause").exists():
                time.sleep(2)
        self.save()
        self.score()
        self.say("done")
        return True

    def share(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """Mean gradients of all processes; CPU time of all together, and whether one of them is to stop."""
        if self.shared:
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in self.trained]
            flat = torch.cat([part.flatten() for part in parts] + [torch.tensor([seconds, float(stop)])])
            distributed.all_reduce(flat)
            means = (flat[:-2] / self.processes).split([part.numel() for part in parts])
            for (_, p), mean in zip(self.trained, means, strict=True):
                p.grad = mean.view_as(p)
            seconds, stop = float(flat[-2]), bool(flat[-1])
        return seconds, stop

    def hardness(self) -> float:
        """Curriculum: from easy pictures to the full range."""
        done = self.state["elapsed"] / self.budget
        return min(1.0, 0.3 + 0.7 * done / self.stage.easy) if self.stage.easy else 1.0

    def losses(self, items: list[Item], every: bool, data: Reservoir) -> dict[str, Tensor]:
        """Terms of the loss on a batch; ``every``: no background patch is dropped."""
        name, projector = self.stage.name, self.model.model.multi_modal_projector
        if name == "tower":
            return {"patch": self.tower_loss(items, every)}
        keep, pick = self.keep(items, every, name != "decoder"), torch.arange(len(items))[:, None]
        labels = torch.stack([i.labels for i in items]).long()
        if name == "decoder":
            return self.answer_losses(items, self.named(labels[pick, keep], keep), keep, data)
        features = tower_features(self.model, torch.stack([i.patches for i in items]))  # cheap: it sees every patch
        losses = {} if name == "bridge" else {"patch": self.options.patch * self.patch_loss(features, labels)}
        if name in ("bridge", "fit"):
            weight = 0.1 + 0.9 * (labels > 0).any(2)
            whole = torch.arange(NUM_PATCHES).expand(len(items), -1)
            distance = (projector(features) - self.named(labels, whole)).square().mean(2)
            return losses | {"distance": (distance * weight).sum() / weight.sum() / self.named.spread}
        return losses | self.answer_losses(items, projector(features[pick, keep]), keep, data)

    def keep(self, items: list[Item], every: bool, whole: bool) -> Tensor:
        """(B, n) patches to keep. Their number changes from step to step, else the share of background would tell things."""
        most = 8 if self.stage.name == "tower" else 32  # there, background teaches little
        extra = NUM_PATCHES if every else int(8 * most ** torch.rand(()))
        return keep_tokens(torch.stack([i.needed(whole) for i in items]), extra)

    def tower_loss(self, items: list[Item], every: bool) -> Tensor:
        """The dense labels of the patches kept, from the tower alone."""
        keep, pick = self.keep(items, every, True), torch.arange(len(items))[:, None]
        patches, labels = torch.stack([i.patches for i in items]), torch.stack([i.labels for i in items]).long()
        return self.patch_loss(tower_features(self.model, patches[pick, keep], keep), labels[pick, keep])

    def patch_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the dense labels (B, n, heads), background patches weighing a tenth."""
        parts = self.heads(F.layer_norm(features, features.shape[-1:])).split(list(dense.HEADS.values()), 2)
        weight = 0.1 + 0.9 * (labels > 0).any(2)
        loss = sum(
            F.cross_entropy(part.transpose(1, 2), labels[..., i], reduction="none") for i, part in enumerate(parts)
        )
        # Every picture counts alike, or receipts would have most of the letters.
        return ((loss * weight).sum(1) / weight.sum(1)).mean()

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
        # A key of 0 is the token before the picture: what lies before a line, and patches that were dropped.
        where = torch.zeros(len(items), NUM_PATCHES + 1, dtype=torch.long)
        where.scatter_(1, keep, 1 + torch.arange(keep.shape[1]).expand(len(items), -1))
        spot = where.gather(1, packed.spot.clamp_min(0)).masked_fill(packed.spot < 0, -1)
        left = torch.stack([i.before for i in items]).gather(1, keep)  # patches
        left = where.gather(1, left.clamp_min(0)).masked_fill(left < 0, -1)
        typed = (prefix - 1 + torch.arange(packed.ids.shape[1])).masked_fill(packed.place == 0, -1)
        before = torch.cat((torch.full((len(items), 1), -1), left, typed), 1)
        head, number = (table[packed.ids] for table in CALLED)
        seen = torch.stack([i.labels for i in items])[rows, keep].transpose(1, 2)  # (B, heads, patches)
        named = torch.zeros_like(region)
        named[..., 1:] = (seen[rows, head.clamp_min(0)] == number[..., None]) & (head >= 0)[..., None]
        AIDS.start(prefix, before, region, aimed, spot, named)
        hidden = text_hidden(self.model, vision, keep, packed.ids, packed.block, packed.place)
        AIDS.on = False
        asked = packed.target != -100
        answer = F.cross_entropy(self.model.lm_head(hidden[asked]), packed.target[asked])
        return {"answer": answer} | {k: self.options.mass * v for k, v in AIDS.losses.items()}

    def score(self) -> None:
        """Held-out figures in the log and in ``scores.jsonl``, and the weights as they are."""
        if self.rank:
            return
        self.model.eval()
        record, name = dict(self.state), self.stage.name
        if name != "decoder":
            record["patch"] = patch_scores(self.model, self.heads)
            self.say("held-out patches: " + " ".join(f"{k} {v:.3f}" for k, v in record["patch"].items()))
        if name != "tower":
            see = self.named.see if name == "decoder" else None
            scores = answer_scores(self.model, see=see, pruned=1)
            record["answers"] = {way: {k: [sum(v), len(v)] for k, v in kinds.items()} for way, kinds in scores.items()}
            for way, kinds in scores.items():
                self.say(f"held-out {way}: {summary(kinds)}")
        if name in ("bridge", "fit", "joint", "refine"):
            export(self.model, self.options.out / "weights")
        with open(self.options.out / "scores.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        self.model.train()
