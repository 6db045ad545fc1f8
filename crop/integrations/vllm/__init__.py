"""Plug-in for vLLM: images are pooled before the language model, with a region per request (README.md beside this file).

vLLM loads it by the entry point ``vllm.general_plugins``, in every one of its processes; nothing else of crop does.
"""

from __future__ import annotations

import os

# That the tests ran on: what is overridden here is private to vLLM and moves between releases.
VERSIONS = ("0.32", "0.33")


def register() -> None:
    """Put pruned classes in the place of vLLM's own; with ``CROP_VLLM=explicit`` only beside them, as ``Crop...``.

    Raises:
        RuntimeError: another version of vLLM. ValueError: another value of CROP_VLLM.
    """
    import vllm

    check_version(vllm.__version__)
    wanted = os.environ.get("CROP_VLLM", "")
    if wanted not in ("", "explicit"):
        raise ValueError(f"crop: CROP_VLLM must be 'explicit' or not set, got {wanted!r}")
    from crop.integrations.vllm.families import ENTRIES, REFUSED, target
    from crop.integrations.vllm.start import prepare_configs

    for name in ENTRIES:
        vllm.ModelRegistry.register_model(f"Crop{name}", target(name))
    names = [f"Crop{name}" for name in ENTRIES]
    if not wanted:
        for name in (*ENTRIES, *REFUSED):
            vllm.ModelRegistry.register_model(name, target(name))
        names += ENTRIES
    prepare_configs(names)


def check_version(version: str) -> None:
    """Refuse versions of vLLM that the tests did not run on: RuntimeError."""
    if not any(version == known or version.startswith(f"{known}.") for known in VERSIONS):
        raise RuntimeError(
            f"crop: vllm must be of version {' or '.join(VERSIONS)}, got {version}; install one of these, or start vLLM "
            "without the plug-in (VLLM_PLUGINS='')"
        )
