"""`bench/run_gpu.sh` without a GPU: a rehearsal of every part that this machine can rehearse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "run_gpu.sh"


def run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    known = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", SCRIPT, *words], env=known | settings, capture_output=True, text=True, timeout=600)


def test_a_rehearsal(tmp_path: Path) -> None:
    settings = {"CROP_COMMIT": "0123abc", "BATCHES": "1", "GEOMETRIES": "llava-1.5-7b"}
    done = run(str(tmp_path), **settings)
    assert done.returncode == 0, done.stderr
    order = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert order == ["e2e", "tests", "sanitizer", "kernels"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = {part: entry["status"] for part, entry in summary.items()}
    assert found == {"e2e": "ok", "tests": "skipped", "sanitizer": "skipped", "kernels": "ok"}
    assert len(list(tmp_path.iterdir())) <= 8
    for name in ("e2e", "kernels"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["machine"]["commit"] == "0123abc"
        assert "commit:       0123abc" in (tmp_path / f"{name}.txt").read_text()
    (row,) = json.loads((tmp_path / "e2e.json").read_text())["rows"]
    assert (row["geometry"], row["keep"], row["problems"]) == ("llava-1.5-7b", 0.11, [])
    assert "the host's floor of a forward" in (tmp_path / "e2e.txt").read_text()
    kernels = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["graph warm us"] for row in kernels} == {"not measured"}
    again = run(str(tmp_path), "--only", "tests", **settings)
    assert again.returncode == 0 and again.stdout.startswith("tests: skipped")


def test_wrong_use(tmp_path: Path) -> None:
    for words in ((), ("--only", "e2e"), (str(tmp_path), "--only", "nothing")):
        done = run(*words)
        assert done.returncode == 2 and done.stderr.strip().startswith("bench/run_gpu.sh OUT")


def test_a_part_that_cannot_end_in_time_is_not_begun(tmp_path: Path) -> None:
    done = run(str(tmp_path), "--only", "kernels", TOTAL_SECONDS="50")
    assert done.returncode == 1 and done.stdout.startswith("kernels: out of time, not begun: ")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"kernels": {"status": "out of time", "seconds": 0}}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
