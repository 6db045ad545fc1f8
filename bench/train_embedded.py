"""Train the vision-language model that the package carries, from nothing, on rendered pictures.

Stages (each with a budget in minutes, so that a run fits the time there is):
  tower    the vision tower alone; every patch names the thing it belongs to (kind, colour, word, digits, place, ...)
  decoder  tower frozen; several questions per picture, packed block-diagonally behind the picture's tokens
  joint    everything, at a lower learning rate
  boxes    decoder layers alone, at a lower rate still: tower, projector and words stay as they are, bit for bit

    python bench/train_embedded.py --out RUN --minutes 20 12 70 40 --export crop/embedded/weights
    python bench/train_embedded.py --out RUN --minutes 20 12 90 40 --export ...   # resumes and goes on
    python bench/train_embedded.py --out RUN --start crop/embedded/weights --minutes 0 0 0 40 --export NEW
    touch RUN/stop                                                             # ends it with a checkpoint
    python bench/train_embedded.py --evaluate crop/embedded/weights --scenes 400

Aids, all absent from the exported model, which is a stock LlavaForConditionalGeneration: dense patch labels, random
dropping of background tokens while learning, a loss on the attention mass of the answer's region (two heads of decoder
layers 1 and 3), and a penalty that keeps vision values unread in decoder layers 0 and 1, so that vision is read from
layer 2 on.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from crop.embedded import scenes

NUM_PATCHES = scenes.GRID**2
MAX_QUESTIONS, MAX_BOXES, MAX_LENGTH = 32, 8, 13
HELD_OUT = 10_000_000  # first seed of the held-out range; training seeds stay below
SIZES = {  # tower width, tower layers, decoder width, decoder layers, decoder feed-forward
    "small": (128, 5, 128, 8, 320),
    "medium": (192, 6, 192, 8, 512),
    "large": (224, 6, 256, 8, 512),
}
EMPHASIS = {"box": 5.0, "count": 2.0, "total": 2.0, "date": 1.5, "shapes": 1.5, "picture": 0.2, "receipt": 0.2}
STAGES = ("tower", "decoder", "joint", "boxes")
WHERE = [f"{v} {h}" for v in ("top", "middle", "bottom") for h in ("left", "center", "right")]
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
KINDS = ("shape", "sign", "shop", "date", "item", "total")
HEADS = {  # classes per patch label; class 0 is "none" everywhere
    "kind": len(KINDS) + 1, "color": len(scenes.COLORS) + 1, "shape": len(scenes.SHAPES) + 1,
    "word": len(scenes.DRAWN_WORDS) + 1, "tens": 11, "ones": 11, "where": 10, "character": len(CHARACTERS) + 1,
    "same_color": 7, "same_shape": 7, "things": 7,
}  # fmt: skip
COUNTS = ("same_color", "same_shape", "things")  # slow to learn, weighted double


# ---------------------------------------------------------------------------------------------------------------- data
def patch_labels(scene: scenes.Scene) -> np.ndarray:
    """(256, len(HEADS)) uint8: what the thing under each patch is."""
    label = np.zeros((scenes.GRID, scenes.GRID, len(HEADS)), np.uint8)
    for thing in scene.things:
        digits = f"{thing.value:>2}" if thing.value else "  "
        same = [sum(getattr(o, a) == getattr(thing, a) for o in scene.things) for a in ("color", "shape")]
        row = [
            1 + KINDS.index(thing.kind),
            1 + list(scenes.COLORS).index(thing.color) if thing.color else 0,
            1 + scenes.SHAPES.index(thing.shape) if thing.shape else 0,
            1 + scenes.DRAWN_WORDS.index(thing.word) if thing.word else 0,
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
    centre = (np.arange(scenes.GRID) + 0.5) / scenes.GRID
    mask = np.zeros((scenes.GRID, scenes.GRID), bool)
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
    return (*scene.questions[:MAX_QUESTIONS], *scene.grounding[:MAX_BOXES])


def encode(scene: scenes.Scene, encoder: Encoder) -> dict[str, np.ndarray]:
    """One picture as arrays: patches, patch labels and its questions."""
    rows = MAX_QUESTIONS + MAX_BOXES
    pixels = np.asarray(scene.image).reshape(scenes.GRID, scenes.PATCH, scenes.GRID, scenes.PATCH, 3)
    out = {
        # (row, column, channel, y, x): the order of a flattened convolution kernel
        "patches": pixels.transpose(0, 2, 4, 1, 3).reshape(NUM_PATCHES, -1).copy(),
        "labels": patch_labels(scene),
        "ids": np.zeros((rows, MAX_LENGTH), np.int16),
        "target": np.full((rows, MAX_LENGTH), -100, np.int16),
        "region": np.zeros((rows, NUM_PATCHES), bool),
        "local": np.zeros(rows, bool),
        "weight": np.zeros(rows, np.float32),
        "picture": np.array(scenes.PICTURES.index(scene.picture), np.uint8),
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
        for picture in self.rng.choices(scenes.PICTURES, (4, 3, 3), k=count):
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


# --------------------------------------------------------------------------------------------------------------- model
def build(size: str, vocabulary: dict[str, int]):
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    tower, tower_layers, width, layers, inner = SIZES[size]
    vision = SiglipVisionConfig(
        hidden_size=tower, intermediate_size=2 * tower, num_hidden_layers=tower_layers, num_attention_heads=4,
        image_size=scenes.SIZE, patch_size=scenes.PATCH, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=vocabulary["<s>"], eos_token_id=vocabulary["</s>"], pad_token_id=vocabulary["<pad>"],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary["<image>"], image_seq_length=NUM_PATCHES,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            std = 0.07 if "embed_tokens" in name else 0.8 / math.sqrt(parameter[0].numel())
            nn.init.normal_(parameter, std=std)
    # Rows and columns in sines: neighbours are then a fixed rotation apart from the first step on.
    place = model.model.vision_tower.embeddings.position_embedding.weight
    axis = (
        torch.arange(scenes.GRID)[:, None]
        * 2
        * math.pi
        / torch.logspace(math.log2(3), math.log2(64), tower // 4, base=2)
    )
    wave = torch.cat((axis.sin(), axis.cos()), 1)
    grid = torch.cat((wave[:, None].expand(-1, scenes.GRID, -1), wave[None].expand(scenes.GRID, -1, -1)), 2)
    place.data.copy_(grid.reshape(NUM_PATCHES, tower) * 0.4)
    return model


class Aids:
    """What the attention of some decoder layers contributes to the loss (training only)."""

    mass_layers, mass_heads, blind_layers = (1, 3), 2, (0, 1)

    def __init__(self) -> None:
        self.on = False

    def start(self, prefix: int, region: Tensor, rows: Tensor) -> None:
        """region: (B, text, T) bool keys of each row's answer; rows: (B, text) bool rows to supervise."""
        self.on, self.prefix, self.region, self.rows = True, prefix, region, rows
        self.mass, self.value = {}, []

    def __call__(self, module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        if self.on and module.layer_idx in self.mass_layers:
            heads = self.mass_heads
            logits = query[:, :heads, self.prefix :] @ key[:, :heads].transpose(2, 3) * scaling
            logits = logits.float().masked_fill(~mask[:, :, self.prefix :], -1e9)
            inside = logits.masked_fill(~self.region[:, None], -1e9).logsumexp(3) - logits.logsumexp(3)
            picked = inside.transpose(1, 2)[self.rows]
            self.mass[module.layer_idx] = -picked.clamp_min(-12).mean()
        if self.on and module.layer_idx in self.blind_layers:
            self.value.append(value[:, :, 1 : self.prefix].float().square().mean())
        return out.transpose(1, 2).contiguous(), None


AIDS = Aids()


def tower_features(model, patches: Tensor, keep: Tensor | None) -> Tensor:
    """Output of the stock tower's encoder for patches (B, n, 768) uint8 at grid places keep (B, n)."""
    tower = model.model.vision_tower
    kernel = tower.embeddings.patch_embedding
    pixels = patches.to(kernel.weight.device).float() / 127.5 - 1
    place = tower.embeddings.position_embedding.weight
    place = place if keep is None else place[keep]
    hidden = F.linear(pixels, kernel.weight.flatten(1), kernel.bias) + place
    return tower.encoder(inputs_embeds=hidden).last_hidden_state


def packed_mask(prefix: int, questions: int, length: int) -> Tensor:
    """(1, 1, T, T) bool: a causal prefix that every question sees, and questions that see nothing of each other."""
    total = prefix + questions * length
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:, :prefix] = True
    mask[:prefix, :prefix] = torch.ones(prefix, prefix).tril().bool()
    block = torch.ones(length, length).tril().bool()
    mask[prefix:, prefix:] = torch.block_diag(*[block] * questions).bool()
    return mask[None, None]


def answer_logits(model, vision: Tensor, keep: Tensor, ids: Tensor) -> Tensor:
    """Logits (B, Q, L, vocabulary) of packed questions ids (B, Q, L) behind vision features (B, n, d)."""
    batch, questions, length = ids.shape
    language, prefix = model.model.language_model, 1 + vision.shape[1]
    words = language.embed_tokens(ids.flatten(1))
    start = language.embed_tokens.weight[model.config.text_config.bos_token_id].expand(batch, 1, -1)
    embeds = torch.cat((start, model.model.multi_modal_projector(vision), words), 1)
    text = (1 + NUM_PATCHES + torch.arange(length)).repeat(questions).expand(batch, -1)
    position = torch.cat((torch.zeros(batch, 1, dtype=torch.long), 1 + keep, text), 1).to(ids.device)
    mask = packed_mask(prefix, questions, length).to(ids.device)
    hidden = language(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, prefix:]).unflatten(1, (questions, length))


# ---------------------------------------------------------------------------------------------------------- optimiser
class Muon:
    """Momentum made orthogonal by Newton-Schulz steps for the matrices inside layers, AdamW for everything else."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], matrix_lr: float, other_lr: float) -> None:
        inside = [p for n, p in named if p.ndim == 2 and ".layers." in n]
        chosen = set(map(id, inside))
        self.groups = collections.defaultdict(list)
        for p in inside:
            self.groups[tuple(p.shape)].append(p)
        self.momentum = {s: torch.zeros(len(g), *s, device=g[0].device) for s, g in self.groups.items()}
        self.matrix_lr, self.other_lr = matrix_lr, other_lr
        rest = [p for _, p in named if id(p) not in chosen]
        self.adam = torch.optim.AdamW(rest, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, scale: float) -> None:
        for shape, group in self.groups.items():
            grad, momentum = torch.stack([p.grad for p in group]), self.momentum[shape]
            momentum.lerp_(grad, 0.05)
            update = grad.lerp(momentum, 0.95)
            update = orthogonalise(update) * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u in zip(group, update, strict=True):
                p.data.mul_(1 - self.matrix_lr * scale * 0.02).add_(u, alpha=-self.matrix_lr * scale)
        for group in self.adam.param_groups:
            group["lr"] = self.other_lr * scale
        self.adam.step()

    def state_dict(self) -> dict:
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for shape, value in state["momentum"].items():
            self.momentum[shape].copy_(value)
        self.adam.load_state_dict(state["adam"])


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: five quintic Newton-Schulz steps. matrices: (n, rows, columns)."""
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    if tall := x.shape[1] > x.shape[2]:
        x = x.transpose(1, 2)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


# ------------------------------------------------------------------------------------------------------------ training
class Trainer:
    """One process of a run: model, data, optimiser, clock."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register("aided", AIDS)
        self.args, self.rank = args, rank
        self.device = torch.device(args.device)
        self.encoder = Encoder(vocabulary())
        torch.manual_seed(0)
        self.model = build(args.size, self.encoder.ids).to(self.device)
        self.model.model.language_model.set_attn_implementation("aided")
        if args.start:
            from crop import embedded

            self.model.load_state_dict(embedded.load(directory=args.start)[0].state_dict())
        self.heads = nn.Linear(SIZES[args.size][0], sum(HEADS.values())).to(self.device)
        self.state = {"stage": 0, "elapsed": 0.0, "step": 0, "pictures": 0, "log": []}
        self.optimiser_state = None
        self.checkpoint = Path(args.out) / "checkpoint.pt"
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=False)
            self.model.load_state_dict(saved["model"])
            self.heads.load_state_dict(saved["heads"])
            self.state, self.optimiser_state = saved["state"], saved["optimiser"]
        torch.manual_seed(1000 * rank + self.state["step"])
        self.local_steps, self.next_exchange, self.stop = 0, 0.0, False

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def save(self, optimiser: Muon) -> None:
        if self.rank:
            return
        part = self.checkpoint.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(), "heads": self.heads.state_dict(), "state": self.state,
                "optimiser": optimiser.state_dict(),
            },
            part,
        )  # fmt: skip
        part.replace(self.checkpoint)

    def run(self) -> None:
        for stage, name in enumerate(STAGES):
            if stage >= self.state["stage"] and self.args.minutes[stage] > 0:
                if stage > self.state["stage"]:
                    self.state.update(stage=stage, elapsed=0.0)
                    self.optimiser_state = None
                self.train(name, 60 * self.args.minutes[stage])

    def train(self, stage: str, budget: float) -> None:
        args, state = self.args, self.state
        named = (
            [("head.weight", self.heads.weight), ("head.bias", self.heads.bias)] if stage in ("tower", "joint") else []
        )
        model = self.model.model
        vision = [(f"vision.{n}", p) for n, p in model.vision_tower.named_parameters() if "post_layernorm" not in n]
        language = [(f"text.{n}", p) for n, p in self.model.named_parameters() if "vision_tower" not in n]
        layers = [(n, p) for n, p in language if "embed_tokens" not in n and "projector" not in n]
        named += {"tower": vision, "decoder": language, "joint": vision + language, "boxes": layers}[stage]
        for p in self.model.parameters():
            p.requires_grad_(False)
        for _, p in named:
            p.requires_grad_(True)
        number = STAGES.index(stage)
        matrix, other = args.lr[2 * number : 2 * number + 2]
        optimiser = Muon(named, matrix, other)
        if self.optimiser_state is not None:
            optimiser.load_state_dict(self.optimiser_state)
        features = self.frozen_features if stage in ("decoder", "boxes") else None
        first = 1 + self.rank + args.processes * (state["pictures"] + 1000)
        data = Reservoir(self.encoder, first, args.processes, 4000 if stage != "joint" else 1000)
        batch = args.batch[number]
        fresh, start, last, meter = (
            0.0,
            time.time() - state["elapsed"],
            time.time(),
            collections.Counter(),
        )
        saved = exported = time.time()
        data.hardness = self.hardness(stage, state["elapsed"] / budget)
        data.add(max(4 * batch, 128), features)
        while True:
            fraction = state["elapsed"] / budget
            if fraction >= 1:
                break
            data.hardness = self.hardness(stage, fraction)
            fresh += batch / args.reuse
            if fresh >= 16:
                data.add(16, features)
                state["pictures"] += 16
                fresh -= 16
            full = fraction > {"tower": 0.7, "decoder": 0.92, "joint": 0.85, "boxes": 0.85}[stage]
            full = full or (stage in ("joint", "boxes") and data.rng.random() < 0.6)
            losses = self.losses(stage, data.draw(batch), full)
            for p in (p for _, p in named):
                p.grad = None if p.grad is None else p.grad.zero_()
            total = sum(losses.values())
            total.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            warm = min(1.0, (state["elapsed"] + 2) / min(60, 0.05 * budget))
            # Linear fall after a long plateau: as good as a cosine, and a budget can be extended late.
            optimiser.step(warm * min(1.0, max(0.03, (1 - fraction) / 0.5)))
            self.synchronise([p for _, p in named], time.time() - start)
            state["step"] += 1
            meter.update({k: float(v.detach()) for k, v in losses.items()})
            meter["n"] += 1
            if meter["n"] == args.log_every:
                rate = batch * meter["n"] / (time.time() - last)
                text = " ".join(f"{k} {v / meter['n']:.3f}" for k, v in meter.items() if k != "n")
                self.say(f"{stage} {fraction:.2f} step {state['step']} {rate:.1f}/s a process, {text}")
                meter.clear()
                last = time.time()
            if self.stop:
                self.save(optimiser)
                sys.exit(0)
            if time.time() - saved > 120:
                self.save(optimiser)
                saved = time.time()
            if args.export and stage != "tower" and time.time() - exported > 60 * args.export_every:
                self.report(stage)
                exported = last = time.time()
        self.save(optimiser)
        self.report(stage)

    @staticmethod
    def hardness(stage: str, fraction: float) -> float:
        """Curriculum: the first quarter of the first stage grows from easy pictures to the full range."""
        return min(1.0, 0.3 + 3 * fraction) if stage == "tower" else 1.0

    def frozen_features(self, patches: Tensor) -> Tensor:
        with torch.no_grad():
            return tower_features(self.model, patches, None).bfloat16().cpu()

    def losses(self, stage: str, items: list[dict[str, Tensor]], full: bool) -> dict[str, Tensor]:
        """Joint and boxes: every picture keeps equally many tokens, and that number changes from step to step, else the share of
        background among them would give away how many things there are. Before that receipts, which cover more
        patches than the rest, are run apart.
        """
        receipts = [i for i in items if i["picture"] == 2]
        others = [i for i in items if i["picture"] != 2]
        if full or stage in ("joint", "boxes"):
            parts = [(items, NUM_PATCHES if full else int(torch.randint(96, 200, ())))]
        else:
            parts = list(zip((receipts, others), {"tower": (118, 74), "decoder": (96, 60)}[stage], strict=True))
        total: dict[str, Tensor] = collections.defaultdict(float)
        for part, count in parts:
            if part:
                for name, value in self.part_losses(stage, part, count).items():
                    total[name] = total[name] + value * (len(part) / len(items))
        return total

    def part_losses(self, stage: str, items: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
        labels = torch.stack([i["labels"] for i in items])
        full = count == NUM_PATCHES
        keep = torch.arange(NUM_PATCHES).expand(len(items), -1) if full else keep_tokens(labels, count)

        def take(name: str, whole: bool = full) -> Tensor:
            pairs = zip(items, keep, strict=True)
            return torch.stack([i[name] if whole else i[name][k] for i, k in pairs]).to(self.device)

        losses = {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if stage in ("decoder", "boxes"):
                features = take("features").float()
            elif stage == "tower":
                places = keep.to(self.device)
                features = tower_features(self.model, take("patches"), places)
                losses["patch"] = self.patch_loss(features, take("labels").long())
            else:  # the tower is cheap: it sees every patch even while the decoder does not
                features = tower_features(self.model, take("patches", True), None)
                losses["patch"] = 0.3 * self.patch_loss(features, take("labels", True).long())
                features = features[torch.arange(len(items))[:, None], keep]
            if stage != "tower":
                losses |= self.answer_losses(items, features, keep)
        return losses

    def patch_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        logits = self.heads(F.layer_norm(features, features.shape[-1:])).float().flatten(0, 1)
        labels = labels.flatten(0, 1)
        weight = 0.1 + 0.9 * (labels[:, 0] > 0)
        loss = sum(
            F.cross_entropy(part, labels[:, i], reduction="none") * (2.0 if name in COUNTS else 1.0)
            for i, (name, part) in enumerate(zip(HEADS, logits.split(list(HEADS.values()), 1), strict=True))
        )
        return (loss * weight).sum() / weight.sum()

    def answer_losses(self, items: list[dict[str, Tensor]], features: Tensor, keep: Tensor) -> dict[str, Tensor]:
        questions = self.args.questions
        weight = torch.stack([i["weight"] for i in items])
        # Sampling without replacement in proportion to the weights (exponential clocks).
        chosen = (torch.rand_like(weight).log() / weight.clamp_min(1e-6)).topk(questions, 1).indices
        pick = torch.arange(len(items))[:, None]
        ids, target, region, local = (
            torch.stack([i[n] for i in items])[pick, chosen] for n in ("ids", "target", "region", "local")
        )
        ids, target = ids.long(), target.long()
        prefix, length = 1 + features.shape[1], ids.shape[2]
        region = region.gather(2, keep[:, None].expand(-1, questions, -1))
        rows = (target != -100) & local[..., None]
        # The row before the question mark knows what is asked, too.
        rows[..., :-1] |= rows[..., 1:]
        keys = torch.zeros(len(items), questions, prefix + questions * length, dtype=torch.bool)
        keys[..., 1:prefix] = region
        AIDS.start(
            prefix,
            keys.repeat_interleave(length, 1).to(self.device),
            rows.flatten(1).to(self.device),
        )
        logits = answer_logits(self.model, features, keep, ids.to(self.device)).float()
        AIDS.on = False
        target = target.to(self.device)
        answer = F.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=-100)
        out = {"answer": answer, "blind": self.args.blind * sum(AIDS.value)}
        return out | {f"mass{layer}": self.args.mass * loss for layer, loss in AIDS.mass.items()}

    def synchronise(self, parameters: list[nn.Parameter], elapsed: float) -> None:
        """Local SGD: every few seconds the weights become the mean over the processes, weighted by their steps.

        No process waits for a slower one in between, which is what counts on a shared machine. The clock is rank 0's.
        """
        asked = (self.checkpoint.parent / "stop").exists() and self.rank == 0
        if self.args.processes == 1:
            self.state["elapsed"], self.stop = elapsed, asked
            return
        self.local_steps += 1
        if time.time() < self.next_exchange:
            return
        with torch.no_grad():
            tail = [float(self.local_steps), elapsed if self.rank == 0 else 0.0, float(asked)]
            flat = torch.cat([p.detach().flatten().cpu() for p in parameters]) * self.local_steps
            flat = torch.cat((flat, torch.tensor(tail)))
            dist.all_reduce(flat)
            steps, self.state["elapsed"], self.stop = flat[-3:].tolist()
            for p, mean in zip(parameters, flat[:-3].split([p.numel() for p in parameters]), strict=True):
                p.copy_(mean.view_as(p) / steps)
        self.local_steps, self.next_exchange = 0, time.time() + self.args.exchange

    def report(self, stage: str) -> None:
        """Held-out figures in the log; weights if there is a decoder to speak of."""
        if self.rank == 0:
            if stage == "tower":
                self.say(f"tower held-out patch accuracy: {self.patch_accuracy()}")
            else:
                self.say(f"{stage} held-out exact: {format_scores(quick_scores(self.model, self.encoder, 64))}")
                if self.args.export:
                    export(self.model, Path(self.args.export))
                    self.say(f"exported to {self.args.export}")

    @torch.no_grad()
    def patch_accuracy(self, count: int = 64) -> str:
        hits = []
        for seed in range(HELD_OUT, HELD_OUT + count, 16):
            items = [encode(scenes.scene(s), self.encoder) for s in range(seed, seed + 16)]
            features = tower_features(self.model, torch.stack([torch.from_numpy(i["patches"]) for i in items]), None)
            logits = self.heads(F.layer_norm(features, features.shape[-1:])).split(list(HEADS.values()), 2)
            labels = torch.stack([torch.from_numpy(i["labels"]) for i in items]).long().to(self.device)
            hits.append(torch.stack([torch.where(labels[..., i] > 0, (x.argmax(2) == labels[..., i]).float(), torch.nan)
                                     for i, x in enumerate(logits)]))  # fmt: skip
        mean = torch.cat(hits, 1).flatten(1).nanmean(1).tolist()
        return " ".join(f"{n} {m:.3f}" for n, m in zip(HEADS, mean, strict=True))


# ---------------------------------------------------------------------------------------------------------- evaluation
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
    kinds = [k for k in (*scenes.LOCAL_KINDS, *scenes.GLOBAL_KINDS, scenes.BOX_KIND) if k in scores]
    local = [ok for k in scenes.LOCAL_KINDS for ok in scores.get(k, ())]
    parts = [f"{k} {sum(scores[k]) / len(scores[k]):.3f}" for k in kinds]
    return " ".join(parts) + f" | all local {sum(local) / max(1, len(local)):.3f} (n={len(local)})"


def evaluate(directory: str, count: int) -> None:
    """Greedy answers of the exported files through the public path: processor, left padding, generate."""
    from crop import embedded

    model, processor = embedded.load(directory=directory)
    scores = collections.defaultdict(list)
    for seed in range(HELD_OUT + 1000, HELD_OUT + 1000 + count):  # beyond the pictures watched while training
        scene = scenes.scene(seed)
        questions = random.Random(seed).sample(scene.questions, min(8, len(scene.questions)))
        questions += scene.grounding[seed % len(scene.grounding) :][:1]
        answers = embedded.answer(model, processor, [scene.image] * len(questions), [q.text for q in questions])
        for question, text in zip(questions, answers, strict=True):
            scores[question.kind].append(text == question.answer)
    print(format_scores(scores))
    print("questions per kind: " + " ".join(f"{k} {len(v)}" for k, v in scores.items()))


# --------------------------------------------------------------------------------------------------------------- files
def vocabulary() -> dict[str, int]:
    words = ("<pad>", "<s>", "</s>", "<unk>", "<image>", *scenes.vocabulary())
    return {word: i for i, word in enumerate(words)}


def build_processor():
    """The processor that is saved beside the weights (Pillow only)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d|[^\w\s]"), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left", clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )  # fmt: skip
    images = SiglipImageProcessorPil(
        size={"height": scenes.SIZE, "width": scenes.SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )


def export(model, directory: Path) -> None:
    """Write weights (bfloat16) and processor; the directory is replaced in one move."""
    part, old = (
        directory.with_name(directory.name + ".part"),
        directory.with_name(directory.name + ".old"),
    )
    for path in (part, old):
        shutil.rmtree(path, ignore_errors=True)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(part)
    build_processor().save_pretrained(part)
    if directory.exists():
        directory.rename(old)
    part.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def worker(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if rank:
        os.nice(args.helper_nice)
    if args.processes > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(args.out).resolve()}/rendezvous-{args.key}",
            rank=rank,
            world_size=args.processes,
        )
    Trainer(args, rank).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="run", help="folder of the run: checkpoint; resumed if there")
    parser.add_argument("--start", help="directory of weights to begin with instead of random ones")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="processes that average their weights (CPU)")
    parser.add_argument("--exchange", type=float, default=4, help="seconds between two averages")
    parser.add_argument("--helper-nice", type=int, default=5, help="niceness of all processes but the first")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, nargs=4, default=(20, 12, 70, 40), help="wall minutes per stage")
    parser.add_argument("--batch", type=int, nargs=4, default=(24, 12, 12, 6), help="pictures per step and process")
    parser.add_argument(
        "--lr",
        type=float,
        nargs=8,
        default=(0.02, 2e-3, 0.02, 2e-3, 0.006, 7e-4, 0.004, 4e-4),
        help="matrices, rest; per stage",
    )
    parser.add_argument("--questions", type=int, default=10, help="packed questions per picture")
    parser.add_argument("--reuse", type=float, default=3, help="times a rendered picture is used")
    parser.add_argument("--mass", type=float, default=0.3, help="weight of the attention-mass loss")
    parser.add_argument("--blind", type=float, default=1.0, help="weight of the vision-value penalty")
    parser.add_argument("--export", help="directory for the weights")
    parser.add_argument("--export-every", type=float, default=15, help="minutes")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--evaluate", help="only evaluate the weights in this directory")
    parser.add_argument("--scenes", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(args.evaluate, args.scenes)
        return
    Path(args.out).mkdir(parents=True, exist_ok=True)
    args.key = os.getpid()
    if args.processes > 1:
        torch.multiprocessing.spawn(worker, (args,), args.processes)
    else:
        worker(0, args)


if __name__ == "__main__":
    main()
