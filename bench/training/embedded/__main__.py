"""Train the embedded model from nothing, or evaluate what was exported.

python -m bench.training.embedded tower --out RUN     # stages: tower and decoder, side by side, then bridge, fit, joint, refine
python -m bench.training.embedded decoder --out RUN   # each resumes if it was begun
python -m torch.distributed.run --nproc-per-node 2 -m bench.training.embedded joint --out RUN     # two processes
touch RUN/stop-decoder                              # ends it with a checkpoint
touch RUN/pause                                     # all wait while this exists
python -m bench.training.embedded --evaluate RUN/weights --pictures 200
python -m bench.training.embedded --flops
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from bench.training.embedded.model import AIDS, build, flops
from bench.training.embedded.scores import HELD_OUT, answer_scores, summary
from bench.training.embedded.train import STAGES, Options, Trainer


def evaluate(directory: Path, pictures: int) -> None:
    """Exact answers of exported weights, with all tokens and after pruning, on pictures not watched while training."""
    from transformers import AttentionInterface, LlavaForConditionalGeneration

    AttentionInterface.register("aided", AIDS)
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    model.model.language_model.set_attn_implementation("aided")
    for way, kinds in answer_scores(model, pictures, HELD_OUT + 1000, pruned=4).items():
        print(f"{way}: {summary(kinds)}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder of the run")
    parser.add_argument("stage", nargs="?", choices=list(STAGES), help="stage to train")
    parser.add_argument("--minutes", type=float, help="CPU minutes, default: the stage's")
    parser.add_argument("--score-every", type=float, default=20, help="minutes between held-out figures")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of the log")
    parser.add_argument("--evaluate", type=Path, help="only evaluate the weights in this folder")
    parser.add_argument("--pictures", type=int, default=100, help="pictures to evaluate on")
    parser.add_argument("--flops", action="store_true", help="only count the first token's operations")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.flops:
        parts = flops()
        for name, count in parts.items():
            print(f"{name:10} {count / 1e9:6.2f} GFLOP {100 * count / sum(parts.values()):5.1f} %")
        print(f"{sum(p.numel() for p in build().parameters()) / 1e6:.2f} M parameters")
    elif args.evaluate:
        evaluate(args.evaluate, args.pictures)
    elif args.stage:
        options = Options(
            args.out, args.stage, args.minutes, score_every=60 * args.score_every, log_every=args.log_every
        )
        if "WORLD_SIZE" in os.environ:  # one of several processes
            torch.distributed.init_process_group("gloo")
        Trainer(options).run()
    else:
        parser.error("a stage, --evaluate or --flops is needed")


if __name__ == "__main__":
    main()
