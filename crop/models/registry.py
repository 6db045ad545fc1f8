"""The families, by model type; the one table that knows a family by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from crop.models.anyres import anyres_images, anyres_pieces
from crop.models.encoders import EQUAL_TILES, EQUAL_TILES_WHOLE_FIRST, GRID, LayerEncoder, TileEncoder
from crop.models.family import DecoderTraits, ModelFamily
from crop.models.fixed import (
    fast_vlm_images,
    gemma3_check,
    gemma3_images,
    janus_images,
    llava_check,
    llava_images,
    paligemma_images,
)
from crop.models.grids import (
    gemma4_images,
    glm_images,
    hunyuan_images,
    kimi_check,
    kimi_images,
    merged_images,
    pixtral_images,
)
from crop.models.refused import REFUSED
from crop.models.tiles import (
    docling_images,
    downsampled_images,
    got_images,
    idefics3_images,
    internvl_images,
    lfm2_images,
    minicpm_images,
    ovis2_images,
    perception_images,
    tiled_check,
)

_COHERE = DecoderTraits(unrotated=("full_attention",))
_DEEPSTACK = DecoderTraits(deepstack_method="_deepstack_process")
_GATED_DELTA = DecoderTraits(recurrent=("linear_attention",))
_IMAGE = DecoderTraits(mask="image")
_SHORT_CONVOLUTION = DecoderTraits(recurrent=("conv",), norm="embedding_norm")

# What kin share, by the first of them.
_VISUAL: dict[str, Any] = dict(tower="visual", projector=None, encoder=GRID, videos=True)
_ANYRES: dict[str, Any] = dict(images=anyres_images, tiles=True, encoder=TileEncoder(anyres_pieces))
_AYA: dict[str, Any] = dict(
    images=downsampled_images, check=tiled_check, tiles=True, encoder=EQUAL_TILES, traits=_COHERE
)
_GLM: dict[str, Any] = dict(images=glm_images, **_VISUAL)
_GOT: dict[str, Any] = dict(images=got_images, check=tiled_check, tiles=True)
_IDEFICS: dict[str, Any] = dict(
    images=idefics3_images,
    tower="vision_model",
    decoder="text_model",
    projector="connector",
    tiles=True,
    encoder=EQUAL_TILES,
)
_INTERNVL: dict[str, Any] = dict(images=internvl_images, check=tiled_check, tiles=True, encoder=EQUAL_TILES)
_JANUS: dict[str, Any] = dict(images=janus_images, check=llava_check, tower="vision_model", projector="aligner")
_LLAVA: dict[str, Any] = dict(images=llava_images, check=llava_check, encoder=LayerEncoder())
_MINICPM: dict[str, Any] = dict(images=minicpm_images, projector="merger", tiles=True, traits=_GATED_DELTA)
_QWEN: dict[str, Any] = dict(images=merged_images, **_VISUAL)

_families: dict[str, ModelFamily] = {}


def register_family(family: ModelFamily) -> None:
    """Make a family known to ``patch``, the localizers and the tools, in the place of one of the same model type."""
    _families[family.model_type] = family


def families() -> dict[str, ModelFamily]:
    """All known families by model type."""
    return dict(_families)


for _family in (
    ModelFamily("aya_vision", **_AYA),
    ModelFamily(
        "cohere_compass",
        **_QWEN,
        traits=DecoderTraits(deepstack_method="_deepstack_process", unrotated=("full_attention",)),
    ),
    ModelFamily("cohere2_vision", **_AYA),
    ModelFamily("cosmos3_edge", merged_images, tower="visual", projector="projector", videos=True),
    ModelFamily("cosmos3_omni", **_QWEN, traits=_DEEPSTACK),
    ModelFamily("deepseek_vl", **_JANUS),
    ModelFamily("deepseek_vl_hybrid", **_JANUS),
    ModelFamily("exaone4_5", **_QWEN),
    ModelFamily("fast_vlm", fast_vlm_images, llava_check),
    ModelFamily("gemma3", gemma3_images, gemma3_check, traits=_IMAGE),
    ModelFamily("gemma4", gemma4_images, projector="embed_vision", videos=True, traits=_IMAGE),
    ModelFamily("gemma4_unified", gemma4_images, tower="embed_vision", projector=None, videos=True, traits=_IMAGE),
    ModelFamily("glm46v", **_GLM),
    ModelFamily("glm4v", **_GLM),
    ModelFamily("glm4v_moe", **_GLM),
    ModelFamily("glm_ocr", **_GLM),
    ModelFamily("glmga", **_GLM),
    ModelFamily("got_ocr2", **_GOT),
    ModelFamily(
        "granite_docling",
        docling_images,
        tower="vision_model",
        decoder="text_model",
        projector=None,
        traits=_DEEPSTACK,
        tiles=True,
    ),
    ModelFamily("hunyuan_vl", hunyuan_images, projector=None),
    ModelFamily("hyperclovax_vision_v2", merged_images, tower="vision_model", projector="projector", videos=True),
    ModelFamily("idefics3", **_IDEFICS),
    ModelFamily("internvl", **_INTERNVL),
    ModelFamily("janus", **_JANUS),
    ModelFamily("kimi_k25", kimi_images, kimi_check, projector="mm_projector"),
    ModelFamily("lfm2_vl", lfm2_images, tiled_check, traits=_SHORT_CONVOLUTION, tiles=True),
    ModelFamily("lfm3_vl", merged_images, videos=True, traits=_SHORT_CONVOLUTION),
    ModelFamily("lighton_ocr", pixtral_images, tower="vision_encoder", projector="vision_projection"),
    ModelFamily("llava", **_LLAVA),
    ModelFamily("llava_next", **_ANYRES),
    ModelFamily("llava_next_video", **_ANYRES),
    ModelFamily("llava_onevision", **_ANYRES),
    ModelFamily("minicpm_ocr", **_MINICPM),
    ModelFamily("minicpmv4_6", **_MINICPM),
    ModelFamily("minicpmv4_7", **_MINICPM),
    ModelFamily("mistral3", pixtral_images),
    # Its table is looked up twice in a forward, for images and for markers: one memory would serve neither.
    ModelFamily("ovis2", ovis2_images, projector=None, tiles=True, encoder=EQUAL_TILES_WHOLE_FIRST),
    ModelFamily("paddleocr_vl", merged_images, tower="visual", projector="projector"),
    ModelFamily("paligemma", paligemma_images, traits=DecoderTraits(mask="prefix")),
    ModelFamily("perception_lm", perception_images, tiled_check, tiles=True, encoder=EQUAL_TILES_WHOLE_FIRST),
    ModelFamily("pp_chart2table", **_GOT),
    ModelFamily("qianfan_ocr", **_INTERNVL),
    ModelFamily("qwen2_5_omni_thinker", **_QWEN),
    ModelFamily("qwen2_5_vl", **_QWEN),
    ModelFamily("qwen2_vl", **_QWEN),
    ModelFamily("qwen3_5", **_QWEN, traits=_GATED_DELTA),
    ModelFamily("qwen3_5_moe", **_QWEN, traits=_GATED_DELTA),
    ModelFamily("qwen3_omni_moe_thinker", **_QWEN, traits=_DEEPSTACK),
    ModelFamily("qwen3_vl", **_QWEN, traits=_DEEPSTACK),
    ModelFamily("qwen3_vl_moe", **_QWEN, traits=_DEEPSTACK),
    ModelFamily("smolvlm", **_IDEFICS),
    ModelFamily("video_llama_3", merged_images, tower="vision_model", projector="projector"),
    ModelFamily("vipllava", **_LLAVA),
):
    register_family(_family)


def family_of(model: Any) -> ModelFamily:
    """The family of a model.

    Raises:
        TypeError: not a Hugging Face model. ValueError: no vision, or an unknown family.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or model_type is None:
        raise TypeError(f"patch: model must be a Hugging Face vision-language model, got {type(model).__name__}")
    if model_type in _families:
        return _families[model_type]
    known = ", ".join(sorted(_families))
    if model_type in REFUSED:
        raise ValueError(f"patch: model_type must be one of {known}, got {model_type!r}: {REFUSED[model_type]}")
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"patch: model must have a vision tower, got model_type {model_type!r} without vision_config; "
            f"supported families: {known}"
        )
    raise ValueError(
        f"patch: model_type must be one of {known}, got {model_type!r}; "
        "a new family needs one ModelFamily (crop/models/README.md)"
    )
