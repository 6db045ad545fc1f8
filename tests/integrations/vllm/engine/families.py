"""Families through the engine against `crop.patch`: `python -m tests.integrations.vllm.engine.families NAME ...`, or `all`.

Every family answers all of `cases.CASES` one by one, then as one batch from the prefix cache, then as one batch without it.
The log of `run_engine.sh families` is committed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.integrations.vllm.engine import cases, models


def check(name: str, options: dict[str, Any], positions: str) -> int:
    """Print a line about one family, and one about each answer that differs; how many differ."""
    begin = time.time()
    if positions != "original":
        options = {"hf_overrides": {"crop": {"positions": positions}}, **options}
    with tempfile.TemporaryDirectory() as folder:
        half = options.get("dtype") == "bfloat16"
        model, processor = models.build(name, Path(folder), torch.bfloat16 if half else torch.float32)
        prompts = [cases.prompt_of(name, case) for case in cases.CASES]

        def answers() -> list[tuple]:
            pairs = zip(prompts, cases.CASES, strict=True)
            return [cases.answer(model, processor, *prompt, case, positions) for prompt, case in pairs]

        own, tolerance = answers() if half else None, 1e-4
        model.float()
        wanted = answers()
        if half:  # twice what rounding does to transformers' own answers
            tolerance = 2 * max(map(cases.rounding, own, wanted))
        llm = cases.start(folder, **options)
        requests = [cases.request_of(name, case) for case in cases.CASES]
        found = {"alone": [cases.ask(llm, [request])[0] for request in requests], "cached": cases.ask(llm, requests)}
        llm.reset_prefix_cache()
        found["batch"] = cases.ask(llm, requests)
    wrong, apart = 0, 0.0
    for kind, answers in found.items():
        for case, got, want in zip(cases.CASES, answers, wanted, strict=True):
            text = cases.compare(got, want, tolerance)
            apart = max(apart, cases.rounding(got, want))
            if text:
                wrong += 1
                print(f"  {name}, {kind}, {case}: {text}")
    whole, pruned = (found["batch"][number][2] for number in (0, 1))
    print(
        f"{name:<13} {3 * len(cases.CASES) - wrong} of {3 * len(cases.CASES)} answers equal, log-probabilities within "
        f"{apart:.0e} (allowed {tolerance:.0e}); prompt {whole} -> {pruned} tokens at 11 %; {sum(got[3] or 0 for got in found['cached'])} tokens "
        f"from the prefix cache; {len({tuple(want[0]) for want in wanted})} different answers; {time.time() - begin:.0f} s",
        flush=True,
    )
    return wrong


def stop() -> None:
    """End this process's engine, whose last reference is gone."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def without_inspection() -> None:
    """Import the plug-in's classes here: vLLM would start a process of its own for each, to look at it."""
    import vllm
    from vllm.plugins import load_general_plugins

    from crop.integrations.vllm import families

    load_general_plugins()
    for name in families.ENTRIES:
        vllm.ModelRegistry.register_model(name, getattr(families, f"Crop{name}"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.integrations.vllm.engine.families")
    parser.add_argument("names", nargs="+", help="families, or all that run in float32")
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of vllm.LLM, JSON")
    parser.add_argument("--positions", default="original")
    given = parser.parse_args()
    every = [name for name, model in models.MODELS.items() if not model.half]
    names, failed = every if given.names == ["all"] else given.names, []
    if len(names) > 1:
        without_inspection()
    for name in names:
        try:
            if check(name, given.options, given.positions):
                failed.append(name)
        except Exception as error:  # the next family is another matter
            failed.append(name)
            print(f"{name:<13} {type(error).__name__}: {error}"[:600], flush=True)
            traceback.print_exc()
        stop()
    print(f"{len(names) - len(failed)} of {len(names)} equal" + (f"; not: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
