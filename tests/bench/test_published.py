"""Published tables: what a contributed file must hold, how it is made of lmms-eval's results, and what the table then says."""

from __future__ import annotations

import copy
import json
import re

import pytest

from bench import published

FOUND = {  # of a run of lmms-eval, as it writes it
    "results": {
        "gqa": {"alias": "gqa", "exact_match,none": 0.571, "exact_match_stderr,none": 0.01},
        "mme": {"mme_perception_score,none": 1400.5, "mme_cognition_score,none": 300.0},
        "textvqa_val": {"exact_match,none": 0.55, "submission,none": None},
        "mmbench_en_dev_static": {"gpt_eval_score,none": 61.2},
        "another": {"exact_match,none": 1.0},
    },
    "n-samples": {name: {"original": 9, "effective": 9} for name in ("gqa", "mme", "textvqa_val", "mmbench_en_dev_static")},
    "config": {"model": "crop", "limit": None,
               "model_args": "pretrained=llava-hf/llava-1.5-7b-hf,method=crop,keep=0.1111,localizer=attention"},
    "throughput": {"avg_vision_tokens": 576.0, "avg_vision_tokens_kept": 64.0, "avg_vision_tokens_average": 90.5},
    "lmms_eval_version": "0.7.3", "date": "20261130_112337",
}  # fmt: skip


@pytest.fixture
def made():
    return published.contribution(FOUND, "somebody", "one GPU", "0123abc")


def test_a_results_file_becomes_a_contribution(made):
    assert made["tasks"] == {"gqa": {"score": 57.1, "n": 9}, "mme": {"score": 1700.5, "n": 9},
                             "textvqa_val": {"score": 55.0, "n": 9}, "mmbench_en_dev_static": {"score": 61.2, "n": 9}}  # fmt: skip
    assert (made["model"], made["method"], made["keep"]) == ("llava-hf/llava-1.5-7b-hf", "crop", 0.1111)
    assert made["tokens"] == {"vision_tokens": 576, "vision_tokens_kept": 64, "vision_tokens_average": 90.5}
    assert json.loads(json.dumps(made)) == made


@pytest.mark.parametrize("change, message", [
    ({"config": {**FOUND["config"], "model": "llava_hf"}}, "must be of --model crop, got 'llava_hf'"),
    ({"config": {**FOUND["config"], "limit": 8}}, "must be of all questions, got --limit 8"),
    ({"results": {"another": {}}}, "tasks must be given as Mapping, got {}"),
    ({"throughput": {}}, "tokens must hold vision_tokens, .* got .None, None, None"),
    ({"config": {**FOUND["config"], "model_args": "pretrained=a,method=mine"}}, "method must be among crop, .* got 'mine'"),
])  # fmt: skip
def test_runs_that_say_too_little_are_refused(change, message):
    with pytest.raises(ValueError, match=f"contributed: .*{message}"):
        published.contribution({**FOUND, **change}, "somebody", "one GPU", "0123abc")


@pytest.mark.parametrize("where, value, message", [
    (("by",), "", "by must be given as str, got ''"),
    (("keep",), 1.2, "keep must be in .0, 1., got 1.2"),
    (("note",), "x", "fields must be among model, .* got note"),
    (("tokens", "vision_tokens_kept"), 600, "tokens must hold .* got .576.0, 600, 90.5"),
    (("tasks", "gqa", "score"), 157.1, "score of gqa must be in .0, 100., got 157.1"),
    (("tasks", "gqa", "n"), 0, "n of gqa must be a number of questions, got 0"),
    (("tasks", "vizwiz"), {"score": 1, "n": 1}, "tasks must be among gqa, .* got 'vizwiz'"),
])  # fmt: skip
def test_what_cannot_be_is_named(made, where, value, message):
    content = copy.deepcopy(made)
    place = content
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    with pytest.raises(ValueError, match=f"contributed: {message}"):
        published.check(content)


def test_the_table_says_not_run_until_somebody_has(made, tmp_path):
    before = published.table("llava-1.5-7b", contributed=tmp_path)
    assert sum("not run" in line for line in before) == 4  # at every number of tokens, the unpruned model's among them
    assert set(re.findall(r"\| \S.* \[(\d+)\] \|", "\n".join(before))) == set(
        re.findall(r"^- \[(\d+)\]", "\n".join(before), re.M)
    )
    (tmp_path / "one.json").write_text(json.dumps(made))
    (line,) = set(published.table("llava-1.5-7b", contributed=tmp_path)) - set(before)
    assert (
        line
        == "| `method=crop`, attention, by somebody | 64 | 57.1 | 61.2 | 1700.5 | not run | not run | not run | 55 |"
    )
    (tmp_path / "two.json").write_text(json.dumps({**made, "keep": 2}))
    with pytest.raises(ValueError, match="keep must be in"):
        published.table("llava-1.5-7b", contributed=tmp_path)


def test_every_published_number_has_a_source():
    files = sorted(published.PUBLISHED.glob("*.json"))
    assert files
    for path in files:
        content = json.loads(path.read_text())
        assert set(content["columns"]) <= {task.name for task in published.TASKS.values()}
        assert {str(row["source"]) for row in content["rows"]} == content["sources"].keys()
        assert len({(row["method"], row["tokens"], row["source"]) for row in content["rows"]}) == len(content["rows"])
        for row in content["rows"]:
            assert str(row["tokens"]) in content["budgets"] and row["figures"].keys() <= set(content["columns"])
            assert row["figures"] and all(
                0 < score <= (2800 if name == "MME" else 100) for name, score in row["figures"].items()
            )
    for path in sorted(published.CONTRIBUTED.glob("*.json")):
        published.check(json.loads(path.read_text()))
