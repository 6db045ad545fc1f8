"""One row: a workload and a budget, all contenders checked, their memory taken, then timed in turns."""

from __future__ import annotations

import gc
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import crop
from bench.latency.e2e import localize
from bench.latency.e2e.clock import PARTS, clocked
from bench.latency.e2e.contenders import CUT, Answer, Contender, answer, contenders, verify
from bench.latency.e2e.fastv import NotPlain
from bench.latency.e2e.memory import peak
from bench.latency.e2e.workload import Workload
from crop.selftest.timing import timing

NO_ROOM = (torch.cuda.OutOfMemoryError, MemoryError)


def measure(
    work: Workload,
    keep: float,
    localizer: str,
    *,
    rounds: int,
    seconds: float,
    decode: int,
    twins: bool = True,
    compiled: bool = False,
) -> dict[str, Any]:
    """Everything about one workload at one budget.

    Args:
        work: see there. keep: fraction of the vision tokens. localizer: as ``localize.make``.
        rounds: timed rounds, contenders in turns; fewer, but at least two, where they would take more than ``seconds``.
        decode: tokens after the first.
        twins: also run ours in plain torch. compiled: also run unpatched and both with the model's compiled layers.
    Returns:
        {"timed", "preprocess", "weights", "attention", "problems": what is not as planned, "contenders": {name: figures, or
        {"reason": why there are none}}}, seconds and bytes. Ours is timed with the localizer in front, whose share is a part.
        A problem costs no figure: whoever reads decides.
    """
    device = work.model.model.device
    find = localize.make(localizer, work)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[Contender, list[Answer]] = {}
    with clocked(work.model, CUT) as clock:

        def run(who: Contender, tokens: int = 0) -> Answer:
            return answer(who, work, find, clock, _timer(device), tokens)

        plain: Answer | None = None
        eager: dict[crop.Method | None, Answer] = {}
        one_round, problems = 0.0, []

        def check(who: Contender, found: Answer) -> None:
            if problem := verify(who, found, eager.get(who.method) if who.compiled else plain, work):
                problems.append(f"{who.name}: {problem}")

        for who in contenders(keep, twins, compiled):
            try:
                found = run(who)
                start = time.perf_counter()
                memory = peak(lambda who=who: run(who), device)
            except (*NO_ROOM, NotPlain) as error:
                rows[who.name] = {"reason": _reason(error)}
                _clear(device)
                continue
            one_round += time.perf_counter() - start
            if who.name == "unpatched":
                plain, everything = found, Contender("keep all", crop.InnerLLMPruning(1.0))
                check(everything, run(everything))
            check(who, found)
            eager.setdefault(who.method, found)
            rows[who.name] = {"tokens": found.tokens[0], "kv_bytes": found.kv_bytes, "memory": memory}
            runs[who] = []
        timed = min(rounds, max(2, int(seconds / max(one_round, 1e-9))))
        for who in runs:
            run(who, decode)  # cuDNN plans anew for every length of the cache
        for _ in range(timed):
            for who, answers in runs.items():
                answers.append(run(who, decode))
    for who, answers in runs.items():
        rows[who.name] |= _figures(answers)
    _predict(work, runs, rows)
    return {
        "timed": timed,
        "preprocess": work.preprocess,
        "weights": work.model.weights,
        "attention": _attention(work) if plain is not None else None,
        "problems": problems,
        "contenders": rows,
    }


def _figures(answers: Sequence[Answer]) -> dict[str, Any]:
    first = timing([one.first for one in answers])
    median = {part: timing([one.parts[part] for one in answers]).median for part in PARTS}
    decode = [one.per_token for one in answers if one.per_token is not None]
    return {
        "first": first.median,
        "first_p10": first.p10,
        "first_p90": first.p90,
        "parts": median,
        "select": timing([one.own for one in answers]).median,
        "per_token": timing(decode).median if decode else None,
    }


def _predict(work: Workload, runs: Sequence[Contender], rows: dict[str, dict[str, Any]]) -> None:
    """FLOPs of the decoder, the time they ask for in proportion, and what the advice says.

    The ideal of a contender is the unpatched model's time with the share of its decoder layers scaled by FLOPs; FastV's
    attention matrix is not counted.
    """
    plain = rows["unpatched"]
    for who in runs:
        row, method = rows[who.name], who.method
        if method is None:
            method = crop.InnerLLMPruning(who.keep, rows="last", layer=CUT)
        regions = work.regions if who.ours else None
        found = crop.estimate(
            work.model.model, work.inputs, method, regions, **work.where, localizer_seconds=row["parts"]["localizer"]
        )
        row["flops"] = found.after.decoder_flops if who.keep < 1 else found.before.decoder_flops
        row["advice"] = found.prune if who.ours else None
        if "first" in plain:
            layers = plain["parts"]["before"] + plain["parts"]["after"]
            row["ideal"] = plain["first"] - layers * (1 - row["flops"] / found.before.decoder_flops)


class _Kernels(TorchDispatchMode):
    """Counts the fused attention operators that torch runs, by the name of their kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = re.match(r"aten\._scaled_dot_product_(\w+?)_attention", str(func))
        if name:
            self.found[name[1]] += 1
        return func(*args, **kwargs or {})


def _attention(work: Workload) -> dict[str, int]:
    """How many attentions of the unpatched model torch gives to which kernels: flash, cudnn, efficient, ..."""
    with _Kernels() as kernels, torch.no_grad():
        work.model.model(**work.inputs, logits_to_keep=1)
    return dict(kernels.found)


def _timer(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def _reason(error: BaseException) -> str:
    return f"does not fit: {str(error).splitlines()[0]}" if isinstance(error, NO_ROOM) else str(error)


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
