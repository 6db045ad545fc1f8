"""What is made of the answers: intervals, paired tests, tables, and README saying what the JSON says."""

from __future__ import annotations

import json
import random
import shutil
from functools import cache

import numpy as np
import pytest

pytest.importorskip("tqdm")


from bench import readme  # noqa: E402
from bench.accuracy import statistics, summary, tables  # noqa: E402
from bench.headline import PREFILL, SETS, headline  # noqa: E402
from bench.pictures import BUDGETS  # noqa: E402


def test_interval_covers_and_narrows():
    rng = np.random.default_rng(1)
    base, alone = np.ones(400), [str(n) for n in range(400)]
    scores = (rng.random(400) < 0.8).astype(float)
    low, high = statistics.interval(scores, base, alone)
    few = statistics.interval(scores[:40], base[:40], alone[:40])
    assert low < scores.mean() < high and high - low < few[1] - few[0]
    assert statistics.interval(base, base, alone) == (1.0, 1.0)


def test_questions_of_one_picture_count_once():
    """Four copies of every answer say no more than one of each."""
    scores = (np.random.default_rng(2).random(100) < 0.7).astype(float)
    once = statistics.interval(scores, np.ones(100), [str(n) for n in range(100)])
    copies, pictures = scores.repeat(4), [str(n // 4) for n in range(400)]
    assert statistics.interval(copies, np.ones(400), pictures) == once
    assert statistics.difference_interval(copies - 1, pictures) == pytest.approx([end - 1 for end in once])


@pytest.mark.parametrize("wins,losses,p", [(0, 0, 1.0), (5, 0, 0.0625), (1, 9, 0.021484375), (6, 6, 1.0)])
def test_exact_test_by_hand(wins, losses, p):
    ahead = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 7)
    assert statistics.exact_test(ahead, [str(n) for n in range(len(ahead))]) == pytest.approx(p)
    pictures = [str(n // 3) for n in range(3 * len(ahead))]  # three questions of each picture that agree count once
    assert statistics.exact_test(ahead.repeat(3), pictures) == pytest.approx(p)


def test_questions_needed_show_the_difference_as_often_as_promised():
    """Of data sets of that size, four fifths give p < 0.05."""
    ahead = np.array([1.0] * 12 + [-1.0] * 4 + [0.0] * 84)
    alone = [str(n) for n in range(1000)]
    needed, rng = statistics.questions_needed(ahead, alone[:100]), np.random.default_rng(0)
    shown = [statistics.exact_test(rng.choice(ahead, needed), alone[:needed]) < 0.05 for _ in range(400)]
    assert 150 < needed < 260 and 0.7 < np.mean(shown) < 0.88
    copies = statistics.questions_needed(ahead.repeat(4), [str(n // 4) for n in range(400)])
    assert 4 * (needed - 1) <= copies <= 4 * needed  # four questions that always agree say what one does
    assert statistics.questions_needed(np.array([1.0, -1.0, 0.0]), alone[:3]) is None


def test_hard_questions_are_those_that_down_sampling_gets_wrong():
    rows = made_rows()
    easy = [{**row, "job": "down-sampled image|0.11|average", "score": float(int(row["item"]) < 30)}
            for row in rows if row["job"].startswith("unpruned")]  # fmt: skip
    (cell,) = (
        row
        for row in summary.summarise(rows + easy, {})
        if row["group"] == summary.HARD and row["contender"] == "uniform"
    )
    mine = [row["score"] for row in rows if row["job"].startswith("uniform") and int(row["item"]) >= 30]
    assert cell["n"] == 10 and cell["score"] == pytest.approx(np.mean(mine))
    of_all, all_again, of_hard = summary.leads(rows + easy, ["both, predicted"], ["uniform"])
    assert summary.finalists(rows + easy, ["both, predicted"], ["uniform"]) == {
        "unpruned|1|", "uniform|0.11|average", "both, predicted|0.11|average", "down-sampled image|0.11|average"}  # fmt: skip
    assert (of_all["n"], of_hard["n"], of_hard["group"]) == (40, 10, summary.HARD)
    assert all_again == {**of_all, "group": summary.NO_PLACES}  # none of these asks for a place
    placed = [{**row, "group": "grounding"} if int(row["item"]) % 4 == 0 else row for row in rows + easy]
    counts = {lead["group"]: lead["n"] for lead in summary.leads(placed, ["both, predicted"], ["uniform"])}
    assert counts == {summary.OVERALL: 40, summary.NO_PLACES: 30, summary.HARD: 8}


def made_rows() -> list[dict]:
    rng, rows = random.Random(0), []
    for job, chance in (("unpruned|1|", 1.0), ("uniform|0.11|average", 0.5), ("both, predicted|0.11|average", 0.9)):
        for item in range(40):
            right = float(rng.random() < chance)
            rows.append({"job": job, "item": str(item), "picture": str(item // 2), "group": ("a", "b")[item % 2], "answer": "", "score": right,
                         "entering": 28, "tokens": 28, "average": 28.0, "before": 256, "whole": False})  # fmt: skip
    return rows


def test_leads_are_paired_differences_and_the_strongest_rival_comes_first():
    rows = made_rows()
    weak = [{**row, "job": "random|0.11|average", "score": 0.0} for row in rows if row["job"].startswith("uniform")]
    # A rival that answered half of the questions is compared on those.
    lead, other, *_ = summary.leads(rows + weak[:20], ["both, predicted"], ["random", "uniform"])
    score = {job: np.mean([row["score"] for row in rows if row["job"] == job]) for job in {row["job"] for row in rows}}
    gap = score["both, predicted|0.11|average"] - score["uniform|0.11|average"]
    assert (lead["contender"], lead["baseline"], lead["budget"]) == ("both, predicted", "uniform", 0.11)
    assert (
        lead["lead"] == pytest.approx(gap / score["unpruned|1|"], abs=1e-4)
        and 0 < lead["low"] < lead["lead"] < lead["high"]
    )
    mine = [row["score"] for row in rows if row["job"].startswith("both") and int(row["item"]) < 20]
    assert (other["baseline"], other["n"], other["lead"]) == ("random", 20, pytest.approx(np.mean(mine)))
    assert summary.leads(rows, ["both, predicted"], ["tome"]) == []  # nobody to compare with


def test_in_equal_time_a_rival_keeps_as_much_as_it_can():
    rows = made_rows()
    large = [{**row, "job": "uniform|0.5|average", "score": 1.0} for row in rows if row["job"].startswith("uniform")]
    larger = [{**row, "job": "uniform|0.7|average"} for row in large]
    times = {
        "both, predicted|0.11|average": 0.6,
        "uniform|0.11|average": 0.4,
        "uniform|0.5|average": 0.62,  # as good as the same
        "uniform|0.7|average": 0.64,
    }
    times = {job: {"ms": 1.0, "ratio": ratio} for job, ratio in times.items()}
    lead, *_ = summary.leads(rows + large + larger, ["both, predicted"], ["uniform", "tome"], times)
    assert (lead["baseline"], lead["budget"], lead["against"]) == ("uniform", 0.11, 0.5) and lead["lead"] < 0
    made = {"leads in time": [lead], "pictures": {"tokens": 576}}
    assert "uniform with 288 tokens" in tables.leads_in_time(made)[2]


def test_summary_and_time(tmp_path):
    times = {
        "uniform|0.11|average": {"ms": 5.0, "ratio": 0.5},
        "both, predicted|0.11|average": {"ms": 8.0, "ratio": 0.8},
    }
    rows = summary.summarise(made_rows(), times)
    found = summary.grid(rows, summary.OVERALL, "average", [0.11])
    assert found["both, predicted"][0.11]["relative"] > found["uniform"][0.11]["relative"]
    assert found["uniform"][0.11]["average"] == pytest.approx(28 / 256, abs=1e-4)
    within = {row["contender"]: row for row in summary.at_time(rows, summary.OVERALL, (0.6, 1.0))}
    assert within["both, predicted"]["0.6"] is None and within["both, predicted"]["1"] is not None
    with pytest.raises(ValueError, match="unpruned model's answers"):
        summary.summarise([row for row in made_rows() if not row["job"].startswith("unpruned")], {})
    pytest.importorskip("matplotlib")
    for axis in ("average", "time"):
        summary.plot(rows, summary.OVERALL, tmp_path / f"{axis}.png", axis)
        assert (tmp_path / f"{axis}.png").stat().st_size > 10_000


# -------------------------------------------------------------------------------------------------------------- README
def test_readme_says_what_the_results_say():
    pages = [page.read_text(encoding="utf-8") for page in readme.PAGES]
    for text in pages:
        assert readme.rewrite(text) == text, "run python -m bench.readme"
    for name in readme.TABLES:
        assert any(readme.marks(name)[0] in text for text in pages), f"table {name} is made for nobody"


def test_headline_shows_losing_rows(tmp_path):
    for name in (*PREFILL, "stages.json", "small.json"):
        shutil.copy(readme.RESULTS / name, tmp_path)
    for seed, name in enumerate(SETS):
        (tmp_path / name).write_text(json.dumps(set_of(0.4, seed)))
    rows = headline(tmp_path)[2:]
    assert len(rows) == 5 and "times as slow" in rows[-1]
    assert all(" (-" in row and "points" in row for row in rows[:2])


def test_a_changed_figure_is_noticed(tmp_path):
    rows = summary.summarise(made_rows(), {})
    (tmp_path / "accuracy_1.json").write_text(json.dumps({"rows": rows, "pictures": {"tokens": 576}}))
    begin, end = readme.marks("accuracy")
    made = readme.rewrite(f"before\n{begin}\n{end}\nafter\n", tmp_path)
    assert made.startswith(f"before\n{begin}\n| % of") and made.endswith(f"|\n{end}\nafter\n")
    assert readme.rewrite(made, tmp_path) == made
    figure = f"{100 * summary.grid(rows, summary.OVERALL, 'average', [0.11])['uniform'][0.11]['relative']:.1f}"
    assert figure in made
    forged = made.replace(f"| {figure} |", "| 99.9 |")
    assert forged != made and readme.rewrite(forged, tmp_path) == made


def test_a_table_of_what_has_not_been_run_says_so(tmp_path):
    begin, end = readme.marks("leads")
    assert readme.rewrite(f"{begin}\n{end}", tmp_path) == (
        f"{begin}\nNot run yet: no accuracy_1.json and no accuracy_2.json.\n{end}"
    )


def content(rows: list[dict], times: dict | None = None) -> dict:
    """A results file, as the bench writes it."""
    made = {"rows": summary.summarise(rows, times or {}), "pictures": {"tokens": 576}}
    return made | {"leads": summary.leads(rows, ["both, predicted"], ["uniform", "random", "down-sampled image"])}


@cache
def set_of(plc: float, seed: int) -> dict:
    """Two hundred questions: PLC right with a chance, uniform half as often, at every budget."""
    rng, rows = random.Random(seed), []
    for budget in BUDGETS:
        for job, chance in (("both, predicted", plc), ("uniform", 0.5), ("down-sampled image", 0.3)):
            for item in range(200):
                rows.append({"job": f"{job}|{budget:g}|average", "item": str(item), "picture": str(item // 2),
                             "group": ("grounding", "global")[item % 2], "answer": "", "score": float(rng.random() < chance),
                             "entering": 576 * budget, "tokens": 64, "average": 576 * budget, "before": 576, "whole": False})  # fmt: skip
    whole = {"entering": 576, "tokens": 576, "average": 576.0, "score": 1.0, "job": "unpruned|1|"}
    return content([*rows, *({**row, **whole} for row in rows[:200])])


def test_targets_are_met_or_missed_on_both_sets():
    good, bad = set_of(1.0, 0), set_of(0.9, 1)
    lines = tables.targets(good, good)[2:]
    assert len(lines) == 7 and all(line.endswith("met |") for line in lines)
    assert [line.split("|")[1].split(":")[0].strip() for line in lines[:4]] == [
        f"{n} tokens" for n in (192, 128, 64, 32)
    ]
    lines = tables.targets(good, bad)[2:]
    assert [line.endswith("met |") for line in lines] == [False] * 4 + [True] * 2 + [False]
    assert "100.0 (100.0 to 100.0)" in lines[0] and ", uniform" in lines[4]


def test_a_lead_holds_where_it_is_there_on_both_sets():
    made = tables.leads_of_two(set_of(0.9, 0), set_of(0.9, 1))[2:]
    groups = [line.split("|")[3].strip() for line in made if line.split("|")[1].strip() == "64 tokens"]
    assert groups == [summary.OVERALL, summary.NO_PLACES, summary.HARD] and len(made) == 12
    assert all(line.endswith("yes |") for line in made)
    assert all(line.endswith("no |") for line in tables.leads_of_two(set_of(0.9, 0), set_of(0.4, 1))[2:])
    # One rival that is ahead on both sets is enough, whoever is the strongest.
    assert all(line.endswith("behind |") for line in tables.leads_of_two(set_of(0.1, 0), set_of(0.1, 1))[2:10:3])


def test_tables_say_what_enters_the_decoder_and_how_many_were_asked():
    rows = made_rows()
    late = [{**row, "job": "fastv|0.11|average", "entering": 256} for row in rows if row["job"].startswith("uniform")]
    few = [{**row, "job": "tome|0.11|average"} for row in rows if row["job"].startswith("uniform")][:30]
    text = tables.accuracy(content(rows + late + few))
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text}
    assert cells["fastv"][0] == "40" and cells["fastv"][1].endswith("(100% enter)") and cells["tome"][0] == "30"
    assert "enter" not in cells["uniform"][1]


def test_time_includes_what_every_contender_needs():
    rows = made_rows()
    times = {
        "uniform|0.11|average": {"ms": 5.0, "ratio": 0.55},
        "both, predicted|0.11|average": {"ms": 8.0, "ratio": 0.8},
    }
    lines = tables.accuracy_time(content(rows, times))
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert summary.SHARES[:2] == (0.7, 0.6)
    assert (
        cells["both, predicted"] == ["-"] * 7
        and cells["uniform"][0] == cells["uniform"][1] != "-" == cells["uniform"][2]
    )


@pytest.mark.parametrize("text", ["<!-- table no-such -->\n<!-- end no-such -->", "<!-- table accuracy -->\n"])
def test_wrong_marks_raise(text):
    with pytest.raises(ValueError, match="rewrite: "):
        readme.rewrite(text)
