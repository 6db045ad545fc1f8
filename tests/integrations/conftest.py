"""crop.integrations.lmms_eval with or without lmms-eval, and a model that anybody could have."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crop import embedded

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
ADAPTER = "crop.integrations.lmms_eval"


@pytest.fixture(scope="session")
def chatty(tmp_path_factory) -> str:
    """The embedded model as a folder whose chat template takes a thought, too."""
    folder = shutil.copytree(embedded.WEIGHTS, tmp_path_factory.mktemp("models") / "chatty")
    with (folder / "chat_template.jinja").open("a") as template:
        template.write("{%- if enable_thinking %}<think>{% endif %}")
    return str(folder)


@pytest.fixture
def lmms(monkeypatch) -> Iterator[Any]:
    """The adapter, with a stand-in for what it takes from lmms-eval where that is missing."""
    if not INSTALLED:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    yield importlib.import_module(ADAPTER)
    if not INSTALLED:
        sys.modules.pop(ADAPTER, None)


def stand_in() -> dict[str, types.ModuleType]:
    class Base:
        is_simple = True

        def __init__(self) -> None:
            self._rank, self._world_size, self.task_dict = 0, 1, {}
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

        rank = property(lambda self: self._rank)

        def clean(self) -> None:
            pass

    @dataclass
    class TokenCounts:
        input_tokens: int | None = None
        output_tokens: int | None = None
        reasoning_tokens: int | None = None

        def to_dict(self) -> dict[str, int]:
            return {name: value for name in TokenCounts.__annotations__ if (value := getattr(self, name)) is not None}

    @dataclass
    class GenerationResult:
        text: Any
        token_counts: TokenCounts | None = None

    holds = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.api.instance": {"TokenCounts": TokenCounts, "GenerationResult": GenerationResult},
        "lmms_eval.models": {},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda *_: None},
    }
    modules = {name: types.ModuleType(name) for name in holds}
    for name, values in holds.items():
        vars(modules[name]).update(values)
    return modules


def chat_request(number: int, question: str, options: dict, *images: Any, task: str = "tiny", **more: Any) -> Any:
    """A request of a chat task that asks one thing about some images."""
    parts = [{"type": "image", "url": image} for image in images] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    return SimpleNamespace(args=(question, lambda doc, **_: messages, options, number, task, "test"), **more)


def give_documents(model: Any, documents: Any, task: str = "tiny") -> None:
    """What lmms-eval does before it asks: the model knows the documents of a task."""
    model.task_dict[task] = {"test": documents}


def save(images: list[Any], folder: Path) -> list[str]:
    """Files of images."""
    paths = [str(folder / f"{number}.png") for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths
