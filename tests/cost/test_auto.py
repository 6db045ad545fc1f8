"""``patch(auto=True)``: a prefill that cannot pay leaves the model to itself, and bad input is refused all the same."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import crop
from crop.cost.estimate import Speed
from crop.models import ADAPTERS
from tests.support import zoo
from tests.support.contract import METHODS, assert_unchanged, patched, regions_of, snapshot
from tests.support.tiny_models import build_model, standard_batch
from tests.support.zoo import cases

module = sys.modules["crop.cost.estimate"]  # its name in the package is the function
FREE = dict(attention=0.0, hook=0.0, call=0.0, image=0.0, step=0.0)
PAYS = Speed(**FREE | dict(matrices=(1.0, 4.0, 16.0, 64.0)))  # in proportion to the tokens
SPEEDS = {  # what makes a prefill fall through, and where that shows
    "by its length": Speed(**FREE | dict(matrices=(1e-6,) * 4, hook=1.0)),
    "at a glance": Speed(**FREE | dict(matrices=(1.0,) * 4)),
    "once planned": PAYS,
}
METHOD = METHODS["ilp_budget"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def prompt(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return build_model(request.param, "sdpa"), standard_batch(request.param, "single", 1)


def dismiss(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(module, "measure_speed", lambda *_: SPEEDS[how])
    if how == "once planned":
        monkeypatch.setattr("crop.patching.hooks.entry.compare", lambda *given: nothing_saved(module.compare(*given)))


def nothing_saved(found: crop.Estimate) -> crop.Estimate:
    return crop.Estimate(found.before, found.before, False, "do not prune")


def calls_of_ours(run: Callable[[], Any]) -> Counter[str]:
    """How often ``run`` calls each function of the package."""
    package, found = str(Path(crop.__file__).parent), Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            found[frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("how", SPEEDS)
def test_after_a_dismissal_the_model_runs_alone(
    prompt: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Only the entrance sees later steps go by; a prefill that pays is still pruned, as in a block of its own."""
    model, batch = prompt
    inputs = batch.inputs
    steps = [torch.tensor([[token]]) for token in (5, 6, 7)]

    def answer() -> tuple[list[torch.Tensor], Counter[str]]:
        out = model(**inputs, use_cache=True)
        logits = [out.logits]

        def decode() -> None:
            for token in steps:
                logits.append(model(input_ids=token, past_key_values=out.past_key_values).logits)

        called = calls_of_ours(decode)
        return logits, called

    with torch.no_grad():
        plain, nobody = answer()
        before = snapshot(model)
        with patched(model, METHOD, regions_of(batch)) as alone:
            pruned = model(**inputs).logits
        with monkeypatch.context() as slow:
            dismiss(slow, how)
            with patched(model, METHOD, regions_of(batch), auto=True) as stats:
                left, called = answer()
                assert stats.tokens_after_ilp == stats.tokens_before and not stats.estimate.prune
                assert not nobody and called.pop("_enter") == len(steps)
                assert set(called) <= {"brings_images", "cache_of", "is_pruned"}
                assert all(torch.equal(mine, own) for mine, own in zip(left, plain, strict=True))
                slow.undo()
                monkeypatch.setattr(module, "measure_speed", lambda *_: PAYS)
                assert torch.equal(model(**inputs).logits, pruned)
                assert stats.tokens_after_ilp == alone.tokens_after_ilp < stats.tokens_before and stats.estimate.prune
        assert_unchanged(before, model)


def test_a_call_that_was_there_first_stays_alone(prompt: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread's call was left alone and is still running when another's opens the doors."""
    model, batch = prompt
    inside, go_on, found = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        if not inside.is_set():
            inside.set()
            assert go_on.wait(60)

    def first() -> None:
        with torch.no_grad():
            found.append(model(**batch.inputs).logits)

    def let_go(*_: Any) -> None:
        if threading.current_thread() is not thread:
            go_on.set()
            thread.join()

    with torch.no_grad():
        plain = model(**batch.inputs).logits
        with patched(model, METHOD, regions_of(batch)):
            pruned = model(**batch.inputs).logits
        for where in (model.model.get_input_embeddings(), model.model.language_model.layers[1]):
            inside.clear(), go_on.clear()
            handle = where.register_forward_pre_hook(wait)
            monkeypatch.setattr(module, "measure_speed", lambda *_: SPEEDS["by its length"])
            with patched(model, METHOD, regions_of(batch), auto=True):
                thread = threading.Thread(target=first)
                thread.start()
                assert inside.wait(60)
                monkeypatch.setattr(module, "measure_speed", lambda *_: PAYS)
                release = model.model.language_model.layers[2].register_forward_pre_hook(let_go)
                second = model(**batch.inputs).logits
                release.remove(), handle.remove()
            assert torch.equal(second, pruned) and torch.equal(found.pop(), plain)


@pytest.mark.parametrize("family", sorted(ADAPTERS))
def test_number_of_regions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that tell from shapes how many images there are refuse what does not fit before the model runs."""
    model, batch = zoo.build_model(family), zoo.standard_batch(family, "left", 1)
    regions = [crop.Region.box(0, 0, 0.5, 0.5)] * 3
    monkeypatch.setattr(module, "measure_speed", lambda *_: SPEEDS["by its length"])
    with torch.no_grad(), cases.patched(model, METHOD, batch, regions, auto=True) as stats:
        if ADAPTERS[family].each:
            tower = ADAPTERS[family].vision_tower(model.model)
            tower.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
            with pytest.raises(ValueError, match="region must be given once per image, got 3 for 2 images"):
                model(**batch.inputs)
        else:
            model(**batch.inputs)
            with pytest.raises(ValueError, match="region must be given once per image, got 3 for 2 images"):
                stats.kept  # noqa: B018
