"""The benches over sizes: small models against the advice, growth with tokens, samples and images; their tables in README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from bench.latency import scale, small, tables  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_small_models_through_the_command(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    small.main(["--only", "0", "2", "--rounds", "2", "--seconds", "0", "--json", str(path)])
    first, second = json.loads(path.read_text())["rows"]
    assert (first["model"], first["tokens"], first["batch"]) == ("embedded", 576, 1)
    assert (second["model"], second["tokens"], second["batch"]) == ("2 x 64", 64, 8)
    for row in (first, second):
        assert row["rounds"] == 2 and row["localized"] > 0 and row["advice"] in ("prune", "do not")
    assert second["advice"] == "do not"  # two layers of width 64: nothing to gain


def test_scale_through_the_command(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    scale.main(["--axis", "images", "prompt tokens", "--most", "4", "--seconds", "0", "--json", str(path)])
    content = json.loads(path.read_text())
    assert {row["work"] for row in content["rows"]} == set(scale.WORK)
    assert {row["size"] for row in content["rows"]} == {1, 4} and {line["axis"] for line in content["exponents"]} == {
        "images"
    }
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_prompts_of_many_pictures_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for _, name, size, call in scale.cases(["prompt tokens"], 1024) if size == 1024 and call() is None]
    assert names == ["patch entry and exit", "prefill, unpruned", "prefill, PLC 11%", "prefill, both 11%"]


def test_exponents_by_hand() -> None:
    rows = [
        {"axis": "tokens", "work": work, "size": size, "min ms": fixed + size**power}
        for work, fixed, power in (("plain", 0, 1.5), ("fixed", 0.001, 1.0), ("flat", 3, 0.0))
        for size in (4, 16, 64, 256, 1024)
    ]
    found = {line["work"]: line["exponent"] for line in scale.exponents(rows)}
    assert found == {"plain": pytest.approx(1.5), "fixed": pytest.approx(1.0, abs=1e-3), "flat": pytest.approx(0.0)}
    assert scale.exponents(rows)[0]["from"] == 64


def test_tables_for_the_readme() -> None:
    part = dict.fromkeys(("localizer", "plan", "vision", "projector", "PLC", "before", "after", "head"), 0.1)
    plain = {"first": 1.0, "memory": 100, "kv_bytes": 50, "parts": part | {"localizer": 0.0}, "advice": None, "flops": 8.0,
             "ideal": 1.0}  # fmt: skip
    ours = plain | {"first": 0.5, "memory": 25, "parts": part, "advice": True, "flops": 2.0, "ideal": 0.4}
    row = {"geometry": "llava-next-7b", "tokens": 2928, "batch": 1, "keep": 0.11, "localizer": "attention", "full": False,
           "device": "cpu", "reduce": [16, 4], "contenders": {"unpatched": plain, "FastV, eager layer": {"reason": "no room"},
           "ILP": ours, "PLC": ours, "both": ours}}  # fmt: skip
    lines = tables.e2e({"rows": [row]})
    assert (
        lines[2]
        == "| llava-next-7b, 2928 tokens, batch 1, 11 % | - | 2.00 | 2.00 | 2.00 | 4.00 | - / 0.25 / 0.25 / 0.25 |"
    )
    assert all("not measured" in line for line in tables.bars({"rows": [row]})[2:])
