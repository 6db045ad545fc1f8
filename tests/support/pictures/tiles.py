"""Several grids per picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.models.aya_vision import modeling_aya_vision
from transformers.models.cohere2_vision import modeling_cohere2_vision
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.internvl import modeling_internvl
from transformers.models.llava_next import modeling_llava_next
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision import modeling_llava_onevision
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.perception_lm import modeling_perception_lm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.support.pictures.colours import MARK, coordinates, needs_torchvision, patch_colours, tower
from tests.support.written import TILES


def anyres(code: Any, kind: str, processor: Any, config: Any, more: dict) -> Any:
    model = getattr(code, f"{kind}Model")

    def see(size: tuple[int, int], count: int = 1) -> tuple:
        pictures = [coordinates(*size)] * count
        out = processor([pictures] if count > 1 else pictures, return_tensors="pt")
        tiles = patch_colours(out["pixel_values"][0], processor, config.vision_config.patch_size).flatten(1, 2)
        packed, _ = model.pack_image_features(
            SimpleNamespace(config=config),
            [tiles] * count,
            out["image_sizes"],
            image_newline=torch.full((3,), MARK),
            **more,
        )
        return config, processor, out, torch.cat(packed), 0

    return see


PINPOINTS = [[56 * rows, 56 * columns] for rows in range(1, 5) for columns in range(1, 5)]


see_next = anyres(
    modeling_llava_next,
    "LlavaNext",
    LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    ),
    transformers.LlavaNextConfig(vision_config=tower("CLIPVisionConfig", 56, 7), image_grid_pinpoints=PINPOINTS),
    dict(vision_feature_select_strategy="default"),
)


see_onevision = anyres(
    modeling_llava_onevision,
    "LlavaOnevision",
    LlavaOnevisionImageProcessorPil(size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS),
    transformers.LlavaOnevisionConfig(
        vision_config=tower("SiglipVisionConfig", 56, 7),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
    ),
    dict(vision_aspect_ratio="anyres_max_4"),
)


def see_internvl(size: tuple[int, int]) -> tuple:
    vision = transformers.InternVLVisionConfig(image_size=[70, 70], patch_size=[7, 7])
    config = transformers.InternVLConfig(vision_config=vision)
    processor = GotOcr2ImageProcessorPil(size={"height": 70, "width": 70}, crop_to_patches=True, max_patches=12)
    out = processor(coordinates(*size), return_tensors="pt")
    tiles = patch_colours(out["pixel_values"], processor, 7)
    shuffled = modeling_internvl.InternVLModel.pixel_shuffle(None, tiles, 0.5)
    return config, processor, out, shuffled.reshape(-1, 4, 3).mean(1), 0


def see_downsampled(code: Any, kind: str, processor: Any) -> Any:
    """`processor`: () -> it; the colours of 2 x 2 patches are what the model's own reordering makes one token of."""
    config, projector = TILES[kind], getattr(code, f"{kind}MultiModalProjector")

    def see(size: tuple[int, int]) -> tuple:
        made = processor()
        out = made(coordinates(*size), return_tensors="pt")
        tiles = patch_colours(out["pixel_values"], made, 7).flatten(1, 2)
        shuffled = projector.pixel_shuffle(SimpleNamespace(downsample_factor=2), tiles)
        return config, made, out, shuffled.reshape(-1, 4, 3).mean(1), 0

    return see


def see_perception(size: tuple[int, int]) -> tuple:
    processor = needs_torchvision("perception_lm", "PerceptionLMImageProcessor", tile_size=70, max_num_tiles=6)
    out = processor(coordinates(*size), return_tensors="pt")
    tiles = patch_colours(out["pixel_values"][0], processor, 7).flatten(1, 2)
    pooled = modeling_perception_lm.PerceptionLMAdaptiveAvgPooling(2)(tiles)
    return transformers.PerceptionLMConfig(), processor, out, pooled.flatten(0, 1), 0


def see_ovis2(size: tuple[int, int]) -> tuple:
    """The model joins 2 x 2 patches as a mean over a larger one does."""
    config = transformers.Ovis2Config(vision_config=dict(image_size=70, patch_size=7, hidden_stride=2))
    processor = Ovis2ImageProcessorPil(size={"height": 70, "width": 70}, crop_to_patches=True, max_patches=6)
    out = processor(coordinates(*size), return_tensors="pt")
    return config, processor, out, patch_colours(out["pixel_values"], processor, 14).flatten(0, 2), 0


def see_idefics3(kind: str, processor: Any) -> Any:
    config = TILES[kind]

    def see(size: tuple[int, int]) -> tuple:
        out = processor(coordinates(*size), return_tensors="pt", return_row_col_info=True)
        tiles = patch_colours(out["pixel_values"][0], processor, 7).flatten(1, 2)
        shuffled = modeling_idefics3.Idefics3Connector.pixel_shuffle(None, tiles, 2)
        return config, processor, out, shuffled.reshape(-1, 4, 3).mean(1), 0

    return see


CASES = {
    "aya_vision": see_downsampled(
        modeling_aya_vision,
        "AyaVision",
        lambda: GotOcr2ImageProcessorPil(size={"height": 70, "width": 70}, crop_to_patches=True, max_patches=12),
    ),
    "cohere2_vision": see_downsampled(
        modeling_cohere2_vision,
        "Cohere2Vision",
        lambda: needs_torchvision("cohere2_vision", "Cohere2VisionImageProcessor", size={"height": 70, "width": 70}),
    ),
    "idefics3": see_idefics3(
        "Idefics3", Idefics3ImageProcessorPil(size={"longest_edge": 280}, max_image_size={"longest_edge": 70})
    ),
    "internvl": see_internvl,
    "llava_next": see_next,
    "llava_onevision": see_onevision,
    "llava_onevision, two images": lambda size: see_onevision(size, count=2),
    "ovis2": see_ovis2,
    "perception_lm": see_perception,
    "smolvlm": see_idefics3(
        "SmolVLM", SmolVLMImageProcessorPil(size={"longest_edge": 280}, max_image_size={"longest_edge": 70})
    ),
}
