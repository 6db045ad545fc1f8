"""How a model is used inside a block, one function per way of the table in `ways.py`, and what comes out."""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import disk_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.generation.streamers import BaseStreamer

from tests.support.batches import Batch
from tests.support.cases import ATOL, as_argument, greedy, next_turn
from tests.support.families.entry import NUM_LAYERS, text_tokens
from tests.support.tiny_families import FAMILIES, build_model, decoder_of

STEPS = 2
LABELS = 3  # the last tokens of a prompt
QUESTION = text_tokens(4, 9)
Block = Callable[[Any], AbstractContextManager]  # of a model


@dataclass(frozen=True)
class Row:
    """One sequence that came out.

    Attributes:
        sample: of the batch. tokens: generated, after what was `said` since the prompt.
        logits: (tokens, vocab) behind each; None: only their `score` is known, the mean log-probability.
    """

    sample: int
    tokens: list[int]
    logits: Tensor | None = None
    score: float | None = None
    said: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trained:
    """What training comes to: the loss over the last `LABELS` tokens of every prompt, and gradients by name."""

    loss: float
    gradients: dict[str, Tensor]


Use = Callable[[Any, Batch, Block], "list[Row] | Trained | None"]


# ---------------------------------------------------------------------------------------------------- generate()
def rows_of(batch: Batch, out: Any, length: int, said: list[tuple[int, ...]] | None = None) -> list[Row]:
    """Rows of what `greedy` and its kin return; `length` of the ids that were given."""
    copies = len(out.sequences) // len(batch.samples)
    tokens = out.sequences[:, length:].tolist()
    scores = getattr(out, "sequences_scores", None)
    found = []
    for number, mine in enumerate(tokens):
        logits = None if scores is not None else torch.stack([step[number] for step in out.logits])
        score = None if scores is None else float(scores[number])
        found.append(Row(number // copies, mine, logits, score, () if said is None else said[number // copies]))
    return found


def generate(**options: Any) -> Use:
    """generate() with these options."""

    def use(model: Any, batch: Batch, block: Block) -> list[Row]:
        torch.manual_seed(0)
        given = {name: value(model) if callable(value) else value for name, value in options.items()}
        with block(model):
            out = greedy(model, batch, STEPS, **given)
        return rows_of(batch, out, batch.inputs["input_ids"].shape[1])

    return use


def guided(model: Any, batch: Batch, block: Block) -> list[Row]:
    """Between two steps a logits processor asks the same model about the text alone, on a cache of its own."""
    scale, length = 1.5, batch.inputs["input_ids"].shape[1]
    with block(model):
        out = greedy(model, batch, STEPS, guidance_scale=scale, output_scores=True)
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        text = model(out.sequences[:, length - 1 : length + step]).logits[:, -1].log_softmax(-1)
        torch.testing.assert_close(scores, text + scale * (logits.log_softmax(-1) - text), atol=10 * ATOL, rtol=0)
    return rows_of(batch, out, length)


def given_cache(make: Callable[[Any], Any]) -> Use:
    """generate() on a cache object."""

    def use(model: Any, batch: Batch, block: Block) -> list[Row]:
        with block(model):
            out = greedy(model, batch, STEPS, **as_argument(model, make(model.config.get_text_config())))
        return rows_of(batch, out, batch.inputs["input_ids"].shape[1])

    return use


def behind_a_text(model: Any, batch: Batch, block: Block) -> list[Row]:
    """The first tokens of the prompt, as a system prompt, are in a cache already."""
    ids = batch.inputs["input_ids"]
    with block(model):
        cache = model(ids[:, :3], use_cache=True).past_key_values
        out = greedy(model, batch, STEPS, **as_argument(model, copy.deepcopy(cache)))
    return rows_of(batch, out, ids.shape[1])


def continued(blocks: int, change: Callable[[Any], Any] = lambda cache: cache) -> Use:
    """A question to the cache of a first answer, in the same block or another one."""

    def use(model: Any, batch: Batch, block: Block) -> list[Row]:
        with block(model):
            out = greedy(model, batch, STEPS)
            if blocks == 1:
                again = next_turn(model, batch, out, QUESTION, STEPS)
        if blocks == 2:
            with block(model):
                again = next_turn(model, batch, out, QUESTION, STEPS)
        said = [(*row.tokens, *QUESTION) for row in rows_of(batch, out, batch.inputs["input_ids"].shape[1])]
        return rows_of(batch, again, out.sequences.shape[1] + len(QUESTION), said)

    return use


def on_embeddings(model: Any, batch: Batch, block: Block) -> list[Row]:
    inputs = dict(batch.inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with block(model):
        out = greedy(model, Batch(batch.family, batch.samples, inputs), STEPS, inputs_embeds=embeds)
    return rows_of(batch, out, 0)


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[int] = []

    def put(self, value: Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        pass


def streamed(model: Any, batch: Batch, block: Block) -> list[Row]:
    """The block in one thread, generate() in another, as with TextIteratorStreamer."""
    listener, outs = Listener(), []
    with block(model):
        thread = threading.Thread(target=lambda: outs.append(greedy(model, batch, STEPS, streamer=listener)))
        thread.start()
        thread.join()
    assert listener.heard == outs[0].sequences[0].tolist()
    return rows_of(batch, outs[0], batch.inputs["input_ids"].shape[1])


def in_inference_mode(model: Any, batch: Batch, block: Block) -> list[Row]:
    with torch.inference_mode():
        return generate()(model, batch, block)


def continuous(model: Any, batch: Batch, block: Block) -> None:
    with block(model):
        model.generate_batch([[5, 6, 7]])


def asking_for(name: str) -> Use:
    """A prefill that is to return more."""

    def use(model: Any, batch: Batch, block: Block) -> None:
        with block(model):
            model(**batch.inputs, **{name: True})

    return use


# ------------------------------------------------------------------------------------------- models as people have them
def offloaded(model: Any, batch: Batch, block: Block) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        disk_offload(model, folder, execution_device="cpu")
        return generate()(model, batch, block)


def compiled(model: Any, batch: Batch, block: Block) -> list[Row]:
    """Prefill by compiled layers."""
    torch._dynamo.reset()
    for layer in decoder_of(batch.family, model).layers:
        layer.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=64), block(model):
        last = model(**batch.inputs, logits_to_keep=1).logits
    torch._dynamo.reset()
    return [Row(number, [int(logits.argmax())], logits) for number, logits in enumerate(last)]


def adapted(family: str) -> Any:
    """With adapters that change nothing yet."""
    decoder = decoder_of(family, model := build_model(family))
    names = [name for name, part in decoder.layers.named_modules() if isinstance(part, torch.nn.Linear)]
    leaves = {name.rpartition(".")[2] for name in names if "proj" in name and "attn" in name}
    return get_peft_model(model, LoraConfig(r=2, target_modules=sorted(leaves))).eval()


def prompt_tuned(family: str) -> Any:
    heads = dict(num_layers=NUM_LAYERS, token_dim=32, num_attention_heads=4, num_transformer_submodules=1)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **heads)
    return get_peft_model(build_model(family), config).eval()


def copied(model: Any, batch: Batch, block: Block) -> list[Row]:
    return generate()(copy.deepcopy(model), batch, block)


def copied_inside(model: Any, batch: Batch, block: Block) -> None:
    with block(model):
        copy.deepcopy(model)


def saved(model: Any, batch: Batch, block: Block) -> list[Row]:
    """save_pretrained inside the block, and what was saved asked in a block of its own."""
    with tempfile.TemporaryDirectory() as folder:
        with block(model):
            model.save_pretrained(folder)
        other = type(model).from_pretrained(folder, attn_implementation="sdpa").eval()
    other.model.get_submodule(FAMILIES[batch.family].tower).set_attn_implementation("eager")
    return generate()(other, batch, block)


def saved_whole(model: Any, batch: Batch, block: Block) -> None:
    with tempfile.TemporaryFile() as file, block(model):
        torch.save(model, file)


# ------------------------------------------------------------------------------------------------------------ training
def trainable(family: str) -> Any:
    return build_model(family).requires_grad_(True).train()


def labelled(batch: Batch) -> dict[str, Tensor]:
    """Inputs and labels."""
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    for row, sample in enumerate(batch.samples):
        end = batch.offsets[row] + len(sample.ids)
        labels[row, end - LABELS : end] = torch.tensor(sample.ids[-LABELS:])
    return {**batch.inputs, "labels": labels}


def step(checkpointing: bool = False) -> Use:
    """Forward and backward."""

    def use(model: Any, batch: Batch, block: Block) -> Trained:
        if checkpointing:
            model.gradient_checkpointing_enable()
        with block(model):
            loss = model(**labelled(batch)).loss
        loss.backward()  # also after the block
        return Trained(float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})

    return use


def trainer(model: Any, batch: Batch, block: Block) -> Trained:
    """transformers' Trainer inside a block: an evaluation, and a step of gradient descent that it saves."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=1, max_grad_norm=0.0, lr_scheduler_type="constant",
            save_steps=1, logging_steps=1, remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        with block(model):
            work = Trainer(
                model, arguments, lambda _: labelled(batch), train_dataset=[0], eval_dataset=[0],
                optimizers=(optimizer, None),
            )  # fmt: skip
            evaluated = work.evaluate()["eval_loss"]
            loss = work.train().training_loss
        saved = type(model).from_pretrained(f"{folder}/checkpoint-1")
    after = dict(model.named_parameters())
    assert all(torch.equal(parameter, after[name]) for name, parameter in saved.named_parameters())
    assert abs(evaluated - loss) < ATOL
    return Trained(loss, {name: old - after[name].detach() for name, old in before.items()})
