"""Further families, of all kinds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.models.cohere_compass.image_processing_pil_cohere_compass import CohereCompassImageProcessorPil
from transformers.models.cosmos3_edge.image_processing_pil_cosmos3_edge import Cosmos3EdgeImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.glmga.image_processing_pil_glmga import GlmgaImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.hunyuan_vl import modeling_hunyuan_vl
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import HunYuanVLImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.kimi_k25 import modeling_kimi_k25
from transformers.models.lfm2_vl import modeling_lfm2_vl
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next_video import modeling_llava_next_video
from transformers.models.minicpmv4_6 import modeling_minicpmv4_6
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.pp_chart2table.image_processing_pil_pp_chart2table import PPChart2TableImageProcessorPil
from transformers.models.qianfan_ocr import modeling_qianfan_ocr
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from tests.support.pictures.colours import MARK, coordinates, needs_torchvision, patch_colours, tower
from tests.support.pictures.grids import merged
from tests.support.pictures.squares import SIDE, see_square
from tests.support.pictures.tiles import PINPOINTS, anyres
from tests.support.written import SHAPED

SAME = torch.nn.Identity()
QWEN, QWEN3 = Qwen2VLImageProcessorPil(), Qwen2VLImageProcessorPil(patch_size=16)


def undone(colours: Any, processor: Any) -> torch.Tensor:
    """(..., 3) means as they were before normalisation."""
    return torch.as_tensor(colours) * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)


def see_cosmos3_edge(size: tuple[int, int]) -> tuple:
    """In its patches the colours come last."""
    processor = Cosmos3EdgeImageProcessorPil()
    out = processor(coordinates(*size), return_tensors="pt")
    colours = out["pixel_values"].view(-1, 4, 16 * 16, 3).mean((1, 2))
    return transformers.Cosmos3EdgeConfig(), processor, out, undone(colours, processor), 0


def see_video_llama_3(size: tuple[int, int]) -> tuple:
    processor = VideoLlama3ImageProcessorPil()
    out = processor(coordinates(*size), return_tensors="pt")
    colours = out["pixel_values"].view(-1, 3, 14 * 14).mean(-1)
    return transformers.VideoLlama3Config(), processor, out, undone(colours, processor), 0


def see_kimi(size: tuple[int, int]) -> tuple:
    """Not resized, but padded; the model's own merging."""
    processor = needs_torchvision("kimi_k25", "Kimi_K25ImageProcessor")
    out = processor(coordinates(*size), return_tensors="pt")
    colours = undone(out["pixel_values"].mean((-2, -1)), processor)
    joined = modeling_kimi_k25.Kimi_K25VisionModel.temporal_merge(None, colours, out["image_grid_thw"], 2, 2)
    return transformers.Kimi_K25Config(), processor, out, joined.mean(1), 0


def see_hunyuan(size: tuple[int, int]) -> tuple:
    """The model's own merging, newlines and markers."""
    processor = HunYuanVLImageProcessorPil()
    out = processor(coordinates(*size), return_tensors="pt")
    colours = undone(out["pixel_values"].view(len(out["pixel_values"]), 3, -1).mean(-1), processor)
    mark = torch.full((3,), MARK)
    merger = SimpleNamespace(
        before_rms=SAME, after_rms=SAME, proj_conv=torch.nn.AvgPool2d(2), proj_act=SAME, proj_out=SAME, mlp=SAME,
        image_newline=mark, image_begin=mark, image_end=mark,
    )  # fmt: skip
    rows, columns = out["image_grid_thw"][0, 1:].tolist()
    seen = modeling_hunyuan_vl.HunYuanVLVisionPatchMerger.forward(merger, colours[None], (rows, columns))
    return transformers.HunYuanVLConfig(), processor, out, seen[0], 0


def see_unmarked(config: Any, shuffle: Any) -> Any:
    """Tiles in one run; a token is the mean over its patches, whatever their order."""

    def see(size: tuple[int, int]) -> tuple:
        processor = GotOcr2ImageProcessorPil(size={"height": 70, "width": 70}, crop_to_patches=True, max_patches=12)
        out = processor(coordinates(*size), return_tensors="pt")
        return config, processor, out, shuffle(patch_colours(out["pixel_values"], processor, 7)), 0

    return see


def shuffled(tiles: torch.Tensor) -> torch.Tensor:
    joined = modeling_qianfan_ocr.QianfanOCRModel.pixel_shuffle(None, tiles, 0.5)
    return joined.reshape(-1, 4, 3).mean(1)


def see_got(size: tuple[int, int]) -> tuple:
    """Two strided convolutions make one token of 4 x 4 patches."""
    config = transformers.GotOcr2Config(vision_config=dict(image_size=84, patch_size=7))
    processor = GotOcr2ImageProcessorPil(size={"height": 84, "width": 84}, crop_to_patches=True, max_patches=12)
    out = processor(coordinates(*size), return_tensors="pt")
    return config, processor, out, patch_colours(out["pixel_values"], processor, 28).flatten(0, 2), 0


def see_docling(size: tuple[int, int]) -> tuple:
    from transformers.models.granite_docling import modeling_granite_docling
    from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil

    config = SHAPED["GraniteDocling"]
    processor = GraniteDoclingImageProcessorPil(size={"height": 70, "width": 70}, max_patches=12)
    out = processor(coordinates(*size), return_tensors="pt")
    tiles = patch_colours(out["pixel_values"][0], processor, 7).flatten(1, 2)
    joined = modeling_granite_docling.GraniteDoclingConnectorPath.pixel_shuffle(None, tiles, 2)
    return config, processor, out, joined.reshape(-1, 4, 3).mean(1), 0


def see_minicpm(kind: str, processor: Any) -> Any:
    """The model's own merger, twice: its tower does the first round with windows."""

    def see(size: tuple[int, int]) -> tuple:
        made = processor()
        out = made(coordinates(*size), return_tensors="pt")
        patches = torch.as_tensor(out["pixel_values"])[0].unflatten(-1, (-1, 7)).mean((1, 3)).T
        merger = SimpleNamespace(merge_kernel_size=(2, 2), merger_times=2, mlp=[lambda x: x.view(-1, 4, 3).mean(1)] * 2)
        seen = modeling_minicpmv4_6.MiniCPMV4_6Merger.forward(merger, undone(patches, made)[None], out["target_sizes"])
        return SHAPED[kind], made, out, torch.cat(seen), 0

    return see


def see_lfm2(size: tuple[int, int]) -> tuple:
    """The model's own packing of patches and unshuffling."""
    processor = needs_torchvision(
        "lfm2_vl", "Lfm2VlImageProcessor", tile_size=70, encoder_patch_size=7, max_image_tokens=30, min_image_tokens=8,
        return_row_col_info=True,
    )  # fmt: skip
    out = processor(coordinates(*size), return_tensors="pt")
    colours = undone(out["pixel_values"].unflatten(-1, (49, 3)).mean(-2), processor)
    projector = SimpleNamespace(factor=2)
    model = SimpleNamespace(
        config=SimpleNamespace(downsample_factor=2, return_dict=True),
        vision_tower=lambda **_: SimpleNamespace(last_hidden_state=colours),
        multi_modal_projector=lambda grid: (
            modeling_lfm2_vl.Lfm2VlMultiModalProjector.pixel_unshuffle(projector, grid).unflatten(-1, (4, 3)).mean(-2)
        ),
    )
    encode = modeling_lfm2_vl.Lfm2VlModel.get_image_features.__wrapped__
    found = encode(model, out["pixel_values"], out["spatial_shapes"], out["pixel_attention_mask"])
    return SHAPED["Lfm2Vl"], processor, out, torch.cat(found.pooler_output), 0


def minicpm_processor() -> Any:
    return MiniCPMV4_6ImageProcessorPil(scale_resolution=140, patch_size=7)


def minicpm_ocr_processor() -> Any:
    settings = dict(scale_resolution=140, patch_size=7, downsample_mode="16x")
    return needs_torchvision("minicpm_ocr", "MiniCPMOcrImageProcessor", **settings)


def newer(name: str) -> Any:
    """A configuration that the oldest supported transformers lacks; its cases are left out there."""
    return getattr(transformers, name, SimpleNamespace)()


JANUS = JanusImageProcessorPil(size=SIDE)
SIGLIP = dict(vision_config=dict(image_size=112, patch_size=14, model_type="siglip_vision_model"))
CASES = {
    "exaone4_5": merged(QWEN, transformers.Exaone4_5_Config(), 14),
    "cosmos3_omni": merged(QWEN3, transformers.Cosmos3OmniConfig(), 16),
    "cosmos3_edge": see_cosmos3_edge,
    "cohere_compass": merged(CohereCompassImageProcessorPil(patch_size=16), transformers.CohereCompassConfig(), 16),
    "video_llama_3": see_video_llama_3,
    "hyperclovax_vision_v2": merged(QWEN, newer("HyperCLOVAXVisionV2Config"), 14),
    "glmga": merged(GlmgaImageProcessorPil(), transformers.GlmgaConfig(), 14),
    "kimi_k25": see_kimi,
    "qwen2_5_omni_thinker": merged(QWEN, transformers.Qwen2_5OmniThinkerConfig(), 14),
    "qwen3_omni_moe_thinker": merged(QWEN3, transformers.Qwen3OmniMoeThinkerConfig(), 16),
    "lfm3_vl": merged(QWEN3, newer("Lfm3VlConfig"), 16),
    "hunyuan_vl": see_hunyuan,
    "janus": see_square(transformers.JanusConfig(vision_config=dict(image_size=112, patch_size=14)), JANUS, 14),
    "deepseek_vl": see_square(transformers.DeepseekVLConfig(**SIGLIP), DeepseekVLImageProcessorPil(size=SIDE), 14),
    "deepseek_vl_hybrid": see_square(transformers.DeepseekVLHybridConfig(**SIGLIP), JANUS, 14),
    "got_ocr2": see_got,
    "pp_chart2table": see_square(
        transformers.PPChart2TableConfig(vision_config=dict(image_size=112, patch_size=7)),
        PPChart2TableImageProcessorPil(size=SIDE),
        28,
    ),
    "qianfan_ocr": see_unmarked(
        transformers.QianfanOCRConfig(vision_config=dict(image_size=[70, 70], patch_size=[7, 7])), shuffled
    ),
    "llava_next_video": anyres(
        modeling_llava_next_video,
        "LlavaNextVideo",
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
        ),
        transformers.LlavaNextVideoConfig(
            vision_config=tower("CLIPVisionConfig", 56, 7), image_grid_pinpoints=PINPOINTS
        ),
        dict(vision_feature_select_strategy="default"),
    ),
    "granite_docling": see_docling,
    "minicpmv4_6": see_minicpm("MiniCPMV4_6", minicpm_processor),
    "minicpmv4_7": see_minicpm("MiniCPMV4_7", minicpm_processor),
    "minicpm_ocr": see_minicpm("MiniCPMOcr", minicpm_ocr_processor),
    "lfm2_vl": see_lfm2,
}
LACKING = {  # by this transformers
    family
    for family, kind in {
        "granite_docling": "GraniteDocling", "hyperclovax_vision_v2": "HyperCLOVAXVisionV2", "lfm3_vl": "Lfm3Vl",
        "minicpmv4_7": "MiniCPMV4_7", "minicpm_ocr": "MiniCPMOcr",
    }.items()
    if not hasattr(transformers, f"{kind}Config")
}  # fmt: skip
CASES = {family: see for family, see in CASES.items() if family not in LACKING}
