"""Who runs: the model as it is, FastV in its usual form, and ours with and without kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import crop
from bench.latency.e2e.clock import Clock
from bench.latency.e2e.compiled import running
from bench.latency.e2e.fastv import fastv
from bench.latency.e2e.workload import Workload
from bench.methods import ours
from crop.ops import use_backend

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit, for fused arithmetic
CUT = 2  # decoder layer at whose input tokens leave


@dataclass(frozen=True)
class Contender:
    """One way to answer.

    Args:
        name: of the table.
        method: ours; None: "unpatched" or "FastV".
        keep: fraction of the vision tokens that reach the last layer.
        twins: plain torch in the place of the kernels. compiled: decoder layers run compiled in the prefill.
    """

    name: str
    method: crop.Method | None = None
    keep: float = 1.0
    twins: bool = False
    compiled: bool = False

    @property
    def ours(self) -> bool:
        return self.method is not None


def contenders(keep: float, twins: bool = True, compiled: bool = False) -> list[Contender]:
    """All of one budget, the unpatched model first, compiled ones last."""
    found = [Contender("unpatched"), Contender("FastV, eager layer", keep=keep)]
    for name, method in ours(keep).items():
        found.append(Contender(name, method, keep))
        found += [Contender(f"{name}, no kernels", method, keep, True)] if twins else []
    if compiled:
        eager = [one for one in found if one.name in ("unpatched", "both")]
        found += [replace(one, name=f"{one.name}, compiled", compiled=True) for one in eager]
    return found


@dataclass
class Answer:
    """What a run came to.

    Args:
        logits: (batch, vocabulary) of the first token.
        tokens: vision tokens per picture that reached the last layer.
        kv_bytes: of the cache after the prefill.
        first: seconds to the first token. per_token: seconds per further one, None if none was asked for.
        parts: seconds by ``clock.PARTS``; own: of ours, score + select + compact.
    """

    logits: Tensor
    tokens: list[int]
    kv_bytes: int
    first: float = 0.0
    per_token: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    own: float = 0.0


@torch.no_grad()
def answer(
    who: Contender,
    work: Workload,
    localizer: Callable[[], None] | None,
    clock: Clock,
    timer: Callable[[], float],
    decode: int = 0,
) -> Answer:
    """Localize (ours), prefill, decode.

    Args:
        who, work: see there. localizer: see ``localize.make``.
        clock: its hooks are on the model.
        timer: the time in seconds, once the device has done what it was told.
        decode: tokens after the first.
    """
    model = work.model.model
    clock.marks.clear()
    with use_backend("twin") if who.twins else nullcontext(), ExitStack() as stack:
        start = timer()
        if who.ours and localizer is not None:
            stack.enter_context(crop.cache_vision(model))
            clock.enter("localizer")
            clock.note("start")
            with running(False):
                localizer()
            clock.note("stop")
        clock.enter("prefill")
        stats = stack.enter_context(_pruning(who, work))
        with running(who.compiled):
            output = model(**work.inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        clock.note("stop")
        clock.enter("")
        first = timer() - start
        found = Answer(output.logits[:, -1].float().cpu(), _tokens(who, stats, work), _kv_bytes(output), first)
        start = timer()
        for _ in range(decode):
            with running(False):
                output = model(input_ids=token, past_key_values=output.past_key_values)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
        found.per_token = (timer() - start) / decode if decode else None
        found.parts = clock.split()
        found.own = stats.seconds.get("ilp", 0.0) if who.ours else 0.0
    return found


@contextmanager
def _pruning(who: Contender, work: Workload) -> Iterator[Any]:
    if who.method is not None:
        with crop.patch(work.model.model, who.method, work.regions, **work.where) as stats:
            yield stats
    elif who.name.startswith("FastV"):
        with fastv(work, who.keep) as stats:
            yield stats
    else:
        yield None


def _tokens(who: Contender, stats: Any, work: Workload) -> list[int]:
    if who.ours:
        return list(stats.tokens_after_ilp)
    full = work.model.geometry.tokens if stats is None else stats.kept.shape[1]
    return [full] * len(work.regions)


def _kv_bytes(output: Any) -> int:
    layers = output.past_key_values.layers
    return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


def verify(who: Contender, found: Answer, plain: Answer | None, work: Workload) -> str:
    """Why a run is not what was planned; "" if it is. plain: of the unpatched model; of the same method for a compiled one."""
    wanted = [max(1, round(who.keep * work.model.geometry.tokens))] * len(work.regions)
    if found.tokens != wanted:
        return f"must keep {wanted}, got {found.tokens}"
    if not bool(torch.isfinite(found.logits).all()):
        return "logits must be finite"
    far = 0.0 if plain is None else float((found.logits - plain.logits).abs().max())
    if plain is not None and who.compiled:
        most = CLOSE[work.model.model.dtype] * float(plain.logits.abs().max())
        return "" if far <= most else f"compiled layers must give the eager logits up to {most:.2g}, got {far:.2g} off"
    if plain is not None and who.keep == 1.0 and not torch.equal(found.logits, plain.logits):
        return f"keep-all must be the unpatched model's output, bit for bit, got {far:.2g} off"
    return ""
