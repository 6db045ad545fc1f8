"""What the page of ``crop app`` asks and shows, without the page; see ``test_page.py`` for that."""

from __future__ import annotations

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import crop
import crop.cli.ask
from crop.cli import main as cli
from crop.cli import options
from crop.cli.app import App
from crop.embedded import LONGEST, scenes
from crop.localizers import registry
from crop.methods.registry import by_name
from tests.cli.conftest import SCENE

pytestmark = pytest.mark.usefixtures("one_thread", "loaded_once")
QUESTION = next(question for question in SCENE.questions if question.kind == "text")
BOX = ",".join(map(str, QUESTION.boxes[0]))


@pytest.fixture(scope="module")
def app(loaded_once) -> App:
    return App(crop.cli.ask.load("embedded", "cpu", "auto"), max_new_tokens=LONGEST)


@pytest.mark.fast
def test_both_answers_the_overlay_and_the_numbers(app, image):
    pruned, plain, seen, numbers = app.answer(image, QUESTION.text, "head", "", "crop", 11)
    ways = (by_name("crop", 0.11), app.localizers["head"]), (None, app.localizers["whole"])
    given = dict(max_new_tokens=LONGEST)
    asked = [app.asker.ask(SCENE.image, QUESTION.text, method=method, localizer=find, **given) for method, find in ways]
    assert [pruned, plain] == [answer.text for answer in asked]
    assert seen.width == 448 and seen.height > 448  # with its legend
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in numbers.splitlines() if "|" in line]
    assert rows[2] == ["vision tokens", "576", "576"] and rows[4] == ["that reach its last layer", "63", "576"]
    stages = {row[0]: row[1:] for row in rows[5:]}
    assert list(stages)[1] == "localizer" and list(stages)[-1] == "**total**" and len(stages) == 7
    assert all(cell.strip("*").endswith(" ms") for row in stages.values() for cell in row)
    assert "localizer included" in numbers and "by head" in numbers


def test_a_box_that_was_drawn_is_the_region(app, image):
    asked = []
    for box in (BOX, " px:0,0,192,96"):
        *_, numbers = app.answer(image, QUESTION.text, "box", box, "plc", 25)
        asked.append(numbers.splitlines()[-1])
    assert (
        asked[0].startswith("region " + ",".join(f"{value:.3f}" for value in QUESTION.boxes[0]))
        and "by box" in asked[0]
    )
    assert asked[1].startswith("region 0.000,0.000,0.500,0.250")


def test_a_reason_is_told(app, image, monkeypatch):
    monkeypatch.setitem(app.localizers, "unsure", lambda *_: crop.Region.whole(0.2, "nothing found"))
    *_, numbers = app.answer(image, QUESTION.text, "unsure", "", "crop", 11)
    assert "whole image" in numbers and numbers.endswith("by unsure): nothing found")


REFUSED = {
    "no picture": (dict(picture=None), "There is no picture yet: drop one, or click on an example."),
    "no question": (dict(question=" "), "There is no question yet: type one."),
    "no box": (dict(localizer="box"), "There is no box yet: drag one on the picture, or choose who finds the region."),
    "three numbers": (dict(localizer="box", box="0,0,1"), "box must be four numbers X0,Y0,X1,Y1, got '0,0,1'"),
    "pixels": (dict(localizer="box", box="0,0,99,99"), "for pixels write px:0,0,99,99"),
    "no such file": (dict(picture="no.png"), "The file must be an existing file, got no.png"),
    "text": (dict(picture=__file__), "The file must be a picture, got test_app.py"),
    "nothing kept": (dict(percent=0), "keep"),
    "too much kept": (dict(percent=101), "keep"),
    "unknown localizer": (dict(localizer="magic"), "localizer must be one of "),
    "a percent in words": (dict(percent="11"), "percent must be a number in (0, 100], got '11'"),
    "yes percent": (dict(percent=True), "percent must be a number"),
    "no box at all": (dict(box=None), "box must be a text, got None"),
    "a list for a method": (dict(method=["crop"]), "method must be a text, got ['crop']"),
    "a number for a question": (dict(question=1), "question must be a text, got 1"),
    "unknown method": (dict(method="magic"), "name must be one of crop"),
}


@pytest.mark.fast
@pytest.mark.parametrize("wrong, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why(wrong, message, app, image):
    right = dict(picture=image, question="hi", localizer="whole", box="", method="crop", percent=11)
    with pytest.raises(options.REFUSED) as refused:
        app.answer(**right | wrong)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_several_at_once_get_their_own_answers(app, tmp_path):
    cases = []
    for number, (scene, question) in enumerate(scenes.examples(4)):
        scene.image.save(tmp_path / f"{number}.png")
        cases.append((str(tmp_path / f"{number}.png"), question.text, "head", "", "crop", (11, 50)[number % 2]))
    alone = [app.answer(*case) for case in cases]
    start = threading.Barrier(len(cases))

    def ask(case: tuple) -> tuple:
        torch.set_num_threads(1)
        start.wait()
        return app.answer(*case)

    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(ask, cases))
    for one, other in zip(alone, together, strict=True):
        assert one[:2] == other[:2] and one[2].tobytes() == other[2].tobytes()
    assert len({answer[2].tobytes() for answer in together}) == len(cases)


@pytest.mark.fast
def test_localizers_that_need_nothing_more_are_offered(app, monkeypatch):
    def absent(given):
        raise ImportError('needs  scales:\npip install "scales"')

    monkeypatch.setitem(registry._registered, "scales", absent)
    monkeypatch.setitem(registry._registered, "middle", lambda given: lambda *_: crop.Region.box(0.2, 0.2, 0.8, 0.8))
    found = App(app.asker)
    assert {"head", "attention", "whole", "middle"} <= found.localizers.keys()
    assert not found.localizers.keys() & {"box", "clip", "detector", "vlm", "scales"}
    assert found.missing["scales"] == 'needs scales: pip install "scales"'
    stranger = crop.cli.ask.Asker(app.asker.model, app.asker.processor, app.asker.prompt)  # no weights of a head
    assert "head" not in App(stranger).localizers and stranger.default_localizer == "attention"


@pytest.mark.fast
def test_a_missing_gradio_is_named_with_its_extra(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    with pytest.raises(SystemExit) as ended:
        cli.main(["app"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.splitlines() == ['crop app: error: crop app needs gradio: pip install "crop-vlm[app]"']


ERRORS = {
    "port": (["--port", "0"], "a port from 1 to 65535, got 0"),
    "no model": (["--model", "{tmp}/no"], "must be an existing folder"),
    "device": (["--device", "abacus"], "--device abacus cannot be used"),
    "plug-in": (["--plugin", "{tmp}/no.py"], "cannot be loaded"),
    "options of other models": (["--attn-implementation", "eager"], "loaded without attn_implementation"),
}


@pytest.mark.parametrize("words, message", ERRORS.values(), ids=ERRORS)
def test_wrong_use_ends_with_one_clear_line(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.delitem(options.NEEDED["app"], "gradio")  # all of these are found before it is used
    with pytest.raises(SystemExit) as ended:
        cli.main(["app", *(word.format(tmp=tmp_path) for word in words)])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("crop app: error: ") and message in err.splitlines()[-1]
