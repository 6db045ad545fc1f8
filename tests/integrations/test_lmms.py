"""The adapter for lmms-eval: one tiny local task through lmms-eval itself where it is installed, else through a stand-in."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from crop import embedded
from crop.embedded import scenes

pytest.importorskip("tqdm")
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
FIRST = 10_000_040


def questions(count: int) -> list[tuple[scenes.Scene, scenes.Question]]:
    found = []
    for seed in range(FIRST, FIRST + count):
        scene = scenes.scene(seed)
        found.append((scene, next(q for q in scene.questions if q.local)))
    return found


@pytest.fixture
def lmms(monkeypatch):
    """crop.integrations.lmms_eval, with a stand-in for the base class of lmms-eval where that is missing."""
    if not INSTALLED:

        class Base:
            def __init__(self):
                self._rank, self._world_size, self.task_dict = 0, 1, {}
                self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

            rank = property(lambda self: self._rank)

        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = Base
    monkeypatch.delitem(sys.modules, "crop.integrations.lmms_eval", raising=False)
    import crop.integrations.lmms_eval

    yield crop.integrations.lmms_eval
    sys.modules.pop("crop.integrations.lmms_eval", None)


@pytest.mark.parametrize(
    "method,localizer,size", [("none", "whole", 3), ("crop", "attention", 2), ("uniform", "whole", 4)]
)
def test_requests_come_back_in_order(lmms, method, localizer, size):
    asked = questions(4)
    torch.set_num_threads(1)
    model = lmms.CropModel("embedded", method, 0.33, localizer, "cpu", batch_size=size)
    model.task_dict = {"tiny": {"test": asked}}
    options = [{"max_new_tokens": 5, "until": ["\n"]}, {"max_new_tokens": 4}]  # two groups, interleaved
    requests = [
        SimpleNamespace(args=(q.text, options[n % 2], lambda doc: [doc[0].image], n, "tiny", "test"))
        for n, (_, q) in enumerate(asked)
    ]
    answers = model.generate_until(requests)
    assert sum(a == q.answer for a, (_, q) in zip(answers, asked, strict=True)) >= 3
    if method == "none":
        images, texts = [s.image for s, _ in asked], [q.text for _, q in asked]
        assert answers == embedded.answer(model.asker.model, model.asker.processor, images, texts)


@pytest.mark.fast
def test_what_is_not_supported_is_refused(lmms):
    with pytest.raises(ValueError, match="by_name: name must be one of crop, .*got 'magic'"):
        lmms.CropModel("embedded", "magic", 0.1, "whole", "cpu")
    model = lmms.CropModel("embedded", "none", 1.0, "whole", "cpu")
    with pytest.raises(NotImplementedError, match="must generate answers"):
        model.loglikelihood([])
    model.task_dict = {"t": {"test": ["a.mp4"]}}
    request = SimpleNamespace(args=("what", {}, lambda doc: [doc], 0, "t", "test"))
    with pytest.raises(ValueError, match="visuals must be images, got str"):
        model.generate_until([request])


def test_visuals_are_upright_and_what_is_transparent_is_white(lmms):
    model = lmms.CropModel("embedded", "none", 1.0, "whole", "cpu")
    ink = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    deep = Image.fromarray(np.array([[0, 30000, 65535]], np.uint16))
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x112] = 6
    model.task_dict = {"t": {"test": [[ink, deep, turned]]}}
    found = model._images(SimpleNamespace(args=("what", {}, lambda doc: doc, 0, "t", "test")))
    assert found[0].getpixel((0, 0)) == (255, 255, 255) and found[2].size == (2, 4)
    assert [found[1].getpixel((x, 0))[0] for x in range(3)] == [0, 117, 255]


TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
task: crop_tiny
test_split: test
output_type: generate_until
doc_to_visual: !function utils.to_visual
doc_to_text: !function utils.to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image
def to_visual(doc): return [Image.open(doc["image"])]
def to_text(doc): return doc["question"]
"""


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
def test_a_task_of_lmms_eval(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lmms_eval import evaluator
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from crop.integrations.lmms_eval import manifest

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)  # an installed package does so by its entry point
    asked, rows = questions(4), []
    for number, (scene, question) in enumerate(asked):
        scene.image.save(tmp_path / f"{number}.png")
        rows.append({"image": str(tmp_path / f"{number}.png"), "question": question.text, "answer": question.answer})
    folder = tmp_path / "task"
    folder.mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "crop_tiny.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    (folder / "utils.py").write_text(UTILS)
    result = evaluator.simple_evaluate(
        model="crop", model_args="pretrained=embedded,method=crop,keep=0.33", tasks=["crop_tiny"], batch_size=2,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False), device="cpu", log_samples=False,
    )  # fmt: skip
    scores = result["results"]["crop_tiny"]
    assert next(value for name, value in scores.items() if name.startswith("exact_match,")) >= 0.75, scores
