"""Published tables: numbers of others, and what users of real checkpoints contribute, in one table each.

    python -m bench.published results/llava-1.5-7b/*_results.json --by NAME --machine "one A100 80 GB"
    python -m bench.readme

The first makes ``bench/results/contributed/MODEL-METHOD-TOKENS.json`` of a results file of lmms-eval, the second the table. What
a file must hold is said by ``check``; numbers of others stand in ``bench/results/published``, each with its source.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import ROOT, markdown
from crop.methods import method_names

PUBLISHED, CONTRIBUTED = (ROOT / "bench" / "results" / name for name in ("published", "contributed"))


class Task(NamedTuple):
    """A column: what it is called, and of which figures of lmms-eval it is the sum, times what."""

    name: str
    metrics: tuple[str, ...]
    times: float = 100.0


TASKS = {
    "gqa": Task("GQA", ("exact_match",)),
    "mmbench_en_dev_static": Task("MMB", ("gpt_eval_score",), 1.0),
    "mme": Task("MME", ("mme_perception_score", "mme_cognition_score"), 1.0),
    "pope": Task("POPE", ("pope_f1_score",)),
    "scienceqa_img": Task("SQA", ("exact_match",)),
    "vqav2_val": Task("VQAv2", ("exact_match",)),
    "textvqa_val": Task("TextVQA", ("exact_match",)),
    "docvqa_val": Task("DocVQA", ("anls",)),
    "ocrbench": Task("OCRBench", ("ocrbench_accuracy",)),
    "refcoco_bbox_rec_val": Task("RefCOCO", ("refcoco_ACC@0.5",)),
    "refcoco_grounding_testA": Task("RefCOCO A", ("refcoco_grounding_ACC@0.5",)),
}
FIELDS = {"model": str, "method": str, "keep": Real, "localizer": str, "tokens": Mapping, "tasks": Mapping,
          "command": str, "commit": str, "versions": Mapping, "by": str, "machine": str, "date": str}  # fmt: skip
COUNTS = ("vision_tokens", "vision_tokens_kept", "vision_tokens_average")


def check(content: Mapping[str, Any]) -> None:
    """Refuse a contributed file that does not say enough, or something impossible: ValueError that names the field.

    It holds ``FIELDS``; ``tokens`` has the mean ``COUNTS`` per question, in descending order but for the average; ``tasks`` has for
    each of ``TASKS`` that was run ``score`` (0 to 100, of MME 0 to 2800) and ``n``, the questions.
    """
    for name, kind in FIELDS.items():
        if not isinstance(content.get(name), kind) or content[name] in ("", {}):
            raise ValueError(f"contributed: {name} must be given as {kind.__name__}, got {content.get(name)!r}")
    if unknown := set(content) - set(FIELDS):
        raise ValueError(f"contributed: fields must be among {', '.join(FIELDS)}, got {', '.join(sorted(unknown))}")
    if content["method"] not in method_names():
        raise ValueError(f"contributed: method must be among {', '.join(method_names())}, got {content['method']!r}")
    if not 0 < content["keep"] <= 1:
        raise ValueError(f"contributed: keep must be in (0, 1], got {content['keep']}")
    counts = [content["tokens"].get(name) for name in COUNTS]
    if not all(isinstance(count, Real) for count in counts) or not 0 < counts[1] <= counts[2] <= counts[0]:
        raise ValueError(f"contributed: tokens must hold {', '.join(COUNTS)}, the average between, got {counts}")
    for name, task in content["tasks"].items():
        if name not in TASKS:
            raise ValueError(f"contributed: tasks must be among {', '.join(TASKS)}, got {name!r}")
        score, number, highest = task.get("score"), task.get("n"), 2800 if name == "mme" else 100
        if not isinstance(score, Real) or not 0 <= score <= highest:
            raise ValueError(f"contributed: score of {name} must be in [0, {highest}], got {score!r}")
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"contributed: n of {name} must be a number of questions, got {number!r}")


def contribution(found: Mapping[str, Any], by: str, machine: str, commit: str) -> dict[str, Any]:
    """A contributed file, of what ``python -m lmms_eval --model crop`` wrote to ``*_results.json``.

    Raises:
        ValueError: a run of another model, of a part of the questions, without any of ``TASKS``; what ``check`` refuses.
    """
    config = found["config"]
    if config["model"] != "crop":
        raise ValueError(f"contributed: results must be of --model crop, got {config['model']!r}")
    if config.get("limit") is not None:
        raise ValueError(f"contributed: results must be of all questions, got --limit {config['limit']}")
    given = dict(part.split("=", 1) for part in config["model_args"].split(","))
    tasks = {}
    for name in TASKS.keys() & found["results"].keys():
        figures = [found["results"][name].get(f"{metric},none") for metric in TASKS[name].metrics]
        if all(isinstance(figure, Real) for figure in figures):
            number = found["n-samples"][name]["effective"]
            tasks[name] = {"score": round(TASKS[name].times * sum(figures), 2), "n": number}
    counts = {name: found.get("throughput", {}).get(f"avg_{name}") for name in COUNTS}
    content = {
        "model": given.get("pretrained", "embedded"),
        "method": given.get("method", "crop"),
        "keep": 1.0 if given.get("method") == "none" else float(given.get("keep", 0.11)),
        "localizer": given.get("localizer", "attention"),
        "tokens": counts,
        "tasks": tasks,
        "command": f"--model_args {config['model_args']}",
        "commit": commit,
        "versions": {"lmms_eval": str(found.get("lmms_eval_version"))},
        "by": by,
        "machine": machine,
        "date": str(found["date"])[:8],
    }
    check(content)
    return content


def table(model: str, published: Path = PUBLISHED, contributed: Path = CONTRIBUTED) -> list[str]:
    """One model: rows of others by number of tokens, ours beside them, "not run" where nobody has run them, and the sources below.

    Args:
        model: name of a file of ``published``, which holds ``model``, ``columns`` (names of tasks), ``budgets`` (tokens that
            are kept, or a share in words, with the fraction that ``keep`` takes), ``sources`` (text by number) and ``rows`` (method,
            tokens, source, figures by column).
        contributed: folder of files as ``contribution`` makes them.
    """
    content = json.loads((published / f"{model}.json").read_text())
    given = [json.loads(path.read_text()) for path in sorted(contributed.glob("*.json"))]
    for one in given:
        check(one)
    names = {task.name: key for key, task in TASKS.items()}
    out = []
    for tokens, keep in content["budgets"].items():
        for row in (row for row in content["rows"] if str(row["tokens"]) == tokens):
            cells = (row["figures"].get(column) for column in content["columns"])
            out.append([f"{row['method']} [{row['source']}]", tokens, *("-" if c is None else f"{c:g}" for c in cells)])
        mine = [one for one in given if one["model"] == content["model"] and abs(one["keep"] - keep) < 0.001]
        for one in mine or [{"method": "none" if keep == 1 else "crop", "tasks": {}, "by": ""}]:
            label = f"`method={one['method']}`" + (f", {one['localizer']}, by {one['by']}" if one["by"] else "")
            scores = (one["tasks"].get(names[column]) for column in content["columns"])
            out.append([label, tokens, *("not run" if s is None else f"{s['score']:g}" for s in scores)])
    sources = [f"- [{number}] {text}" for number, text in content["sources"].items()]
    return [*markdown([content["title"], "tokens", *content["columns"]], out), "", *sources]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="*_results.json of lmms-eval, run with --model crop")
    parser.add_argument("--by", required=True, help="who ran it")
    parser.add_argument("--machine", required=True, help="on what, in words")
    parser.add_argument("--out", type=Path, help="default: bench/results/contributed/MODEL-METHOD-TOKENS.json")
    options = parser.parse_args()
    from bench.common import commit

    made = contribution(json.loads(options.results.read_text()), options.by, options.machine, commit())
    model = re.sub(r"[^a-z0-9.]+", "-", made["model"].rpartition("/")[2].lower())
    name = f"{model}-{made['method']}-{made['tokens']['vision_tokens_kept']:.0f}.json"
    path = options.out or CONTRIBUTED / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
