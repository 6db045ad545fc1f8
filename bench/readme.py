"""Write the tables of the README files from the figures in bench/results, so that no number is typed by hand.

    python -m bench.readme            # rewrite
    python -m bench.readme --check    # only say what differs

A table stands between ``<!-- table NAME -->`` and ``<!-- end NAME -->``; its maker is an entry of ``TABLES``. To add one:
write a function from the JSON's content to lines of Markdown, name its file, and put the two marks into a README.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import published
from bench.accuracy import tables as accuracy
from bench.common import ROOT, markdown
from bench.headline import headline
from bench.kernels import tables as kernels
from bench.latency import tables as latency
from bench.localizers import tables as localizers

RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md", RESULTS / "published" / "README.md")


def _of(make: Callable[..., list[str]], *files: str) -> Callable[[Path], list[str]]:
    """A maker that reads files of the folder of results; of what has not been run yet the table says so."""

    def made(results: Path) -> list[str]:
        missing = [file for file in files if not (results / file).exists()]
        if missing:
            return [f"Not run yet: no {' and no '.join(missing)}."]
        return make(*(json.loads((results / file).read_text()) for file in files))

    return made


def runs(results: Path) -> list[str]:
    """Which commit, on which versions and threads, each file of the folder comes from."""
    table = []
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        facts = content["machine"]
        commits = ", ".join(content.get("commits") or [facts["commit"]])
        versions = (facts[name] for name in ("threads", "load", "python", "torch", "transformers"))
        table.append([f"[{path.name}](results/{path.name})", commits, *versions])
    return markdown(["file", "commit", "threads", "load", "Python", "torch", "transformers"], table)


def _published(model: str, results: Path) -> list[str]:
    return published.table(model, results / "published", results / "contributed")


TABLES: dict[str, Callable[[Path], list[str]]] = {
    "headline": headline,
    "runs": runs,
    "accuracy": _of(accuracy.accuracy, "accuracy_1.json"),
    "accuracy-2": _of(accuracy.accuracy, "accuracy_2.json"),
    "targets": _of(accuracy.targets, "accuracy_1.json", "accuracy_2.json"),
    "leads": _of(accuracy.leads_of_two, "accuracy_1.json", "accuracy_2.json"),
    "hard": _of(accuracy.accuracy_hard, "accuracy_1.json"),
    "averaged": _of(accuracy.accuracy_averaged, "accuracy_1.json"),
    "kept": _of(accuracy.accuracy_kept, "accuracy_cut.json"),
    "region-part": _of(accuracy.leads_of_the_region, "accuracy_1.json"),
    "groups": _of(accuracy.accuracy_groups, "accuracy_1.json"),
    "time": _of(accuracy.accuracy_time, "accuracy_1.json"),
    "time-leads": _of(accuracy.leads_in_time, "accuracy_1.json"),
    "regions": _of(accuracy.regions, "regions.json"),
    "encoder": _of(accuracy.encoder, "encoder.json"),
    "layers": _of(accuracy.layers, "layers.json"),
    "layers-groups": _of(accuracy.layers_groups, "layers.json"),
    "pooling": _of(accuracy.pooling, "pooling.json"),
    "pooling-sides": _of(accuracy.pooling_sides, "pooling.json"),
    "real": _of(accuracy.real, "real.json"),
    **{
        f"published-{path.stem}": partial(_published, path.stem)
        for path in sorted((RESULTS / "published").glob("*.json"))
    },
    "receipts": _of(accuracy.receipts, "receipts.json"),
    "e2e": _of(latency.e2e, "e2e.json"),
    "e2e-bars": _of(latency.bars, "e2e.json"),
    "prefill-576": _of(latency.prefill, "prefill_576.json"),
    "prefill-2880": _of(latency.prefill, "prefill_2880.json"),
    "attention-pass": _of(latency.attention_pass, "prefill_576.json"),
    "first-token": _of(latency.first_token, "first_token.json"),
    "stages": _of(latency.stages, "stages.json"),
    "stages-wide": _of(latency.stages, "stages_wide.json"),
    "small": _of(latency.small, "small.json"),
    "planning": _of(latency.planning, "planning.json"),
    "scale": _of(latency.scale, "scale.json"),
    "serving": _of(latency.serving, "serving.json"),
    "ops": _of(kernels.ops, "ops.json"),
    "ops-region-topk": _of(kernels.ops, "ops_region_topk.json"),
    "localizers": _of(localizers.localizers, "localizers.json"),
    "head-cost": _of(localizers.head_cost, "localizers.json"),
}


def marks(name: str) -> tuple[str, str]:
    """The two lines around a table."""
    return f"<!-- table {name} -->", f"<!-- end {name} -->"


def rewrite(text: str, results: Path = RESULTS) -> str:
    """A page with every table made anew.

    Args:
        text: the page as it is. results: folder of the JSON files.
    Raises:
        ValueError: a mark of an unknown table, or one without its end.
    """
    for name in re.findall(r"<!-- table (\S+) -->", text):
        if name not in TABLES:
            raise ValueError(f"rewrite: table must be one of {', '.join(TABLES)}, got {name!r}")
        begin, end = marks(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise ValueError(f"rewrite: {begin} must stand once and be followed by {end}, got another order or number")
        inside = "\n".join(TABLES[name](results))
        text = f"{text[: text.index(begin)]}{begin}\n{inside}\n{text[text.index(end) :]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if something differs")
    options = parser.parse_args()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        made = rewrite(text)
        if options.check and made != text:
            sys.exit(f"{path.relative_to(ROOT)} differs from bench/results: run python -m bench.readme")
        if not options.check:
            path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
