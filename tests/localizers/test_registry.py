"""Localizers by name, and a user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import crop
from crop.cli.main import main
from crop.geometry.region import Region
from crop.localizers import (
    AttentionLocalizer,
    BoxLocalizer,
    WholeLocalizer,
    get_localizer,
    localizer_names,
    registry,
)
from tests.support.cases import get_model
from tests.support.families.entry import ATTENTIONS
from tests.support.localizing import PICTURE, Processor

pytestmark = pytest.mark.usefixtures("one_thread", "flash")
attentions = pytest.mark.parametrize("attention", ATTENTIONS)


@pytest.mark.fast
def test_given_and_whole():
    region = Region.box(0.1, 0.2, 0.3, 0.4, confidence=0.7)
    assert BoxLocalizer(region)(PICTURE, "?") is region
    assert WholeLocalizer()(PICTURE, "?").is_whole


@pytest.mark.fast
def test_get_localizer():
    region = Region.box(0, 0, 0.5, 0.5)
    assert get_localizer("box", region=region)(PICTURE, "?") == region
    assert isinstance(get_localizer("whole"), WholeLocalizer)
    attention = get_localizer("attention", model=get_model("llava", "sdpa"), processor=Processor("llava"))
    assert isinstance(attention, AttentionLocalizer)
    with pytest.raises(ValueError, match=r"one of attention, .*, got 'oracle'"):
        get_localizer("oracle")
    with pytest.raises(ValueError, match="region must be given for 'box'"):
        get_localizer("box")
    with pytest.raises(ValueError, match="path must be given for 'vlm'"):
        get_localizer("vlm")
    with pytest.raises(ValueError, match="min_confidence must not be given for 'whole'"):
        get_localizer("whole", min_confidence=0.5)
    with pytest.raises(ValueError, match="processor must be given for 'attention'"):
        get_localizer("attention", model=get_model("llava", "sdpa"))


def test_the_readmes_localizer_is_known_by_name(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    text = (Path(crop.__file__).parent / "localizers" / "README.md").read_text(encoding="utf-8")
    block = text.split("## Write and register one")[1].split("```python\n")[1].split("```")[0]
    exec(block, {})
    assert get_localizer("center")(PICTURE, "?").boxes == ((0.25, 0.25, 0.75, 0.75),)
    assert localizer_names()[-1] == "center" and all(f"| `{name}` |" in text for name in localizer_names()[:-1])


def test_a_plugin_is_imported_before_names_are_checked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "_registered", {})
    text = (Path(crop.__file__).parent / "localizers" / "README.md").read_text(encoding="utf-8")
    file = tmp_path / "center.py"
    file.write_text(text.split("## Write and register one")[1].split("```python\n")[1].split("```")[0])
    PICTURE.save(tmp_path / "picture.png")
    words = ["ask", str(tmp_path / "picture.png"), "what", "--localizer", "center", "--json", "--max-new-tokens", "1"]
    with pytest.raises(SystemExit):
        main(words)
    assert "--localizer must be one of attention" in capsys.readouterr().err
    assert main([*words, "--plugin", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["localizer"] == "center" and found["region"]["boxes"] == [[0.25, 0.25, 0.75, 0.75]]


def test_a_builder_gets_what_was_given(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    given = []
    crop.register_localizer("mine", lambda arguments: given.append(arguments) or WholeLocalizer())
    get_localizer("mine", path="somewhere", layer=3)
    assert (given[0].name, given[0].path, given[0].layer, given[0].device) == ("mine", "somewhere", 3, "cpu")
    with pytest.raises(ValueError, match="model must be given for 'mine', got None"):
        given[0].need("model")
    with pytest.raises(ValueError, match="register_localizer: name must be none of attention, .*got 'head'"):
        crop.register_localizer("head", lambda arguments: WholeLocalizer())
    with pytest.raises(TypeError, match="build must be a function of LocalizerArguments, got str"):
        crop.register_localizer("mine", "mine")
