"""Time of one question under every contender, interleaved, localizer included."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

import torch
from tqdm import tqdm

from bench.accuracy.contenders import Job
from bench.accuracy.data import Item
from bench.accuracy.run import region_of, seen
from crop.cli.ask import Asker
from crop.localizers import BoxLocalizer, Localizer


@torch.no_grad()
def measure(
    asker: Asker, jobs: Sequence[Job], items: Sequence[Item], localizer: Localizer, *, rounds: int, max_new_tokens: int
) -> dict[str, dict[str, float]]:
    """Milliseconds per question at batch 1, by job.

    In a round every contender answers the same question once, one after another, so that a busy machine slows all
    alike; a round's times are set in relation to the unpruned one of the same round.

    Args:
        rounds: timed rounds after an untimed one; the questions take turns.
    Returns:
        job -> {"ms": median, "localizer_ms": part of it, what is done to the picture included, "ratio": median of time over unpruned time}.
    """
    total: dict[str, list[float]] = defaultdict(list)
    located: dict[str, list[float]] = defaultdict(list)
    for turn in tqdm(range(rounds + 1), "timing", disable=None):
        item = items[turn % len(items)]
        for job in jobs:
            image, source, start = item.picture(), job.contender.region, time.perf_counter()
            prepared = job.contender.prepare is not None
            if source == "predicted" and not prepared:
                finder: Localizer = localizer
            else:
                known = {item.key: localizer(image, item.question)} if source == "predicted" else {}
                finder = BoxLocalizer(region_of(job, item, known))
                image = seen(asker, job, item, finder.region)
            before = time.perf_counter() - start if prepared else 0.0
            answer = asker.ask(image, item.question, method=job.method, localizer=finder, max_new_tokens=max_new_tokens)
            if turn:
                total[job.key].append(before + answer.seconds["total"])
                located[job.key].append(before + answer.seconds["localizer"])
    base = total[jobs[0].key]
    return {
        job.key: {
            "ms": round(1e3 * median(total[job.key]), 2),
            "localizer_ms": round(1e3 * median(located[job.key]), 2),
            "ratio": round(median(one / other for one, other in zip(total[job.key], base, strict=True)), 4),
        }
        for job in jobs
    }
