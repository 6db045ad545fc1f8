"""`crop check`: every family passes, and what is wrong, slow, missing or refused is said and decides the exit status."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from crop import embedded, ops
from crop.cli import check, main
from crop.cli.ask import Asker
from crop.embedded import scenes
from crop.methods import PreLLMCompression
from crop.ops import dispatch
from crop.patching.patch import patch
from crop.selftest import check as selftest
from crop.selftest.check import check_kernels, check_operators
from tests.support.cases import families, get_model
from tests.support.localizing import StandIn
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import build_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def found(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, str]]:
    """Subject -> status and detail, of a model whose stand-in for a processor knows one size of picture."""
    picture = asker.processor.picture
    monkeypatch.setattr(check, "LARGE", picture.size)
    return {each.subject: (each.status, each.detail) for each in check.check_model(asker, picture)}


@families()
def test_every_family_passes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_model(family)
    before, asker = snapshot(model), Asker(model, StandIn(family))
    results = found(asker, monkeypatch)
    assert {status for status, _ in results.values()} == {"ok"}, results
    assert list(results) == ["family", "processor", *check.CHECKS]
    far, effect = (float(results["pruned"][1].split(word)[0].split()[-1]) for word in (" from a", " from the unpruned"))
    assert far < 1e-5 and effect > 100 * max(far, 1e-7)
    assert_unchanged(before, model)


def test_a_pruned_run_that_is_not_the_recomputation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    without = check._without

    def other(family: Any, decoder: Any, layer: int, stays: torch.Tensor) -> Any:
        stays = stays.clone()
        stays[torch.nonzero(stays)[5]], stays[torch.nonzero(~stays)[0]] = False, True
        return without(family, decoder, layer, stays)

    monkeypatch.setattr(check, "_without", other)
    asker = Asker(get_model("llava"), StandIn("llava"))
    results = found(asker, monkeypatch)
    assert results["pruned"][0] == "WRONG" and "must be those of a recomputation" in results["pruned"][1]
    assert results["keeping all"][0] == results["cost"][0] == "ok"
    # A tolerance that is larger than what pruning does lets everything through: the effect decides then.
    monkeypatch.setitem(check.TOLERANCE, torch.float32, 10.0)
    status, detail = found(asker, monkeypatch)["pruned"]
    assert status == "missing" and detail.startswith("cannot tell: ") and "--dtype float32" in detail


@contextmanager
def prunes_all_the_same(model: Any, method: Any, region: Any, **where: Any) -> Iterator[Any]:
    """In the place of ``patch``."""
    with patch(model, PreLLMCompression(keep=0.2), region, **where) as stats:
        yield stats


def test_what_is_wrong_is_found_by_python_without_assertions() -> None:
    """``python -O`` leaves ``assert`` out, of this file, too."""
    code = """
from crop.cli import check
from crop.cli.ask import load
from crop.embedded.scenes import scene
from tests.cli.test_check import prunes_all_the_same
check.patch = prunes_all_the_same
print(__debug__, *check.CHECKS["keeping all"](load("embedded", "cpu", "auto"), scene(0).image))
"""
    ended = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=ROOT)
    if not ended.stdout.startswith("False WRONG logits must be those of the unpatched model"):
        pytest.fail(ended.stdout + ended.stderr)


def test_an_assertion_of_the_models_code_is_no_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llava")

    def refuse(*_: Any) -> None:
        raise AssertionError("heads must divide the width")

    model.lm_head.register_forward_pre_hook(refuse)
    results = found(Asker(model, StandIn("llava")), monkeypatch)
    assert results["layout"] == ("refused", "heads must divide the width") and list(results)[-1] == "layout"


def test_bits_that_change_though_all_is_kept_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build_model("llava"), []

    def later(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output + 1e-6 * (len(calls) == 3)  # the layout, the unpatched model, all kept

    model.lm_head.register_forward_hook(later)
    results = found(Asker(model, StandIn("llava")), monkeypatch)
    assert results["keeping all"][0] == "WRONG" and "of the unpatched model" in results["keeping all"][1]


def test_what_the_family_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llava_next")
    model.model.language_model.config.attn_logit_softcapping = 30.0
    results = found(Asker(model, StandIn("llava_next")), monkeypatch)
    assert results["layout"][0] == "refused" and "attn_logit_softcapping must be None" in results["layout"][1]
    assert list(results)[-1] == "layout"


# ------------------------------------------------------------------------------------------------------- operators
@pytest.mark.fast
def test_operators_and_their_twins() -> None:
    results = list(check_operators(CPU))
    assert {each.subject for each in results} >= {"attention_mass", "select", "compact", "adaptive_pool"}
    assert {each.status for each in results} == ({"ok"} if dispatch.native else {"slow"})
    assert all(each.good for each in [*results, *check_kernels()])


@pytest.mark.fast
def test_plain_torch_is_slow_but_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dispatch, selftest):
        monkeypatch.setattr(module, "native", None)
    assert {each.status for each in check_operators(CPU)} == {"slow"}
    kernels = next(check_kernels())
    assert kernels.status == "slow" and "plain torch" in kernels.detail and kernels.good


@pytest.mark.fast
def test_a_wrong_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    select = ops.select
    monkeypatch.setattr(ops, "select", lambda score, *rest, **more: select(-score, *rest, **more))
    results = {each.subject: each for each in check_operators(CPU)}
    assert results["select"].status == "WRONG" and not results["select"].good
    assert "select, B1 N576 k144: off by" in results["select"].detail
    assert results["compact"].good


@pytest.mark.fast
@pytest.mark.skipif(dispatch.native is None, reason="no kernels were compiled")
def test_a_kernel_that_is_wrong_with_one_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    native = dispatch.native.select

    def select(device: int, threads: int, score: int, weight: int, priority: int, *rest: Any) -> int:
        return native(device, threads, score, weight, 0, *rest)

    monkeypatch.setattr(dispatch.native, "select", select)
    results = {each.subject: each for each in check_operators(CPU)}
    assert results["select"].detail == "on cpu: weight, priority, index: kernel and twin are 1 apart"
    assert all(each.good for name, each in results.items() if name != "select")


@pytest.mark.fast
@pytest.mark.skipif(dispatch.native is None, reason="no kernels were compiled")
def test_kernels_built_from_another_source_are_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def compact(*_: Any) -> None:
        raise TypeError("compact(): incompatible function arguments.\nThe following are supported: ...")

    monkeypatch.setattr(dispatch.native, "compact", compact)
    assert main.main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("WRONG    compact"))
    assert line.endswith("TypeError: compact(): incompatible function arguments.")
    assert any(line.startswith("ok       select") for line in lines) and lines[-1].endswith(
        "wrong or refused, see above"
    )


# -------------------------------------------------------------------------------------------------------- packages
@pytest.mark.fast
def test_missing_extras_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch", 'torchvision; extra == "vision"', 'pillow>=9; extra == "demo"', 'pytest; extra == "test"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(check, "_installed", lambda name: name != "torchvision")
    results = {each.subject: (each.status, each.detail) for each in check.check_packages()}
    assert results["extra vision"] == ("missing", 'without torchvision: pip install "crop-vlm[vision]"')
    assert results["extra demo"] == ("ok", "pillow") and "extra test" not in results
    assert results["transformers"][0] == "ok"


# --------------------------------------------------------------------------------------------------------- command
def test_the_command_on_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["check"]) == 0
    out = capsys.readouterr().out
    assert "keeping all" in out and "the bits of the unpatched model" in out and out.endswith("all is right\n")


@pytest.mark.parametrize(
    ("model", "reason"), [("/no/such/folder", "must be an existing folder"), ("bert", "must be of a family among")]
)
def test_a_checkpoint_that_is_refused(model: str, reason: str, tmp_path: Any, capsys: Any) -> None:
    if model == "bert":
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        model = str(tmp_path)
    assert main.main(["check", "--model", model]) == 1
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("refused"))
    assert reason in line and out.endswith("1 wrong or refused, see above\n")


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model as a checkpoint whose template can think: it asks something else then."""
    folder = shutil.copytree(embedded.WEIGHTS, tmp_path_factory.mktemp("thinking") / "model")
    template = folder / "chat_template.jinja"
    answers = "{% if enable_thinking is defined and not enable_thinking %}" + template.read_text().strip()
    template.write_text(answers + "{% else %}<image> what kind of picture is this ?{% endif %}")
    return str(folder)


def test_a_checkpoint_that_can_think(thinking: str, tmp_path: Any, capsys: Any) -> None:
    assert main.main(["check", "--model", thinking]) == 0
    assert "LlavaProcessor, with a chat template; thinking is switched off" in capsys.readouterr().out
    [(drawn, question)] = scenes.examples(1)
    drawn.image.save(tmp_path / "scene.png")
    words = ["ask", str(tmp_path / "scene.png"), question.text, "--localizer", "attention", "--keep", "0.5", "--json"]
    answers = []
    for model in (thinking, "embedded"):
        assert main.main([*words, "--model", model]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1] != drawn.picture and question.kind == "color"  # one word: no characters to join
