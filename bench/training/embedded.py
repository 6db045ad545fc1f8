"""Train the vision-language model that the package carries, from nothing, on rendered pictures.

Stages (each with a budget in minutes, so that a run fits the time there is):
  tower    the vision tower alone; every patch names the thing it belongs to (kind, colour, word, digits, place, ...)
  decoder  tower frozen; several questions per picture, packed block-diagonally behind the picture's tokens
  joint    everything, at a lower learning rate
  boxes    decoder layers alone, at a lower rate still: tower, projector and words stay as they are, bit for bit

    python -m bench.training.embedded --out RUN --minutes 20 12 70 40 --export crop/embedded/weights
    python -m bench.training.embedded --out RUN --minutes 20 12 90 40 --export ...   # resumes and goes on
    python -m bench.training.embedded --out RUN --start crop/embedded/weights --minutes 0 0 0 40 --export NEW
    touch RUN/stop                                                             # ends it with a checkpoint
    python -m bench.training.embedded --evaluate crop/embedded/weights --scenes 400

Aids, all absent from the exported model, which is a stock LlavaForConditionalGeneration: dense patch labels, random
dropping of background tokens while learning, a loss on the attention mass of the answer's region (two heads of decoder
layers 1 and 3), and a penalty that keeps vision values unread in decoder layers 0 and 1, so that vision is read from
layer 2 on.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.embedded_data import HEADS, NUM_PATCHES, Encoder, Reservoir, encode, keep_tokens
from bench.training.embedded_evaluation import HELD_OUT, evaluate, format_scores, quick_scores
from bench.training.embedded_model import AIDS, SIZES, answer_logits, build, export, tower_features, vocabulary
from bench.training.muon import Muon
from crop.embedded import scenes

STAGES = ("tower", "decoder", "joint", "boxes")
COUNTS = ("same_color", "same_shape", "things")  # slow to learn, weighted double


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
    parser = argparse.ArgumentParser(
        prog="python -m bench.training.embedded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
