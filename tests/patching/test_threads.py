"""Many runs of two to eight threads in one block: each answer is that of a call alone, or the error is; none is lost."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from crop.methods import InnerLLMPruning
from crop.patching.patch import patch
from tests.support.batches import standard_batch
from tests.support.cases import METHODS, get_model, greedy
from tests.support.tiny_families import THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = 10  # per family


def ask(model: Any, batch: Any, beams: int, wrong: bool) -> Any:
    """Tokens and logits; what a call with too short a mask says, if `wrong`."""
    if wrong:
        batch = type(batch)(batch.family, batch.samples, dict(batch.inputs), batch.offsets)
        batch.inputs["attention_mask"] = batch.inputs["attention_mask"][:, :-1]
    try:
        out = greedy(model, batch, 2, num_beams=beams)
    except (ValueError, IndexError) as error:  # ours, or that of a family which looks at the mask before
        if not wrong:
            raise
        return str(error)
    return out.sequences.tolist(), [logits.tolist() for logits in out.logits]


def run(family: str, number: int) -> list[tuple[int, int, str]]:
    """(run, thread, what went wrong) of one run; empty: all is well."""
    draw = random.Random(number)
    model, method = get_model(family), METHODS[draw.choice(("plc", "budget", "compose"))]
    calls = [
        (standard_batch(family, "left", draw.choice((1, 2))), draw.choice((1, 1, 2)), draw.random() < 0.15)
        for _ in range(draw.randint(2, 8))
    ]
    with patch(model, method) as alone:
        wanted = [ask(model, *call) for call in calls]
    found: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def work(place: int) -> None:
        start.wait()
        try:
            found[place] = ask(model, *calls[place])
        except BaseException as error:  # noqa: BLE001, one in a thread would be lost
            found[place] = error

    with patch(model, method) as stats:
        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    bad = [(number, place, repr(one)[:80]) for place, one in enumerate(found) if one != wanted[place]]
    kept = [sorted(str(entry.kept) for entry in one.prefills) for one in (alone, stats)]
    return bad + ([] if kept[0] == kept[1] else [(number, -1, "statistics")])


@pytest.mark.parametrize("family", THOROUGH)
def test_runs_of_many_threads(family: str) -> None:
    assert [fault for number in range(RUNS) for fault in run(family, number)] == []


def test_a_wrong_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: threads of another method answer otherwise."""
    methods, block = iter((InnerLLMPruning(0.5, layer=2), InnerLLMPruning(0.25, layer=2))), patch
    monkeypatch.setattr("tests.patching.test_threads.patch", lambda model, _: block(model, next(methods)))
    assert run("llava", 0)
