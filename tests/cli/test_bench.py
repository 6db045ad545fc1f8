"""`crop bench`: rows of operators and of a prefill, written one by one, with the machine and the commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crop import ops
from crop.cli import bench_command, bench_kernels, bench_prefill, main, report
from crop.ops import dispatch
from crop.selftest.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def kernels(only: list[str], **more: Any) -> list[dict[str, Any]]:
    return list(bench_kernels.measure_kernels(only, CPU, **{"rounds": 2, "seconds": None, "full": False} | more))


@pytest.mark.fast
def test_the_command_knows_the_cases() -> None:
    assert tuple(CASES) == bench_command.KERNELS


def test_every_operator_has_its_times() -> None:
    rows = kernels(list(CASES))
    for row in rows:
        assert row["plain torch us"] > 0 and row["note"].count("wrong") == 0
        if dispatch.native:
            assert row["kernel us"] > 0
            assert row["times as fast"] == pytest.approx(row["plain torch us"] / row["kernel us"])
        else:
            assert row["kernel us"] is None and "kernel fails" in row["note"]


def test_a_wrong_kernel_has_no_time_and_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select = ops.select
    monkeypatch.setattr(ops, "select", lambda score, *rest: select(-score, *rest))
    row, *_ = rows = kernels(["select"])
    assert row["kernel us"] is row["plain torch us"] is None and "plain torch is wrong: off by" in row["note"]
    monkeypatch.setattr(bench_kernels, "measure_kernels", lambda *_: iter(rows))
    path = tmp_path / "k.json"
    monkeypatch.setenv("CROP_COMMIT", "0123abc")
    assert main.main(["bench", "kernels", "--device", "cpu", "--json", str(path)]) == 1
    content = json.loads(path.read_text())
    assert content["rows"] == rows and content["machine"]["commit"] == "0123abc"
    assert "is wrong" in capsys.readouterr().out


def test_a_kernel_that_fails_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(ops, "select", fail)
    row, *_ = rows = kernels(["select"])
    assert row["note"] == "kernel fails: no room; plain torch fails: no room" and row["faults"] == 2
    monkeypatch.setattr(bench_kernels, "measure_kernels", lambda *_: iter(rows))
    assert main.main(["bench", "kernels", "--device", "cpu"]) == 1


@pytest.mark.fast
def test_times_that_are_compared_are_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel and plain torch, as a GPU would time them; there the copy of a small tensor can take no time at all."""

    def row(*found: dict[str, Any]) -> dict[str, Any]:
        times = iter(found)
        monkeypatch.setattr(bench_kernels, "graph_times", lambda *_: next(times))
        case = Case("select", "tiny", lambda: None, lambda _: 0.0, bytes=1.0)
        return bench_kernels._row(case, torch.device("cuda"), 1, None)

    captured, not_captured = {"cold": 2.0, "eager": 8.0}, {"cold": None, "eager": 16.0}
    for kernel, plain, kind, ratio in (
        (captured, {"cold": 6.0, "eager": 9.0}, "cold", 3.0),
        (captured, not_captured, "eager", 2.0),
        ({"cold": 0.0, "eager": 8.0}, {"cold": 0.0, "eager": 8.0}, "cold", None),
        ({"cold": 0.0, "eager": 8.0}, captured, "cold", None),
    ):
        found = row(kernel, plain)
        assert found["timed"] == kind and found["times as fast"] == ratio
        assert (found["kernel us"], found["plain torch us"]) == (kernel[kind], plain[kind])


def test_rows_are_written_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "results" / "k.json"

    def cut_off(*_: Any) -> Any:
        yield {"op": "select", "note": ""}
        assert len(json.loads(path.read_text())["rows"]) == 1
        yield {"op": "compact", "note": ""}
        raise RuntimeError("out of power")

    monkeypatch.setattr(bench_kernels, "measure_kernels", cut_off)
    with pytest.raises(SystemExit):
        main.main(["bench", "kernels", "--device", "cpu", "--json", str(path)])
    assert [row["op"] for row in json.loads(path.read_text())["rows"]] == ["select", "compact"]


@pytest.mark.fast
def test_no_case_begins_after_the_time() -> None:
    left = {"op": "select", "shape": "B1 N576 k144", "note": "not run, nor what follows: -1 s are over"}
    assert kernels(["select", "pack"], seconds=-1.0) == [left]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prefill", "--tokens", "500"], "--tokens must be multiples of 576, got [500]"),
        (["prefill", "--only", "select"], "--only and --time must come with kernels"),
        (["kernels", "--tokens", "576"], "--tokens and --contenders must come with prefill"),
    ],
)
def test_options_of_the_other_bench(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["bench", *words, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_a_prefill_against_its_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in dict(LAYERS=4, WIDTH=64, HEADS=4, FFN=96, KEEPS=(0.25,)).items():
        monkeypatch.setattr(bench_prefill, name, value)
    rows = {row["contender"]: row for row in bench_prefill.measure_prefill([576], CPU, 1, "")}
    assert {"unpatched", "keep all", "ILP 25%", "PLC 25%", "both 25%"} <= set(rows)
    ratios = {name: row["FLOP ratio"] for name, row in rows.items()}
    assert ratios["unpatched"] == ratios["keep all"] == 1.0
    assert ratios["PLC 25%"] > ratios["both 25%"] > ratios["ILP 25%"] > 1.5
    assert all(row["ms"] > 0 and row["vision tokens"] == 576 for row in rows.values())
    assert any(name.startswith("localizer") for name in rows)


@pytest.mark.fast
def test_an_installed_package_names_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CROP_COMMIT", raising=False)
    assert report.commit() != "unknown" or not (report.SOURCE / ".git").exists()
    monkeypatch.setattr(report, "SOURCE", tmp_path)
    assert report.commit() == "unknown"
