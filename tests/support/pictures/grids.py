"""A grid that follows the picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.lighton_ocr import modeling_lighton_ocr
from transformers.models.mistral3 import modeling_mistral3
from transformers.models.paddleocr_vl import modeling_paddleocr_vl
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.pictures.colours import coordinates, needs_torchvision, patch_colours, tower


def merged(processor: Any, config: Any, patch: int) -> Any:
    def see(size: tuple[int, int]) -> tuple:
        out = processor(coordinates(*size), return_tensors="pt")
        rows = out["pixel_values"].view(-1, 4, 3, 2, patch, patch)
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        return config, processor, out, rows.mean((1, 3, 4, 5)) * std + mean, 0

    return see


def see_paddleocr(size: tuple[int, int]) -> tuple:
    config, processor = transformers.PaddleOCRVLConfig(), PaddleOCRVLImageProcessorPil()
    out = processor(coordinates(*size), return_tensors="pt")
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    colours = out["pixel_values"].mean((-2, -1)) * std + mean
    same = torch.nn.Identity()
    merger = SimpleNamespace(merge_kernel_size=(2, 2), pre_norm=same, linear_1=same, act=same, linear_2=same)
    merge = modeling_paddleocr_vl.PaddleOCRProjector.forward
    return config, processor, out, merge(merger, colours, out["image_grid_thw"]).view(-1, 4, 3).mean(1), 0


def see_pixtral(size: tuple[int, int], merge: int = 1) -> tuple:
    vision = tower("PixtralVisionConfig", 224, 7)
    kind = transformers.Mistral3Config if merge > 1 else transformers.LlavaConfig
    config = kind(vision_config=vision, **(dict(spatial_merge_size=merge) if merge > 1 else {}))
    side = {"height": 7 * merge, "width": 7 * merge}
    processor = PixtralImageProcessorPil(size={"longest_edge": 210 if merge > 1 else 217}, patch_size=side)
    out = processor(coordinates(*size), return_tensors="pt")
    height, width = out["image_sizes"][0].tolist()
    colours = patch_colours(out["pixel_values"][0][:, :height, :width], processor, 7)
    seen = colours.flatten(0, 1)
    if merge > 1:
        merger = SimpleNamespace(spatial_merge_size=merge, patch_size=7, merging_layer=torch.nn.Identity())
        seen = modeling_mistral3.Mistral3PatchMerger.forward(merger, seen, torch.tensor([[height, width]]))
        seen = seen.view(-1, 3, merge * merge).mean(-1)
    return config, processor, out, seen, width // (7 * merge)


def see_mistral3(size: tuple[int, int]) -> tuple:
    return see_pixtral(size, merge=2)


def see_lighton_ocr(size: tuple[int, int]) -> tuple:
    """Its processor resizes to whole patches, not to whole tokens, and writes no breaks."""
    config = transformers.LightOnOcrConfig(vision_config=tower("PixtralVisionConfig", 224, 7))
    processor = PixtralImageProcessorPil(size={"longest_edge": 217}, patch_size={"height": 7, "width": 7})
    out = processor(coordinates(*size), return_tensors="pt")
    height, width = out["image_sizes"][0].tolist()
    colours = patch_colours(out["pixel_values"][0][:, :height, :width], processor, 7).flatten(0, 1)
    merger = SimpleNamespace(spatial_merge_size=2, patch_size=7, merging_layer=torch.nn.Identity())
    seen = modeling_lighton_ocr.LightOnOcrPatchMerger.forward(merger, colours, out["image_sizes"])
    return config, processor, out, seen.view(-1, 3, 4).mean(-1), 0


def see_gemma4(size: tuple[int, int]) -> tuple:
    """The model's own pooling joins patches, whatever padding stands behind them."""
    config, processor = (
        transformers.Gemma4Config(vision_config={}),
        Gemma4ImageProcessorPil(max_soft_tokens=140),
    )
    out = processor(coordinates(*size), return_tensors="pt")
    colours, place = out["pixel_values"].unflatten(2, (-1, 3)).mean(2), out["image_position_ids"]
    joined, real = modeling_gemma4.Gemma4VisionPooler._avg_pool_by_positions(None, colours, place, 140)
    return config, processor, out, joined[real], 0


def see_gemma4_unified(size: tuple[int, int]) -> tuple:
    config = transformers.Gemma4UnifiedConfig(vision_config={})
    processor = needs_torchvision("gemma4_unified", "Gemma4UnifiedImageProcessor", max_soft_tokens=140)
    out = processor(coordinates(*size), return_tensors="pt")
    colours = out["pixel_values"].unflatten(2, (-1, 3)).mean(2)
    return config, processor, out, colours[(out["image_position_ids"] >= 0).all(-1)], 0


CASES = {
    "gemma4": see_gemma4,
    "gemma4_unified": see_gemma4_unified,
    "qwen2_vl": merged(Qwen2VLImageProcessorPil(), transformers.Qwen2VLConfig(), 14),
    "qwen2_5_vl": merged(Qwen2VLImageProcessorPil(), transformers.Qwen2_5_VLConfig(), 14),
    "qwen3_vl": merged(Qwen2VLImageProcessorPil(patch_size=16), transformers.Qwen3VLConfig(), 16),
    "qwen3_vl_moe": merged(Qwen2VLImageProcessorPil(patch_size=16), transformers.Qwen3VLMoeConfig(), 16),
    "qwen3_5": merged(Qwen2VLImageProcessorPil(patch_size=16), transformers.Qwen3_5Config(), 16),
    "qwen3_5_moe": merged(Qwen2VLImageProcessorPil(patch_size=16), transformers.Qwen3_5MoeConfig(), 16),
    "glm4v": merged(Glm4vImageProcessorPil(), transformers.Glm4vConfig(), 14),
    "glm46v": merged(Glm46VImageProcessorPil(), transformers.Glm46VConfig(), 14),
    "glm4v_moe": merged(Glm4vImageProcessorPil(), transformers.Glm4vMoeConfig(), 14),
    "glm_ocr": merged(Glm46VImageProcessorPil(), transformers.GlmOcrConfig(), 14),
    "paddleocr_vl": see_paddleocr,
    "lighton_ocr": see_lighton_ocr,
    "mistral3": see_mistral3,
    "pixtral": see_pixtral,
}
