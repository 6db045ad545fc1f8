"""Token geometry through every family's own processor and packing: pictures whose pixels encode their coordinates.

A picture's red is its x, its green its y, its blue is full, so that padding shows. The processor resizes, pads and cuts
it; the mean colour under each patch then goes where the model's own code puts that patch's feature; what arrives at a
token is where the token looks.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.aya_vision import modeling_aya_vision
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.cohere2_vision import modeling_cohere2_vision
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.internvl import modeling_internvl
from transformers.models.lighton_ocr import modeling_lighton_ocr
from transformers.models.llava_next import modeling_llava_next
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision import modeling_llava_onevision
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mistral3 import modeling_mistral3
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.paddleocr_vl import modeling_paddleocr_vl
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.perception_lm import modeling_perception_lm
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from crop.geometry.layout import NEWLINE, PATCH, VisionLayout
from crop.models import Prompt, families
from tests.support.written import TILES, WRITERS, ovis2_markers, written

# With the limits of the processors below tokens are odd in number somewhere. Only LightOnOCR's processor lets patches go
# into no token: the others resize to whole tokens.
SIZES = [(320, 320), (500, 300), (300, 500), (403, 267), (900, 260)]
MARK = -7.0  # the colour of a newline
BREAK = 1


def coordinates(width: int, height: int) -> Image.Image:
    x = (np.arange(width) + 0.5) / width * 255
    y = (np.arange(height) + 0.5) / height * 255
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = x[None, :].round(), y[:, None].round(), 255
    return Image.fromarray(pixels)


def patch_colours(pictures: Tensor, processor: Any, patch: int) -> Tensor:
    """(pictures, rows, columns, 3): mean colour under each patch, undone from normalisation."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    cells = (torch.as_tensor(pictures) * std + mean).unfold(-2, patch, patch).unfold(-2, patch, patch)
    return cells.mean((-2, -1)).movedim(-3, -1).contiguous()


def tower(name: str, side: int, patch: int) -> Any:
    return getattr(transformers, name)(image_size=side, patch_size=patch)


# Each: picture size -> (config, processor, processor's output, colours in the order of the image tokens, row breaks)
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


def needs_torchvision(family: str, name: str, **settings: Any) -> Any:
    pytest.importorskip("torchvision", reason=f"transformers has no other image processor for {family}")
    module = importlib.import_module(f"transformers.models.{family}.image_processing_{family}")
    return getattr(module, name)(**settings)


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


def see_square(config: Any, processor: Any, patch: int) -> Any:
    """Gemma 3 averages patches, which is what a mean over a larger patch does."""

    def see(size: tuple[int, int]) -> tuple:
        out = processor(coordinates(*size), return_tensors="pt")
        return config, processor, out, patch_colours(out["pixel_values"], processor, patch).flatten(0, 2), 0

    return see


SIDE = {"height": 112, "width": 112}
CLIP = CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size=SIDE)


def see_patches(config: Any, kind: str, processor: Any) -> Any:
    vision = dict(image_size=112, patch_size=14, model_type=f"{kind}_vision_model")
    return see_square(config(vision_config=vision), processor, 14)


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
    "fast_vlm": see_square(transformers.FastVlmConfig(image_seq_length=64), CLIP, 14),
    "ovis2": see_ovis2,
    "perception_lm": see_perception,
    "vipllava": see_patches(transformers.VipLlavaConfig, "clip", CLIP),
    "gemma3": see_square(
        transformers.Gemma3Config(vision_config=dict(image_size=112, patch_size=7), mm_tokens_per_image=64),
        Gemma3ImageProcessorPil(size=SIDE),
        14,
    ),
    "paligemma": see_patches(transformers.PaliGemmaConfig, "siglip", SiglipImageProcessorPil(size=SIDE)),
    "qwen2_5_vl": merged(Qwen2VLImageProcessorPil(), transformers.Qwen2_5_VLConfig(), 14),
    "qwen3_vl": merged(Qwen2VLImageProcessorPil(patch_size=16), transformers.Qwen3VLConfig(), 16),
    "qwen3_5": merged(Qwen2VLImageProcessorPil(patch_size=16), transformers.Qwen3_5Config(), 16),
    "qwen3_5_moe": merged(Qwen2VLImageProcessorPil(patch_size=16), transformers.Qwen3_5MoeConfig(), 16),
    "qwen3_vl_moe": merged(Qwen2VLImageProcessorPil(patch_size=16), transformers.Qwen3VLMoeConfig(), 16),
    "glm4v": merged(Glm4vImageProcessorPil(), transformers.Glm4vConfig(), 14),
    "glm4v_moe": merged(Glm4vImageProcessorPil(), transformers.Glm4vMoeConfig(), 14),
    "glm46v": merged(Glm46VImageProcessorPil(), transformers.Glm46VConfig(), 14),
    "glm_ocr": merged(Glm46VImageProcessorPil(), transformers.GlmOcrConfig(), 14),
    "paddleocr_vl": see_paddleocr,
    "idefics3": see_idefics3(
        "Idefics3", Idefics3ImageProcessorPil(size={"longest_edge": 280}, max_image_size={"longest_edge": 70})
    ),
    "internvl": see_internvl,
    "lighton_ocr": see_lighton_ocr,
    "llava": see_patches(transformers.LlavaConfig, "clip", CLIP),
    "llava_next": see_next,
    "llava_onevision": see_onevision,
    "llava_onevision, two images": lambda size: see_onevision(size, count=2),
    "mistral3": see_mistral3,
    "pixtral": see_pixtral,
    "qwen2_vl": merged(Qwen2VLImageProcessorPil(), transformers.Qwen2VLConfig(), 14),
    "smolvlm": see_idefics3(
        "SmolVLM", SmolVLMImageProcessorPil(size={"longest_edge": 280}, max_image_size={"longest_edge": 70})
    ),
}

UNTESTED: dict[str, str] = {}  # a family without a case -> the reason


def test_every_family_has_a_case():
    assert set(CASES) & set(UNTESTED) == set()
    missing = set(families()) - {family_of_case(name) for name in CASES} - set(UNTESTED)
    assert not missing, f"families without a case in CASES: {sorted(missing)}"


def family_of_case(name: str) -> str:
    """The model type that a case is about."""
    return {"pixtral": "llava"}.get(name, name.split(",")[0])


def layouts(config: Any, processor: Any, out: Any, count: int, breaks: int, sizes: list) -> list[VisionLayout]:
    """What the family says of a prompt with these image tokens, a break behind every ``breaks`` of them."""
    ids = [config.image_token_id] * count
    if config.model_type == "ovis2":
        ids = ovis2_markers(out, config)
    if config.model_type in WRITERS:
        ids = written(config, out)
    if breaks:
        ids = [t for n in range(count) for t in ([config.image_token_id] + [BREAK] * ((n + 1) % breaks == 0))][:-1]
    found = families()[config.model_type].images(Prompt(config, torch.tensor([ids]), out, processor, sizes))
    return [layout for _, layout in found]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(CASES))
def test_tokens_look_where_the_layout_says(name, size):
    config, processor, out, seen, breaks = CASES[name](size)
    assert config.model_type == family_of_case(name)
    count = 2 if "two images" in name else 1
    found = layouts(config, processor, out, len(seen), breaks, [size] * count)
    assert len(found) == count
    kind = torch.cat([layout.kind for layout in found])
    center = torch.cat([layout.center for layout in found])
    if breaks:
        rows = found[0].extent[1]
        assert (kind == NEWLINE).sum() == rows - 1 and len(kind) == len(seen) + rows - 1
        kind, center = kind[kind != NEWLINE], center[kind != NEWLINE]
    else:
        assert ((seen == MARK).all(1) == (kind == NEWLINE)).all()
    whole = (seen[:, 2] > 0.99) & (kind != NEWLINE)  # no padding in it
    assert whole.sum() > len(seen) // 8
    assert (kind[whole] == PATCH).all()
    # Half a pixel of the processed picture is what resampling may shift, and colours are rounded.
    error = (seen[whole, :2] - center[whole]).abs().max()
    assert error < 0.015, error


ON_GRIDS = [name for name in CASES if families()[family_of_case(name)].images.__module__ == "crop.models.grids"]


@pytest.mark.parametrize("name", [*ON_GRIDS, "pixtral"])
def test_pictures_have_odd_numbers_of_rows_and_columns(name):
    grids = []
    for size in SIZES:
        config, processor, out, seen, breaks = CASES[name](size)
        grids.append(layouts(config, processor, out, len(seen), breaks, [size])[0])
    rows, columns = (
        [int(getattr(grid, axis)[grid.kind == PATCH].max()) + 1 for grid in grids] for axis in ("row", "col")
    )
    assert any(count % 2 for count in rows) and any(count % 2 for count in columns) and rows != columns


def test_a_patch_that_goes_into_no_token_is_noticed():
    """A layout that spreads LightOnOCR's tokens over the whole picture is wrong by a patch at its far side."""
    odd = 0
    for size in SIZES:
        *_, out, seen, _ = CASES["lighton_ocr"](size)
        height, width = (int(side) for side in out["image_sizes"][0])
        whole = VisionLayout.grid(height // 14, width // 14).center
        odd += width % 14 > 0 and bool((seen[:, 0] - whole[:, 0]).abs().max() > 0.015)
    assert odd == len(SIZES)


@pytest.mark.parametrize("name", ["llava_next", "internvl", "idefics3"])
def test_a_wrong_size_is_noticed(name):
    """The check above can fail: the layout of another picture is not this one's."""
    config, processor, out, seen, breaks = CASES[name]((500, 300))
    other = dict(out)
    if name == "llava_next":
        other["image_sizes"] = torch.tensor([[300, 440]])
    if name == "idefics3":
        other |= {"rows": out["cols"], "cols": out["rows"]}
    try:
        (layout,) = layouts(config, processor, other, len(seen), breaks, [(300, 500)])
    except ValueError as error:
        assert "whole images of the grids" in str(error)
        return
    patches = layout.kind == PATCH
    assert (seen[patches, :2] - layout.center[patches]).abs().max() > 0.05
