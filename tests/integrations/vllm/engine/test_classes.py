"""Every class of the table fits vLLM's own: names, processors, interfaces; and names of their own in an engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from crop.integrations.vllm.families import ENTRIES, REFUSED


@pytest.mark.parametrize("architecture", [*ENTRIES, *REFUSED])
def test_a_class_stands_before_vllms_own(architecture):
    from vllm.model_executor.models.interfaces import supports_mrope, supports_multimodal, supports_pp

    from crop.integrations.vllm import families
    from crop.integrations.vllm.model import PruningModel

    model = getattr(families, f"Crop{architecture}")
    assert model is getattr(families, f"Crop{architecture}") and model.__name__ == f"Crop{architecture}"
    stock = next(one for one in model.__mro__ if one.__module__.startswith("vllm.model_executor.models."))
    assert issubclass(model, PruningModel) == (architecture in ENTRIES)
    assert supports_multimodal(model) and supports_pp(model) == supports_pp(stock)
    if architecture in ENTRIES:
        assert supports_mrope(model)
    assert model._processor_factory is not stock._processor_factory
    assert model._processor_factory.info is stock._processor_factory.info


def test_own_names_serve_as_vllms_do():
    """In a process of its own: vLLM loads plug-ins once."""
    options = json.dumps({"hf_overrides": {"architectures": ["CropLlavaForConditionalGeneration"]}})
    command = [sys.executable, "-m", "tests.integrations.vllm.engine.families", "llava", "--options", options]
    ran = subprocess.run(command, env=os.environ | {"CROP_VLLM": "explicit"}, capture_output=True, text=True)
    assert "51 of 51 answers equal" in ran.stdout and ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
