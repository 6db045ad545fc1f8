"""What the tests of the command line share: the embedded model, loaded once per file, and one of its pictures."""

from __future__ import annotations

import functools

import pytest

import crop.cli.ask
from crop.embedded import scenes

SCENE = scenes.scene(scenes.UNSEEN + 5, picture="shapes")


@pytest.fixture(scope="module")
def loaded_once():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(crop.cli.ask, "load", functools.cache(crop.cli.ask.load))
        yield


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    SCENE.image.save(path)
    return str(path)
