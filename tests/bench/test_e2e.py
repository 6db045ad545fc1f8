"""The latency bench: geometries of the published size, a row through the real command, resumed, and its bars."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")

import crop  # noqa: E402
from bench import show  # noqa: E402
from bench.latency.e2e import __main__ as command  # noqa: E402
from bench.latency.e2e import compiled, report, workload  # noqa: E402
from bench.latency.e2e.clock import PARTS  # noqa: E402
from bench.latency.e2e.contenders import Answer, Contender, verify  # noqa: E402
from bench.latency.e2e.fastv import fastv  # noqa: E402
from bench.latency.e2e.geometries import GEOMETRIES, Shrink, build  # noqa: E402
from bench.latency.e2e.memory import peak  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["--reduce", "64", "8", "--rounds", "1", "--decode", "1", "--device", "cpu"]


@pytest.mark.parametrize("name", ["llava-next-7b", "qwen2.5-vl-7b-4k", "qwen3-vl-8b", "internvl3-8b"])
def test_full_size_is_the_published_size(name: str) -> None:
    geometry = GEOMETRIES[name]
    model = build(geometry.config(Shrink()), "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(geometry.parameters, rel=0.002)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_compiled_layers_give_what_eager_ones_give(tmp_path, monkeypatch):
    """The row says so itself: a compiled answer that is not close to its eager one is a problem, and an error at the end."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # dynamo's part; inductor takes a minute
    path = tmp_path / "rows.json"
    command.main(["--geometry", "llava-1.5-7b", "--no-twins", "--localizer", "none", "--compiled", "layers", "--json", str(path), *TINY])  # fmt: skip
    (row,) = json.loads(path.read_text())["rows"]
    found = row["contenders"]
    assert not row["problems"] and list(found)[-2:] == ["unpatched, compiled", "both, compiled"]
    assert found["both, compiled"]["tokens"] == found["both"]["tokens"] == 63
    assert found["both, compiled"]["kv_bytes"] == found["both"]["kv_bytes"]
    torch._dynamo.reset()


def test_graphs_need_a_gpu(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--compiled", "graphs", "--device", "cpu"])
    assert "needs a CUDA device, got cpu; use --compiled layers" in capsys.readouterr().err
    model = workload.Model.build(GEOMETRIES["llava-1.5-7b"], Shrink(64, 8), "cpu", torch.float32)
    with pytest.raises(ValueError, match="graphs need a CUDA device, got cpu"):
        compiled.compile_layers(model, "graphs")


def test_shrinking_keeps_the_ratios() -> None:
    full, small = (GEOMETRIES["qwen3-vl-8b"].config(Shrink(*by)).text_config for by in ((1, 1), (16, 4)))
    assert full.hidden_size / small.hidden_size == full.intermediate_size / small.intermediate_size == 16
    assert full.num_attention_heads / full.num_key_value_heads == small.num_attention_heads / small.num_key_value_heads
    assert (small.num_hidden_layers, small.hidden_size // small.num_attention_heads) == (9, small.head_dim)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON of one row from the command."""
    path = tmp_path_factory.mktemp("e2e") / "rows.json"
    command.main(["--geometry", "llava-1.5-7b", "--batch", "2", "--json", str(path), *TINY])
    return path


def test_a_row_through_the_command(written: Path) -> None:
    content = json.loads(written.read_text())
    (row,) = content["rows"]
    assert content["machine"]["torch"] == torch.__version__ and not row["full"] and row["device"] == "cpu"
    found = row["contenders"]
    assert [name for name, one in found.items() if "reason" in one] == []
    assert list(found) == [
        "unpatched", "FastV, eager layer", "ILP", "ILP, no kernels", "PLC", "PLC, no kernels", "diverse",
        "diverse, no kernels", "both", "both, no kernels",
    ]  # fmt: skip
    assert {one["tokens"] for name, one in found.items() if name != "unpatched"} == {63}
    for name, one in found.items():
        assert one["first"] > 0 and set(one["parts"]) == set(PARTS)
        # The parts are the whole but for entering and leaving the patch.
        assert 0.5 < sum(one["parts"].values()) / one["first"] <= 1.001, name
        assert (one["parts"]["localizer"] > 0) == (name[:3] in ("ILP", "PLC", "div", "bot"))
    bytes_per_token = 2 * 64 * 4 * 4 * 2  # keys and values, width 64, four layers, float32, two samples
    full, kept = 576 + 60, 63 + 60
    assert found["unpatched"]["kv_bytes"] == full * bytes_per_token
    assert found["ILP"]["kv_bytes"] == found["FastV, eager layer"]["kv_bytes"] == (full + kept) * bytes_per_token // 2
    assert found["PLC"]["kv_bytes"] == kept * bytes_per_token
    assert found["PLC"]["ideal"] < found["both"]["ideal"] < found["ILP"]["ideal"] < found["unpatched"]["ideal"]
    page = show.text(content)
    assert row["attention"] == {"flash": 8} and "unpatched model: 8 flash; regions " in page
    assert "widths / 64" in page and "not measured" in page and "llava-1.5-7b" in page
    assert not written.with_suffix(".jsonl").exists()


def test_a_killed_run_goes_on(written: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row, path, asked = json.loads(written.read_text())["rows"][0], tmp_path / "again.json", []

    def measure(work: object, keep: float, *_: object, **__: object) -> dict:
        asked.append(keep)
        if asked == [0.22, 0.33]:
            raise KeyboardInterrupt
        return {name: row[name] for name in ("timed", "preprocess", "weights", "attention", "contenders")}

    monkeypatch.setattr(command, "measure", measure)
    log = path.with_suffix(".jsonl")
    log.write_text(json.dumps(row) + "\n" + json.dumps(dict(row, keep=0.22))[:-40])  # killed while it wrote
    arguments = ["--geometry", "llava-1.5-7b", "--batch", "2", "--keep", "0.33", "0.22", "0.11", "--json", str(path)]
    with pytest.raises(KeyboardInterrupt):
        command.main([*arguments, *TINY])
    command.main([*arguments, *TINY])
    assert asked == [0.22, 0.33, 0.33] and not log.exists()
    assert [r["keep"] for r in json.loads(path.read_text())["rows"]] == [0.11, 0.22, 0.33]
    log.write_text(json.dumps(dict(row, commit="another")))
    command.main([*arguments, *TINY, "--time", "-1"])
    assert len(asked) == 3 and {r["reason"][:7] for r in json.loads(path.read_text())["rows"]} == {"not run"}
    assert log.exists()


def test_what_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(*_: object, **__: object) -> dict:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(command, "measure", measure)
    command.main(["--geometry", "llava-1.5-7b", "--json", str(tmp_path / "x.json"), *TINY])
    assert "does not fit: CUDA out of memory" in show.text(json.loads((tmp_path / "x.json").read_text()))


def test_a_row_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: Path) -> None:
    row = json.loads(written.read_text())["rows"][0]

    def measure(work: object, keep: float, *_: object, **__: object) -> dict:
        if keep < 0.2:
            raise RuntimeError("ILP: wrong")
        return {name: row[name] for name in ("timed", "preprocess", "weights", "attention", "contenders")}

    monkeypatch.setattr(command, "measure", measure)
    arguments = ["--geometry", "llava-1.5-7b", "--keep", "0.11", "0.22", "--json", str(tmp_path / "x.json"), *TINY]
    with pytest.raises(SystemExit, match="keep 11%: FAILED: ILP: wrong"):
        command.main(arguments)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [r.get("reason") for r in rows] == ["FAILED: ILP: wrong", None] and (tmp_path / "x.jsonl").exists()
    assert "FAILED: ILP: wrong" in report.text(rows)


def test_an_output_that_is_not_as_planned_costs_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(who: Contender, *_: object) -> str:
        return "other bits" if who.name in ("keep all", "PLC") else ""

    monkeypatch.setattr(sys.modules[command.measure.__module__], "verify", wrong)
    path = tmp_path / "x.json"
    with pytest.raises(SystemExit, match="keep 11%: keep all: other bits\n.*keep 11%: PLC: other bits"):
        command.main(["--geometry", "llava-1.5-7b", "--no-twins", "--localizer", "none", "--json", str(path), *TINY])
    (row,) = json.loads(path.read_text())["rows"]
    assert row["problems"] == ["keep all: other bits", "PLC: other bits"]
    assert all(one["first"] > 0 for one in row["contenders"].values())
    assert "PROBLEM: PLC: other bits" in show.text(json.loads(path.read_text()))


def test_fastv_in_its_usual_form_is_our_configuration_of_it() -> None:
    model = workload.Model.build(GEOMETRIES["llava-1.5-7b"], Shrink(64, 8), "cpu", torch.float32)
    work = workload.make(model, 2)
    with torch.no_grad():
        with fastv(work, 0.11) as usual:
            theirs = model.model(**work.inputs).logits[:, -1]
        with crop.patch(model.model, crop.InnerLLMPruning(0.11, rows="last"), **work.where) as stats:
            ours = model.model(**work.inputs).logits[:, -1]
        plain = model.model(**work.inputs).logits[:, -1]
    assert torch.equal(usual.kept - workload.BEFORE, torch.stack(stats.kept))
    torch.testing.assert_close(theirs, ours)
    assert not torch.allclose(plain, ours)


def test_verification_finds_other_counts_and_outputs() -> None:
    model = workload.Model(None, None, GEOMETRIES["llava-1.5-7b"], 0)
    work = workload.Workload(model, {}, [crop.Region.whole()], 0.0)
    plain = Answer(torch.zeros(1, 4), [576], 0)
    everything, tenth = Contender("keep all"), Contender("ILP", crop.InnerLLMPruning(0.11), 0.11)
    assert verify(everything, plain, plain, work) == ""
    assert "bit for bit" in verify(everything, Answer(torch.full((1, 4), 1e-7), [576], 0), plain, work)
    assert "must keep [63], got [64]" in verify(tenth, Answer(torch.zeros(1, 4), [64], 0), plain, work)
    assert "finite" in verify(tenth, Answer(torch.full((1, 4), torch.nan), [63], 0), plain, work)


def test_peak_memory_is_that_of_the_call() -> None:
    size = 64 * 2**20
    found = [peak(lambda: torch.ones(size // 4), torch.device("cpu")) for _ in range(2)]
    if found[0] is None:
        pytest.skip("the kernel's high-water mark cannot be set back here")
    assert found == [pytest.approx(size, rel=0.1)] * 2


def bar_row(first: float, over: float, advice: bool, **more: object) -> dict:
    def one(seconds: float, prefill: float, advice: bool | None) -> dict:
        parts = dict.fromkeys(PARTS, 0.0) | {"before": prefill, "localizer": 0.0 if advice is None else 0.01}
        return {"first": seconds, "ideal": (seconds - parts["localizer"]) / (1 + over), "parts": parts, "memory": seconds,
                "advice": advice}  # fmt: skip

    contenders = {"unpatched": one(1.0, 0.8, None), "FastV, eager layer": one(9.0, 9.0, None), "ILP": one(first, 0.2, advice),
                  "PLC": one(first, 0.1, advice), "both": {"reason": "does not fit"}}  # fmt: skip
    row = {
        "geometry": "llava-next-7b",
        "full": True,
        "device": "H100",
        "batch": 1,
        "keep": 0.11,
        "localizer": "attention",
    }
    return row | {"contenders": contenders} | more


def verdicts(*rows: dict) -> list[str]:
    return [verdict for *_, verdict in report.bars(rows)]


def test_bars() -> None:
    assert verdicts(bar_row(0.3, 0.02, True)) == ["met"] * 6
    assert verdicts(bar_row(0.5, 0.04, True)) == ["NO", "NO", "met", "met", "NO", "met"]
    assert verdicts(bar_row(1.03, 0.0, True))[-1] == "NO" and verdicts(bar_row(1.03, 0.0, False))[-1] == "met"
    assert (
        verdicts(bar_row(0.3, 0.02, True, full=False), bar_row(0.3, 0.02, True, device="cpu")) == ["not measured"] * 6
    )
    assert verdicts(bar_row(0.3, 0.02, True, keep=0.33)) == ["not measured"] * 4 + ["met"] * 2
    assert verdicts({"geometry": "llava-next-7b", "full": True, "device": "H100", "reason": "does not fit"})[0] != "met"
