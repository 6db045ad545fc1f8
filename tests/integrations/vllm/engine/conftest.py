"""Engines are started by run_engine.sh alone: they need an environment of their own, memory and minutes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

WANTED = os.environ.get("CROP_ENGINE") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip with a reason, unless the script asks: then a missing engine is an error."""
    if WANTED and importlib.util.find_spec("vllm") is None:
        raise pytest.UsageError("CROP_ENGINE=1: vllm must be installed; run tests/integrations/vllm/run_engine.sh")
    for item in items:
        if not WANTED and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs vLLM: tests/integrations/vllm/run_engine.sh"))
