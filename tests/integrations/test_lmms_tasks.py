"""Real runs of lmms-eval: its command, its task files and its evaluator, over generated data and without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import published
from crop.embedded import scenes
from tests.integrations import benchmarks
from tests.integrations.conftest import INSTALLED

pytestmark = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
ROOT = Path(__file__).resolve().parents[2]
MODEL = "pretrained=embedded,method=crop,keep=0.33,device=cpu"


def receipts(count: int) -> list[tuple[scenes.Scene, scenes.Question]]:
    """Pictures, each with a question in lower case, which is what some tasks make of every question."""
    drawn = [scenes.scene(scenes.UNSEEN + number, picture="receipt") for number in range(count)]
    kinds = ("shop", "date", "total")
    return [(scene, next(question for question in scene.questions if question.kind in kinds)) for scene in drawn]


def evaluate(folder: Path, tasks: list[str], *words: str) -> None:
    """Run ``python -m lmms_eval`` on tasks of a folder, results into its "out"."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "crop", "--model_args", MODEL, "--tasks", ",".join(tasks),
               "--include_path", str(folder), "--log_samples", "--output_path", str(folder / "out"), *words]  # fmt: skip
    given = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=os.environ | given | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert not done.returncode and (folder / "out").exists(), done.stdout[-3000:] + done.stderr[-3000:]


def test_every_published_benchmark_runs_on_its_own_task_file(tmp_path):
    asked = receipts(6)
    benchmarks.write(list(benchmarks.TASKS), asked, tmp_path)
    evaluate(tmp_path, [f"local_{name}" for name in benchmarks.TASKS], "--batch_size", "auto", "--max_batch_size", "4")
    found, samples = benchmarks.results_of(tmp_path / "out")
    assert samples.keys() == {f"local_{name}" for name in benchmarks.TASKS}
    for name, entries in samples.items():
        assert len(entries) == 6, name
        for entry in entries:
            (counts,) = entry["token_counts"]
            assert counts["vision_tokens"] == 576 and counts["vision_tokens_kept"] == 190, name
            assert counts["input_tokens"] > 576 and counts["output_tokens"] > 0 and counts["time_to_first_token"] > 0
    right = {name: found["results"][f"local_{name}"] for name in benchmarks.TASKS}
    for name, metric in {"gqa": "exact_match", "textvqa_val": "exact_match", "vqav2_val": "exact_match",
                         "docvqa_val": "anls"}.items():  # fmt: skip
        assert right[name][f"{metric},none"] >= 4 / 6, name
    assert right["ocrbench"]["ocrbench_accuracy,none"] >= 4 / 1000  # of a thousand questions, of which six are here
    assert all(any(",none" in key for key in result) for result in right.values())
    assert found["config"]["model_backend"] == "crop.integrations.lmms_eval.CropModel (chat)"
    assert found["config"]["batch_sizes"] == [4]
    for part in ("results", "n-samples"):
        found[part] |= {name.removeprefix("local_"): value for name, value in found[part].items()}
    made = published.contribution(found, "a test", "a machine", "0123abc")
    expected = published.TASKS.keys() & benchmarks.TASKS.keys() - {
        "mme"
    }  # the questions made here are of perception alone
    assert made["tasks"].keys() == expected and made["keep"] == 0.33
    assert found["throughput"]["avg_vision_tokens_kept"] == 190 and found["throughput"]["avg_time_to_first_token"] > 0


@pytest.mark.parametrize("task,words,metric,backend", [
    ("rounds", (), "both_right", "CropModel (chat)"),
    ("choices", ("--force_simple",), "acc", "SimpleCropModel (simple)"),
])  # fmt: skip
def test_rounds_and_scored_choices(tmp_path, task, words, metric, backend):
    benchmarks.write_own(receipts(6), tmp_path)
    evaluate(tmp_path, [f"local_{task}"], "--batch_size", "3", *words)
    found, samples = benchmarks.results_of(tmp_path / "out")
    assert found["results"][f"local_{task}"][f"{metric},none"] >= 4 / 6 and len(samples[f"local_{task}"]) == 6
    assert found["config"]["model_backend"].endswith(f".{backend}")


def test_the_entry_point_makes_the_model_of_an_argument_string():
    from lmms_eval.models import MODEL_REGISTRY_V2

    from crop.integrations.lmms_eval import manifest

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)  # an installed package does so by its entry point
    build = MODEL_REGISTRY_V2.get_model_class("crop").create_from_arg_string
    given = {"batch_size": "auto", "max_batch_size": 2, "device": "cpu"}
    model = build("pretrained=embedded,method=none,keep=1", given)
    assert (model.auto_batch, model.batch_size, model.method) == (True, 2, None) and not model.is_simple
    with pytest.raises(ValueError, match="options must be among pretrained, method, keep, .*, got kep"):
        build("pretrained=embedded,kep=0.1", given)
