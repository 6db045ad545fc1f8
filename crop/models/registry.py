"""The families, by model type; the one table that knows a family by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from crop.models.anyres import anyres_images, anyres_pieces
from crop.models.encoders import EQUAL_TILES, GRID, LayerEncoder, TileEncoder
from crop.models.family import DecoderTraits, ModelFamily
from crop.models.fixed import fast_vlm_images, gemma3_images, llava_check, llava_images, paligemma_images
from crop.models.grids import merged_images, pixtral_images
from crop.models.tiles import (
    downsampled_images,
    idefics3_images,
    internvl_images,
    ovis2_images,
    perception_images,
    tiled_check,
)

_VISUAL: dict[str, Any] = dict(tower="visual", projector=None, encoder=GRID)

_IDEFICS: dict[str, Any] = dict(tower="vision_model", decoder="text_model", projector="connector", encoder=EQUAL_TILES)

_DEEPSTACK = DecoderTraits(deepstack_method="_deepstack_process")

_ANYRES = TileEncoder(anyres_pieces)

_COHERE = DecoderTraits(unrotated=("full_attention",))

_GATED_DELTA = DecoderTraits(recurrent=("linear_attention",))

_families: dict[str, ModelFamily] = {}


def register_family(family: ModelFamily) -> None:
    """Make a family known to ``patch``, the localizers and the tools, in the place of one of the same model type."""
    _families[family.model_type] = family


def families() -> dict[str, ModelFamily]:
    """All known families by model type."""
    return dict(_families)


for _family in (
    ModelFamily("aya_vision", downsampled_images, tiled_check, encoder=EQUAL_TILES, traits=_COHERE),
    ModelFamily("cohere2_vision", downsampled_images, tiled_check, encoder=EQUAL_TILES, traits=_COHERE),
    ModelFamily("fast_vlm", fast_vlm_images, llava_check),
    ModelFamily("gemma3", gemma3_images, traits=DecoderTraits(mask="image")),
    ModelFamily("glm4v", merged_images, **_VISUAL),
    ModelFamily("glm46v", merged_images, **_VISUAL),
    ModelFamily("glm4v_moe", merged_images, **_VISUAL),
    ModelFamily("glm_ocr", merged_images, **_VISUAL),
    ModelFamily("idefics3", idefics3_images, tiled_check, **_IDEFICS),
    ModelFamily("internvl", internvl_images, tiled_check, encoder=EQUAL_TILES),
    ModelFamily("lighton_ocr", pixtral_images, tower="vision_encoder", projector="vision_projection"),
    ModelFamily("llava", llava_images, llava_check, encoder=LayerEncoder()),
    ModelFamily("llava_next", anyres_images, encoder=_ANYRES),
    ModelFamily("llava_onevision", anyres_images, encoder=_ANYRES),
    ModelFamily("mistral3", pixtral_images),
    # Its table is looked up twice in a forward, for images and for markers: one memory would serve neither.
    ModelFamily("ovis2", ovis2_images, projector=None, encoder=EQUAL_TILES),
    ModelFamily("paddleocr_vl", merged_images, tower="visual", projector="projector"),
    ModelFamily("paligemma", paligemma_images, traits=DecoderTraits(mask="prefix")),
    ModelFamily("perception_lm", perception_images, tiled_check, encoder=EQUAL_TILES),
    ModelFamily("qwen2_vl", merged_images, **_VISUAL, videos=True),
    ModelFamily("qwen2_5_vl", merged_images, **_VISUAL, videos=True),
    ModelFamily("qwen3_vl", merged_images, **_VISUAL, videos=True, traits=_DEEPSTACK),
    ModelFamily("qwen3_vl_moe", merged_images, **_VISUAL, videos=True, traits=_DEEPSTACK),
    ModelFamily("qwen3_5", merged_images, **_VISUAL, videos=True, traits=_GATED_DELTA),
    ModelFamily("qwen3_5_moe", merged_images, **_VISUAL, videos=True, traits=_GATED_DELTA),
    ModelFamily("smolvlm", idefics3_images, tiled_check, **_IDEFICS),
    ModelFamily("vipllava", llava_images, llava_check, encoder=LayerEncoder()),
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
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"patch: model must have a vision tower, got model_type {model_type!r} without vision_config; "
            f"supported families: {known}"
        )
    raise ValueError(
        f"patch: model_type must be one of {known}, got {model_type!r}; "
        "a new family needs one ModelFamily (crop/models/README.md)"
    )
