"""The families, by architecture: vLLM's own class, and how images lie in its arguments."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODELS = "vllm.model_executor.models"
GRIDS = {"pixel_values": lambda given: given["image_grid_thw"].prod(-1)}
TILES = {"pixel_values": lambda given: given["image_num_patches"]}
SPLIT = dict.fromkeys(("pixel_values", "pixel_attention_mask"), lambda given: given["num_patches"])
# Checkpoints written by transformers 5.19 and later lack a level of names that vLLM 0.32 wants.
TOWERS = {
    f"vision_tower.{part}.": f"vision_tower.vision_model.{part}."
    for part in ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
}


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Args:
        module: of vLLM's class, below ``MODELS``. name: of the class; "": the architecture's.
        flat: see ``PruningModel.crop_flat``. weights: prefixes of names of weights that vLLM does not know, and its own.
    """

    module: str
    flat: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)


ENTRIES = {
    "LlavaForConditionalGeneration": Entry("llava", weights=TOWERS),
    "LlavaNextForConditionalGeneration": Entry("llava_next", weights=TOWERS),
    "LlavaOnevisionForConditionalGeneration": Entry("llava_onevision", weights=TOWERS),
    "Mistral3ForConditionalGeneration": Entry("mistral3"),
    "Qwen2VLForConditionalGeneration": Entry("qwen2_vl", GRIDS),
    "Qwen2_5_VLForConditionalGeneration": Entry("qwen2_5_vl", GRIDS),
    "Qwen3VLForConditionalGeneration": Entry("qwen3_vl", GRIDS),
    "Qwen3VLMoeForConditionalGeneration": Entry("qwen3_vl_moe", GRIDS),
    "Qwen3_5ForConditionalGeneration": Entry("qwen3_5", GRIDS),
    "Qwen3_5MoeForConditionalGeneration": Entry("qwen3_5", GRIDS),
    "Glm4vForConditionalGeneration": Entry("glm4_1v", GRIDS),
    "Glm4vMoeForConditionalGeneration": Entry("glm4_1v", GRIDS),
    "GlmOcrForConditionalGeneration": Entry("glm_ocr", GRIDS),
    "PaddleOCRVLForConditionalGeneration": Entry("paddleocr_vl", GRIDS),
    "LightOnOCRForConditionalGeneration": Entry("lightonocr"),
    "InternVLForConditionalGeneration": Entry("interns1", TILES, "InternS1ForConditionalGeneration"),
    "Idefics3ForConditionalGeneration": Entry("idefics3", SPLIT),
    "SmolVLMForConditionalGeneration": Entry("smolvlm", SPLIT),
}
NOT_YET = "it has not been found equal to crop.patch yet"
WINDOWS = "its sliding windows count places, which pruning moves"
REFUSED = {  # architectures that crop.patch knows -> vLLM's class, why not here
    "Cohere2VisionForConditionalGeneration": (Entry("cohere2_vision"), WINDOWS),
    "CohereCompassForConditionalGeneration": (Entry("cohere_compass"), NOT_YET),
    "Cosmos3EdgeForConditionalGeneration": (Entry("cosmos3_edge"), NOT_YET),
    "Exaone4_5_ForConditionalGeneration": (Entry("exaone4_5"), WINDOWS),
    "Gemma3ForConditionalGeneration": (
        Entry("gemma3_mm"),
        "its images see themselves, in masks made from placeholders",
    ),
    "Gemma4ForConditionalGeneration": (Entry("gemma4_mm"), WINDOWS),
    "Gemma4UnifiedForConditionalGeneration": (Entry("gemma4_unified"), WINDOWS),
    "Lfm2VlForConditionalGeneration": (Entry("lfm2_vl", name="Lfm2VLForConditionalGeneration"), NOT_YET),
    "LlavaNextVideoForConditionalGeneration": (Entry("llava_next_video"), "vLLM gives it videos alone"),
    "MiniCPMV4_6ForConditionalGeneration": (Entry("minicpmv4_6"), NOT_YET),
    "MiniCPMV4_7ForConditionalGeneration": (Entry("minicpmv4_7"), NOT_YET),
    "PaliGemmaForConditionalGeneration": (Entry("paligemma"), "its prompts see themselves"),
    "QianfanOCRForConditionalGeneration": (Entry("qianfan_ocr"), NOT_YET),
}


def target(architecture: str) -> str:
    """Where vLLM finds the class of an architecture: "module:class", imported when it is needed."""
    return f"{__name__}:Crop{architecture}"


def __getattr__(name: str) -> Any:
    architecture = name.removeprefix("Crop")
    if architecture in ENTRIES and name != architecture:
        return _pruning(architecture)
    if architecture in REFUSED and name != architecture:
        return _refusing(architecture)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _stock(architecture: str, entry: Entry) -> type:
    return getattr(importlib.import_module(f"{MODELS}.{entry.module}"), entry.name or architecture)


@functools.cache
def _processor(stock: type, mixin: type) -> type:
    return type(f"Crop{stock.__name__}", (mixin, stock), {})


def _registered(model: type, stock: type, mixin: type) -> type:
    """Give a model class the processor of vLLM's own class, with a mixin before it."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    own = stock._processor_factory

    def build(info: Any, dummy_inputs: Any) -> Any:
        return _processor(type(own.processor(info, dummy_inputs)), mixin)(info, dummy_inputs)

    return MULTIMODAL_REGISTRY.register_processor(build, info=own.info, dummy_inputs=own.dummy_inputs)(model)


@functools.cache
def _pruning(architecture: str) -> type:
    from vllm.model_executor.models.interfaces import SupportsMRoPE
    from vllm.model_executor.models.utils import WeightsMapper

    from crop.integrations.vllm.model import OneAxis, PruningModel
    from crop.integrations.vllm.processor import PruningProcessor

    entry = ENTRIES[architecture]
    stock = _stock(architecture, entry)
    own = (stock,) if hasattr(stock, "get_mrope_input_positions") else (OneAxis, stock, SupportsMRoPE)
    body: dict[str, Any] = {"__module__": __name__, "crop_flat": entry.flat}
    if entry.weights:
        body["hf_to_vllm_mapper"] = stock.hf_to_vllm_mapper | WeightsMapper(orig_to_new_prefix=entry.weights)
    model = types.new_class(f"Crop{architecture}", (PruningModel, *own), exec_body=lambda space: space.update(body))
    return _registered(model, stock, PruningProcessor)


@functools.cache
def _refusing(architecture: str) -> type:
    from crop.integrations.vllm.processor import RefusingProcessor

    entry, reason = REFUSED[architecture]
    stock = _stock(architecture, entry)
    model = types.new_class(f"Crop{architecture}", (stock,), exec_body=lambda space: space.update(__module__=__name__))
    why = f"{architecture} is none, because {reason}"
    return _registered(model, stock, type("Refusing", (RefusingProcessor,), {"reason": why}))
