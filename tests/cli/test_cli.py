"""The command line, in this process."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import crop
import crop.cli.ask
import crop.localizers.coarse
from crop.cli import main as cli
from crop.cli import options
from crop.cli.ask import STAGES
from crop.embedded import scenes
from crop.geometry.region import Region
from crop.localizers.ocr.engine import PACKAGES
from tests.cli.conftest import SCENE

pytestmark = pytest.mark.usefixtures("one_thread", "loaded_once")
QUESTION = next(question for question in SCENE.questions if question.kind == "text")


def run(capsys, *words: str) -> tuple[str, str]:
    assert cli.main(list(words)) == 0
    return capsys.readouterr()


def box(region: Region) -> str:
    return ",".join(str(value) for value in region.boxes[0])


def shape(value):
    """A JSON value with every leaf replaced by its type."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value[:1]]
    return type(value).__name__


TOKENS = dict(before="int", encoded="int", after_plc="int", after_ilp="int", layer_average="float")
SECONDS = dict.fromkeys(STAGES, "float")
REGION = {"boxes": [["float"]], "confidence": "float", "area": "float", "reason": "str"}
SCHEMA = {
    "question": "str", "answer": "str", "model": "str", "device": "str", "dtype": "str", "method": "str",
    "keep": "float", "prune_encoder": "bool", "localizer": "str", "region": REGION, "images": [{"region": REGION, "tokens": TOKENS}],
    "tokens": TOKENS, "seconds": SECONDS, "overlay": "str",
    "compare": {"answer": "str", "tokens": TOKENS, "seconds": SECONDS, "speedup": "float"},
}  # fmt: skip


def test_json_schema_counts_and_times(capsys, image, tmp_path):
    out = tmp_path / "seen.png"
    words = ["ask", image, QUESTION.text, "--json", "--compare", "--overlay", str(out), "--keep", "0.2"]
    found = json.loads(run(capsys, *words)[0])
    assert shape(found) == SCHEMA
    assert found["localizer"] == "head" and found["device"] == "cpu" and found["dtype"] == "float32"
    tokens = found["tokens"]
    assert tokens["before"] == 576 and tokens["after_ilp"] == round(0.2 * 576)
    assert tokens["after_ilp"] <= tokens["after_plc"] < 576
    assert found["compare"]["tokens"]["after_ilp"] == 576
    seconds = found["seconds"]
    assert sum(seconds[stage] for stage in STAGES[:-1]) == pytest.approx(seconds["total"])
    assert seconds["localizer"] > 0 and seconds["decode"] > 0 and found["compare"]["seconds"]["prefill"] > 0
    assert Image.open(out).width == 448


def test_a_tower_that_the_localizer_ran_counts_as_vision(capsys, image):
    tower = crop.cli.ask.load("embedded", "cpu", "auto").model.model.vision_tower
    handle = tower.encoder.layers[0].register_forward_hook(lambda *_: time.sleep(0.2))
    try:
        seconds = json.loads(run(capsys, "ask", image, QUESTION.text, "--json")[0])["seconds"]
    finally:
        handle.remove()
    assert seconds["vision"] >= 0.2 and seconds["total"] == pytest.approx(sum(seconds[stage] for stage in STAGES[:-1]))


@pytest.mark.fast
@pytest.mark.parametrize("method, after_plc, after_ilp", [("plc", 144, 144), ("ilp", 576, 144), ("none", 576, 576)])
def test_methods(capsys, image, method, after_plc, after_ilp):
    words = ["ask", image, QUESTION.text, "--json", "--method", method, "--keep", "0.25"]
    found = json.loads(run(capsys, *words, "--region", box(QUESTION.region))[0])
    assert (found["tokens"]["after_plc"], found["tokens"]["after_ilp"]) == (after_plc, after_ilp)
    assert found["localizer"] == "box" and found["overlay"] is None and found["compare"] is None


@pytest.mark.fast
@pytest.mark.parametrize("method", ["crop", "none"])
def test_pruning_before_the_encoder(capsys, image, method):
    words = ["ask", image, QUESTION.text, "--json", "--method", method, "--keep", "0.1", "--prune-encoder"]
    found = json.loads(run(capsys, *words, "--region", box(QUESTION.region))[0])
    tokens = found["tokens"]
    assert found["prune_encoder"] and tokens["after_ilp"] <= tokens["encoded"] < tokens["before"] == 576
    assert (tokens["after_ilp"] == tokens["encoded"]) == (method == "none")
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crop.localizers.coarse, "small_copy", lambda image, *_: asked.append(image) or image)
        found = json.loads(run(capsys, *words)[0])
    assert found["localizer"] == "head" and len(asked) == 1


@pytest.mark.fast
def test_given_regions(capsys, image):
    two = ["--region", "0.1,0.2,0.3,0.4", "--region", "0.5,0.5,1.2,0.9"]
    found = json.loads(run(capsys, "ask", image, QUESTION.text, "--json", *two)[0])
    assert found["region"]["boxes"] == [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 1.0, 0.9]]
    assert found["region"]["confidence"] == 1.0
    whole = json.loads(run(capsys, "ask", image, "hi", "--json", "--localizer", "whole")[0])
    assert whole["region"]["boxes"] == [[0.0, 0.0, 1.0, 1.0]]


def test_settings_of_localizers(capsys, image):
    words = ["ask", image, QUESTION.text, "--json"]
    asker = crop.cli.ask.load("embedded", "cpu", "auto")
    for more, layer in (([], None), (["--layer", "3"], 3)):
        found = json.loads(run(capsys, *words, "--localizer", "attention", "--min-confidence", "0.1", *more)[0])
        region = asker.localizer("attention", min_confidence=0.1, layer=layer)(SCENE.image, QUESTION.text)
        assert found["localizer"] == "attention" and found["region"]["confidence"] == region.confidence
        assert found["region"]["boxes"] == list(map(list, region.boxes))
    for name in ("attention", "head"):
        found = json.loads(run(capsys, *words, "--localizer", name, "--min-confidence", "0.99999")[0])["region"]
        assert found["area"] == 1.0 and 0 < found["confidence"] < 1 and found["reason"]
    found = json.loads(run(capsys, *words, "--localizer", "head", "--localizer-model", str(crop.embedded.HEAD))[0])
    region = asker.localizer("head")(SCENE.image, QUESTION.text)
    assert found["localizer"] == "head" and found["region"]["boxes"] == list(map(list, region.boxes))


def test_a_second_model_finds_the_region(capsys, image, tmp_path):
    """The embedded model itself, asked for blocks it was never trained to name: the whole image, and why."""
    import shutil

    folder = shutil.copytree(crop.embedded.WEIGHTS, tmp_path / "vlm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"crop_localizer_prompt": "<image> where is {question} ?"}))
    words = ["ask", image, QUESTION.text, "--json", "--localizer", "vlm", "--localizer-model", str(folder)]
    found = json.loads(run(capsys, *words)[0])
    assert found["localizer"] == "vlm" and found["region"]["area"] == 1.0
    assert "named no region" in found["region"]["reason"]


def test_answers_are_right_with_few_tokens(capsys, tmp_path):
    """Two thirds of them: no model is right about every picture, and none of these answers can be guessed often."""
    right = {"box": 0, "head": 0}
    for number, (scene, question) in enumerate(scenes.examples(12)):
        scene.image.save(path := tmp_path / f"{number}.png")
        words = ["ask", str(path), question.text, "--json", "--method", "ilp"]
        for more in (["--region", box(question.region)], []):
            found = json.loads(run(capsys, *words, *more)[0])
            right[found["localizer"]] += found["answer"] == question.answer
    assert min(right.values()) >= 8, right


@pytest.mark.parametrize("name", ["attention", "head", "ocr", "cascade", "union"])
def test_every_localizer_that_needs_no_second_model_on_receipts(name, capsys, tmp_path):
    if name not in ("attention", "head") and not all(map(importlib.util.find_spec, PACKAGES)):
        pytest.skip("extra ocr is not installed")
    small = right = 0
    for number in range(2):  # reading takes seconds
        scene = scenes.scene(scenes.UNSEEN + number, picture="receipt")
        question = next(question for question in scene.questions if question.kind in scenes.LOCAL_KINDS)
        scene.image.resize((768, 768)).save(tmp_path / "receipt.png")
        words = ["ask", str(tmp_path / "receipt.png"), question.text, "--json", "--localizer", name, "--method", "ilp"]
        found = json.loads(run(capsys, *words)[0])
        assert found["localizer"] == name and found["seconds"]["localizer"] > 0
        assert found["region"]["area"] < 0.75 or found["region"]["reason"]
        small += found["region"]["area"] < 0.5
        right += found["answer"] == question.answer
    if name != "ocr":  # 63 tokens of an unsure one are not enough
        assert small and right


def test_text_output(capsys, image):
    words = ["ask", image, QUESTION.text, "--region", box(QUESTION.region)]
    answer = json.loads(run(capsys, *words, "--json")[0])["answer"]
    out, _ = run(capsys, *words, "--compare")
    for part in (f"answer    {answer}", "unpruned", "confidence 1.00", "63 after ILP", "layer average", *STAGES):
        assert part in out
    assert "localizer included" in out


def test_rotated_photos_are_turned_upright(capsys, tmp_path):
    from PIL.Image import Exif

    exif = Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (40, 20), "red").save(path, exif=exif)
    out = tmp_path / "seen.png"
    run(capsys, "ask", str(path), "hi", "--json", "--localizer", "whole", "--method", "none", "--overlay", str(out))
    seen = Image.open(out)
    assert seen.height > 448  # the longer side and the legend


ERRORS = {
    "missing file": (["ask", "{tmp}/no.png", "hi"], "must be an existing file"),
    "folder": (["ask", "{tmp}", "hi"], "must be readable"),
    "no picture": (["ask", __file__, "hi"], "must be a picture"),
    "three numbers": (["ask", "{image}", "hi", "--region", "0,0,1"], "four numbers X0,Y0,X1,Y1, got '0,0,1'"),
    "words": (["ask", "{image}", "hi", "--region", "a,b,c,d"], "four numbers"),
    "inverted box": (["ask", "{image}", "hi", "--region", "0.5,0,0.2,1"], "x0 < x1"),
    "NaN box": (["ask", "{image}", "hi", "--region", "nan,0,1,1"], "finite"),
    "box outside": (["ask", "{image}", "hi", "--region", "1.1,1.1,1.9,1.9"], "must overlap the image"),
    "pixels": (["ask", "{image}", "hi", "--region", "0,0,300,400"], "for pixels write px:0,0,300,400"),
    "pixels outside": (["ask", "{image}", "hi", "--region", "px:400,400,500,500"], "must overlap the image"),
    "two regions for three": (
        ["ask", "{image}", "{image}", "{image}", "hi", "--region", "whole", "--region", "whole"],
        "once for each of the 3 images, got 2"),
    "two images for the embedded model": (["ask", "{image}", "{image}", "hi"], "must be one for a model with a prompt"),
    "address": (["ask", "https://example.org/x.png", "hi"], "give --allow-url to fetch it"),
    "pages of a picture": (["ask", "{image}", "hi", "--pages", "1"], "must come with a PDF file"),
    "no pages": (["ask", "{image}", "hi", "--pages", "3-1"], "page numbers such as 1,3-5"),
    "no plug-in": (["ask", "{image}", "hi", "--plugin", "{tmp}/no.py"], "cannot be loaded"),
    "markup in a name": (["ask", "{image}", "hi", "--model", "{tmp}/[/red]x[bold"], "[/red]x[bold"),
    "bytes that are no text": (["ask", "{image}", "what \udcff"], "must be text in UTF-8, got bytes that are none: what \\udcff"),
    "device without numbers": (["ask", "{image}", "hi", "--device", "meta"], "--device meta cannot be used"),
    "options of other models": (["ask", "{image}", "hi", "--trust-remote-code"], "loaded without trust_remote_code"),
    "region and localizer": (
        ["ask", "{image}", "hi", "--region", "0,0,1,1", "--localizer", "attention"], "without --localizer attention"),
    "layer and box": (["ask", "{image}", "hi", "--region", "0,0,1,1", "--layer", "1"], "with --localizer attention"),
    "layer too deep": (["ask", "{image}", "hi", "--layer", "12"], "layer must be in [0, num_layers=12), got 12"),
    "clip without model": (["ask", "{image}", "hi", "--localizer", "clip"], "must come with --localizer-model"),
    "model without clip": (["ask", "{image}", "hi", "--localizer-model", "x"], "--localizer clip, detector, vlm or head"),
    "no such second model": (
        ["ask", "{image}", "hi", "--localizer", "clip", "--localizer-model", "{tmp}/no"], "path must be an existing folder"),
    "no such head": (["ask", "{image}", "hi", "--localizer", "head", "--localizer-model", "{tmp}/no"], "existing file"),
    "confidence of a box": (["ask", "{image}", "hi", "--region", "0,0,1,1", "--min-confidence", "0.5"], "looks at the image"),
    "box without region": (["ask", "{image}", "hi", "--localizer", "box"], "must come with --region"),
    "keep of zero": (["ask", "{image}", "hi", "--keep", "0"], "above 0 and at most 1, got 0"),
    "keep above one": (["ask", "{image}", "hi", "--keep", "1.5"], "above 0 and at most 1, got 1.5"),
    "keep of NaN": (["ask", "{image}", "hi", "--keep", "nan"], "above 0 and at most 1, got nan"),
    "keep of words": (["ask", "{image}", "hi", "--keep", "few"], "above 0 and at most 1, got few"),
    "no new tokens": (["ask", "{image}", "hi", "--max-new-tokens", "0"], "at least 1, got 0"),
    "unknown method": (["ask", "{image}", "hi", "--method", "magic"], "--method must be one of crop, plc, diverse, ilp, none, random,"),
    "unknown localizer": (["ask", "{image}", "hi", "--localizer", "oracle"], "--localizer must be one of attention, box,"),
    "unknown device": (["ask", "{image}", "hi", "--device", "abacus"], "--device abacus cannot be used"),
    "no model": (["ask", "{image}", "hi", "--model", "{tmp}/nothing"], "must be an existing folder"),
    "no model in folder": (["ask", "{image}", "hi", "--model", "{tmp}"], "cannot be loaded"),
    "unknown family": (["ask", "{image}", "hi", "--model", "{bert}"], ", got 'bert'"),
    "overlay folder": (["ask", "{image}", "hi", "--overlay", "{tmp}/no/o.png"], "existing folder"),
    "overlay ending": (["ask", "{image}", "hi", "--model", "{tmp}/no", "--overlay", "{tmp}/o.what"], "must end in .png"),
    "overlay on a folder": (["ask", "{image}", "hi", "--model", "{tmp}/no", "--overlay", "{folder}"], "it is a folder"),
    "demo of none": (["demo", "--count", "0"], "at least 1, got 0"),
    "demo folder": (["demo", "--out", "{image}"], "File exists"),
    "no command": ([], "required: COMMAND"),
}  # fmt: skip


@pytest.mark.parametrize("words, message", ERRORS.values(), ids=ERRORS)
def test_wrong_use_ends_with_one_clear_line(words, message, capsys, image, tmp_path, bert):
    (tmp_path / "folder.png").mkdir()
    words = [word.format(tmp=tmp_path, image=image, bert=bert, folder=tmp_path / "folder.png") for word in words]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert "Traceback" not in err and err.splitlines()[-1].startswith("crop")
    assert message in err.splitlines()[-1] and ": error: " in err.splitlines()[-1]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return str(folder)


def test_missing_packages_are_named_with_the_extra(capsys, image, monkeypatch):
    monkeypatch.setitem(options.NEEDED["demo"], "no_such_module", "no-such-package")
    for words in (["ask", image, "hi"], ["demo"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        assert f'crop {words[0]} needs no-such-package: pip install "crop-vlm[demo]"' in capsys.readouterr().err


def test_demo_writes_its_pictures_and_prints_a_table(capsys, tmp_path):
    out, _ = run(capsys, "demo", "--out", str(tmp_path / "new" / "folder"), "--count", "3", "--seed", "2")
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == [
        *(f"{name}{part}.png" for name in ("00-shapes", "01-signs", "02-receipt") for part in ("-seen", "")),
        "contact_sheet.png",
    ]
    sheet = Image.open(tmp_path / "new" / "folder" / "contact_sheet.png")
    assert min(sheet.size) > 600 and np.asarray(sheet).std() > 20
    for part in ("question", "truth", "unpruned", "pruned", "of 3 right with 63 of 576", "contact_sheet.png"):
        assert part in " ".join(out.split())


@pytest.mark.fast
def test_info_prints_what_was_built(capsys):
    out, _ = run(capsys, "info")
    assert "torch" in out and "native" in out


@pytest.mark.fast
def test_version_and_help_teach(capsys):
    for words in (["--version"], ["--help"], ["ask", "--help"], ["demo", "--help"], ["app", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"crop {crop.__version__}" in out
    assert out.count("examples:") == 3 and "--region 0.1,0.6,0.9,0.8" in out


@pytest.mark.fast
def test_the_readme_beside_it_names_every_option(capsys):
    def help_of(*words: str) -> str:
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        return capsys.readouterr().out

    commands = re.findall(r"^    ([a-z]+) ", help_of(), re.M)
    known = {name for command in commands for name in re.findall(r"^  (?:-h, )?(--[a-z-]+)", help_of(command), re.M)}
    page = (Path(cli.__file__).with_name("README.md")).read_text(encoding="utf-8")
    assert len(commands) >= 4 and all(f"`crop {command}" in page for command in commands)
    assert len(known) > 20 and set(re.findall(r"--[a-z][a-z-]+", page)) == known


def test_module_runs_as_a_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["crop", "info"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("crop", run_name="__main__")
    assert ended.value.code == 0 and "torch" in capsys.readouterr().out
