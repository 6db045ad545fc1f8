"""Fine-tune a vision-language model of transformers into a ``VLMLocalizer``: question -> rectangle of 8 x 8 blocks.

    python -m bench.training.localizer --model PATH --records train.jsonl --dev dev.jsonl --out DIR --lora 16
    python -m bench.training.localizer --out DIR --steps 300                     # the embedded model, rendered pictures

Records: see bench.records; several boxes become their bounds, rounded outward to blocks; those that nothing answers are
left out. Without --lora all weights but those of the vision tower are trained. The folder holds the merged model, its
processor and, in its configuration, how the model wants to be asked, so that ``crop ask --localizer vlm --localizer-model
DIR`` finds everything. The embedded model knows few words and no brackets, hence its own form of question and answer.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from bench.common import header
from bench.pictures import SEEDS
from bench.records import Record, read_jsonl, rendered
from crop.cli.ask import EMBEDDED, load
from crop.cli.images import open_image
from crop.geometry.region import Region
from crop.localizers import VLMLocalizer
from crop.localizers.vlm import BLOCKS, block_prompt
from crop.models import family_of

FORMS = {  # of the question and of the answer, for the embedded model and for others
    EMBEDDED: ("<image> what box is {question} in ?", " {0} {1} {2} {3} "),
    "other": (None, "[{0}, {1}, {2}, {3}]"),
}


def to_blocks(boxes: Any) -> tuple[int, int, int, int]:
    """Bounds of boxes, rounded outward to blocks, inclusive."""
    x0, y0, x1, y1 = (pick(side) for pick, side in zip((min, min, max, max), zip(*boxes, strict=True), strict=True))
    slack = 1e-6  # borders that are those of blocks but for rounding
    low = (min(math.floor(BLOCKS * side + slack), BLOCKS - 1) for side in (x0, y0))
    high = (max(math.ceil(BLOCKS * side - slack) - 1, 0) for side in (x1, y1))
    return (*low, *high)


def open_all(records: Iterable[Record]) -> Iterator[tuple[Image.Image, str, Any]]:
    """Records that have boxes, with their images opened."""
    for image, question, boxes in records:
        if boxes is not None:
            yield open_image(image) if isinstance(image, Path) else image, question, boxes


def collate(processor: Any, ask: Callable[[str], str], answer: str, records: list[Record]) -> dict[str, Tensor]:
    """Model inputs and labels, which are the tokens of the answers alone; padded on the left."""
    images = [[image] for image, *_ in records]
    prompts = [ask(question) for _, question, _ in records]
    end = processor.tokenizer.eos_token
    answers = [answer.format(*to_blocks(boxes)) + end for *_, boxes in records]
    full = [prompt + said for prompt, said in zip(prompts, answers, strict=True)]
    processor.tokenizer.padding_side = "left"
    inputs = processor(images=images, text=full, padding=True, return_tensors="pt")
    asked = processor(images=images, text=prompts, padding=True, return_tensors="pt")["attention_mask"].sum(1)
    length = inputs["attention_mask"].sum(1) - asked
    place = torch.arange(inputs["input_ids"].shape[1]).flip(0)
    labels = inputs["input_ids"].masked_fill(place >= length[:, None], -100)
    return {**inputs, "labels": labels}


def asker(processor: Any, prompt: str | None) -> Callable[[str], str]:
    """Question -> full text, as ``VLMLocalizer`` will ask."""
    if prompt is not None:
        return lambda question: prompt.replace("{question}", question)

    def ask(question: str) -> str:
        turn = [{"type": "image"}, {"type": "text", "text": block_prompt(question)}]
        return processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)

    return ask


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """Low-rank adapters on every linear layer of the decoder."""
    from peft import LoraConfig, get_peft_model

    decoder = family_of(model).language_model(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    names = [f"{prefix}.{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))


def train(
    model: nn.Module, batches: Iterator[dict[str, Tensor]], steps: int, rate: float, minutes: float = math.inf
) -> list[float]:
    """AdamW with a linear warm-up and decay; the loss of every step."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses, start = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0), [], time.process_time()
    model.train()
    for step in tqdm(range(steps), "training", disable=None):
        done = max(step / steps, (time.process_time() - start) / (60 * minutes))
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, 1 - done)
        batch = {name: value.to(model.device) for name, value in next(batches).items()}
        batch = {name: v.to(model.dtype) if v.is_floating_point() else v for name, v in batch.items()}
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step} loss {losses[-1]:.3f} {time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
    model.eval()
    return losses


def report(find: VLMLocalizer, records: list[Record]) -> str:
    """How good its regions are, beside what the blocks allow."""
    same, held, area, best, failed = [], [], [], [], []
    for image, question, boxes in records:
        region, true = find(image, question), Region.from_blocks(*to_blocks(boxes))
        same.append(region.boxes == true.boxes)
        held.append(region.union(true).area <= region.area + 1e-6)
        area.append(region.area)
        best.append(true.area)
        failed.append(region.is_whole and not true.is_whole)
    return (f"{len(records)} questions: exact blocks {mean(same):.3f}, holds all {mean(held):.3f}, area {mean(area):.3f} "
            f"(true blocks {mean(best):.3f}), whole image instead {mean(failed):.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training.localizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=EMBEDDED, help="embedded, a folder or a hub name")
    parser.add_argument("--records", type=Path, help="JSON lines to train on (default: rendered pictures)")
    parser.add_argument("--dev", type=Path, help="JSON lines to report on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--prompt", help="question with {question} and the image placeholder (default: the chat template)"
    )
    parser.add_argument("--answer", help="form of the answer (default: [{0}, {1}, {2}, {3}])")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank only (needs peft)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, help="learning rate (default: 1e-3 embedded, 2e-4 LoRA, 2e-5 else)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of CPU time in training at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if (options.records is None) != (options.dev is None):
        parser.error("--records must come with --dev")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    loaded = load(options.model, options.device, "auto")
    model, processor = loaded.model, loaded.processor
    form = FORMS[EMBEDDED if options.model == EMBEDDED else "other"]
    prompt, answer = options.prompt or form[0], options.answer or form[1]
    rate = options.rate or (1e-3 if options.model == EMBEDDED else 2e-4 if options.lora else 2e-5)
    if options.records:
        known, dev = list(read_jsonl(options.records)), list(open_all(read_jsonl(options.dev)))
        rng = random.Random(0)
        endless: Iterator[Record] = open_all(rng.choice(known) for _ in itertools.count())
    else:
        endless = open_all(rendered(SEEDS["train"], 10**6, 4))
        dev = list(open_all(rendered(SEEDS["fit"], 40, 3)))
    if options.lora:
        model = with_lora(model, options.lora)
    else:
        adapter = family_of(model)
        adapter.vision_tower(adapter.base(model)).requires_grad_(False)
    ask = asker(processor, prompt)
    batches = (
        collate(processor, ask, answer, list(itertools.islice(endless, options.batch))) for _ in itertools.count()
    )
    train(model, batches, options.steps, rate, options.minutes)
    if options.lora:
        model = model.merge_and_unload()
    model.config.crop_localizer_prompt = prompt
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(header())
    print(report(VLMLocalizer.load(options.out, options.device), dev))


if __name__ == "__main__":
    main()
