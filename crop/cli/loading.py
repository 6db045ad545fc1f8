"""The model that answers, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from crop.cli.options import UsageError
from crop.localizers.pretrained import damage, explain, model_source
from crop.models import families


def load_model(
    name: str, device: str, dtype: str, *, trust_remote_code: bool = False, **how: Any
) -> tuple[nn.Module, Any]:
    """A model of a supported family and its processor.

    Args:
        name: a folder, or the name of a model on the Hugging Face hub (downloaded by transformers if it is not in its
            cache).
        device: e.g. "cpu", "cuda"; not read with ``device_map``.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        trust_remote_code: run code that comes with the model; False never asks.
        how: further arguments of ``from_pretrained``: ``device_map``, e.g. "auto", lets accelerate place the parts;
            ``attn_implementation``, e.g. "sdpa", "eager", "flash_attention_2".
    Raises:
        UsageError: nothing to load there, damaged files, an unknown family.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    try:
        model_source("load", name)
        trust = {"trust_remote_code": trust_remote_code}
        family = AutoConfig.from_pretrained(name, **trust).model_type
        if family not in families():
            known = ", ".join(sorted(families()))
            raise UsageError(f"model {name!r} must be of a family among {known}, got {family!r}")
        processor = AutoProcessor.from_pretrained(name, **trust)  # quick: first what may be missing
        how |= {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        model, report = AutoModelForImageTextToText.from_pretrained(
            name, **how, **trust, ignore_mismatched_sizes=True, output_loading_info=True
        )
        if report["mismatched_keys"]:
            key, stored, wanted = sorted(report["mismatched_keys"])[0]
            raise UsageError(
                f"model {name!r} cannot be loaded: {key} must have shape {tuple(wanted)} by its configuration, "
                f"got {tuple(stored)}"
            )
    except FileNotFoundError as error:
        raise UsageError(f"model {str(error).removeprefix('load: path ')}") from error
    except UsageError:
        raise
    except Exception as error:  # readers of damaged files raise anything
        text = damage(name) or explain(error)
        if "trust_remote_code" in text:
            text += " On the command line that is --trust-remote-code."
        raise UsageError(f"model {name!r} cannot be loaded: {text}") from error
    if not getattr(processor, "chat_template", None):
        raise UsageError(f"model {name!r} must come with a chat template, got a processor without")
    return (model if "device_map" in how else model.to(device)).eval(), processor
