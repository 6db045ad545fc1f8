"""One family through the engine against `crop.patch`: `python -m tests.integrations.vllm.engine.families NAME ...`.

Each family gets an engine of its own, in a process of its own. `all` runs every family; the log is committed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.integrations.vllm.engine.models import MODELS


def check(name: str, options: dict, positions: str) -> int:
    """Print one line about a family; how many cases differ."""
    from tests.integrations.vllm.engine import cases, models

    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        model, processor = models.build(name, Path(folder))
        prompts = [cases.prompt_of(name, case) for case in cases.CASES]
        wanted = [
            cases.answer(model, processor, *prompt, case, positions)
            for prompt, case in zip(prompts, cases.CASES, strict=True)
        ]
        if positions != "original":
            options = {"hf_overrides": {"crop": {"positions": positions}}, **options}
        llm = cases.start(folder, **options)
        requests = [cases.request_of(name, case) for case in cases.CASES]
        alone = [cases.ask(llm, [request])[0] for request in requests]  # cold for the first of each picture only
        again = cases.ask(llm, requests)  # one batch, cached
        llm.reset_prefix_cache()
        cold = cases.ask(llm, requests)
    wrong = 0
    for kind, found in (("alone", alone), ("cached", again), ("batch", cold)):
        for case, got, want in zip(cases.CASES, found, wanted, strict=True):
            text = cases.compare(got, want)
            if text:
                wrong += 1
                print(f"  {name}, {kind}, {case}: {text}")
    apart = max(
        abs(a - b) for got, want in zip(cold, wanted, strict=True) for a, b in zip(got[1], want[1], strict=True)
    )
    hits = sum(got[3] or 0 for got in again)
    lengths = [alone[0][2], alone[1][2]]
    print(
        f"{name:<14} {3 * len(cases.CASES) - wrong:>3} of {3 * len(cases.CASES)} equal, log-probabilities within "
        f"{apart:.0e}, prompt {lengths[0]} -> {lengths[1]} tokens at 11 %, {hits} tokens from the prefix cache, "
        f"{len({tuple(want[0]) for want in wanted})} different answers, {time.time() - begin:.0f} s",
        flush=True,
    )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.integrations.vllm.engine.families")
    parser.add_argument("names", nargs="+", help="families, or all")
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of vllm.LLM, JSON")
    parser.add_argument("--positions", default="original")
    given = parser.parse_args()
    if len(given.names) == 1 and given.names != ["all"]:
        sys.exit(bool(check(given.names[0], given.options, given.positions)))
    names = list(MODELS) if given.names == ["all"] else given.names
    more = ["--options", json.dumps(given.options), "--positions", given.positions]
    failed = [name for name in names if subprocess.run([sys.executable, "-m", __spec__.name, name, *more]).returncode]
    print(
        f"{len(names) - len(failed)} of {len(names)} families equal" + (f"; not: {', '.join(failed)}" if failed else "")
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
