"""What differs between model families: where the vision tokens are, and where in the image each one looks.

This is the only module that knows a family by name. A family is one :class:`Adapter` in ``ADAPTERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Box = tuple[float, float, float, float]
Grid = tuple[int, int]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Adapter:
    """One family of Hugging Face vision-language models.

    Args:
        model_type: ``config.model_type`` of the family.
        grids: (config, (num_images, 3) grid sizes of the vision tower or None, number of image tokens) -> token
            grid (rows, columns) of each image in the chunk, in prompt order.
        view: (image processor, image size) -> rectangle of the original image, normalised, that the token
            grid covers; may reach outside the image where the processor pads. None: always the whole image.
    """

    model_type: str
    grids: Callable[[Any, Tensor | None, int], list[Grid]]
    view: Callable[[Any, tuple[int, int] | None], Box] | None = None

    def base(self, model: nn.Module) -> nn.Module:
        """The multimodal model below the language-model head."""
        return model.model if hasattr(model, "lm_head") else model

    def vision_tower(self, base: nn.Module) -> nn.Module:
        """The image encoder."""
        return base.visual if hasattr(base, "visual") else base.vision_tower

    def language_model(self, model: nn.Module) -> nn.Module:
        """The decoder: has ``layers``, ``norm`` and ``config``."""
        return self.base(model).language_model


def split_images(is_image: Tensor, grids: Sequence[Grid]) -> list[tuple[int, Tensor]]:
    """Share the image tokens of a chunk out among its images.

    Args:
        is_image: (batch, seq_len) bool on the CPU, True where an image token stands.
        grids: token grid of each image, in prompt order.
    Returns:
        (sample, positions (num_tokens,) int64) per image, in prompt order.
    Raises:
        ValueError: the image tokens do not fill exactly these grids.
    """
    found: list[tuple[int, Tensor]] = []
    for sample, row in enumerate(is_image):
        position = torch.nonzero(row).flatten()
        while len(position):
            rows, columns = grids[len(found)] if len(found) < len(grids) else (0, 0)
            if not 0 < rows * columns <= len(position):
                raise ValueError(
                    f"patch: sample {sample} must hold whole images of the grids {list(grids)}, "
                    f"got {int(row.sum())} image tokens"
                )
            found.append((sample, position[: rows * columns]))
            position = position[rows * columns :]
    if len(found) != len(grids):
        raise ValueError(
            f"patch: the prompt must hold whole images of the grids {list(grids)}, got tokens for {len(found)}"
        )
    return found


def _llava_grids(config: Any, grid_thw: Tensor | None, count: int) -> list[Grid]:
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(
            "patch: the vision tower of llava must be one of clip_vision_model, siglip_vision_model "
            f"(a fixed square grid), got {vision.model_type!r}"
        )
    side = vision.image_size // vision.patch_size
    if count % (side * side):
        raise ValueError(
            f"patch: image tokens must be a multiple of {side} x {side} = {side * side}, got {count}; "
            "a class token among the vision features (vision_feature_select_strategy='full' on a CLIP tower) "
            "is not supported"
        )
    return [(side, side)] * (count // (side * side))


def _qwen_grids(config: Any, grid_thw: Tensor | None, count: int) -> list[Grid]:
    if grid_thw is None:
        raise ValueError("patch: image_grid_thw must be given with image tokens, got None")
    merge = config.vision_config.spatial_merge_size
    grids = []
    for frames, height, width in grid_thw.tolist():
        if frames != 1:
            raise ValueError(f"patch: image_grid_thw must have one frame per image, got {frames}")
        grids.append((height // merge, width // merge))
    return grids


def resize_crop_pad_view(image_processor: Any, image_size: tuple[int, int] | None) -> Box:
    """Rectangle of the original image that a CLIP-style processor shows to the vision tower.

    Follows the order of the processor: pad to a square, resize, centre crop.

    Args:
        image_processor: has ``do_resize``, ``size``, ``do_center_crop``, ``crop_size``, optionally ``do_pad``.
        image_size: (width, height) of the original, pixels; needed where the processor crops or pads.
    Raises:
        ValueError: the size is needed and missing.
    """
    pads = bool(getattr(image_processor, "do_pad", False))
    crops = bool(getattr(image_processor, "do_center_crop", False))
    if not pads and not crops:
        return WHOLE
    if image_size is None:
        raise ValueError(
            "patch: image_size must be given as (width, height) because this processor "
            f"{'pads' if pads else 'crops'}, got None"
        )
    width, height = (float(side) for side in image_size)
    x0, y0, x1, y1 = 0.0, 0.0, width, height
    if pads:
        side = max(width, height)
        # Integer halves, as processors paste the image.
        x0, y0 = -((side - width) // 2), -((side - height) // 2)
        x1, y1 = x0 + side, y0 + side
    if crops:
        shown_w, shown_h = x1 - x0, y1 - y0
        scale_x = scale_y = 1.0
        if getattr(image_processor, "do_resize", False):
            size = dict(image_processor.size)
            if size.get("shortest_edge"):
                scale_x = scale_y = size["shortest_edge"] / min(shown_w, shown_h)
            else:
                scale_x, scale_y = size["width"] / shown_w, size["height"] / shown_h
        crop = dict(image_processor.crop_size)
        crop_w, crop_h = crop["width"] / scale_x, crop["height"] / scale_y
        x0, y0 = x0 + (shown_w - crop_w) / 2, y0 + (shown_h - crop_h) / 2
        x1, y1 = x0 + crop_w, y0 + crop_h
    return x0 / width, y0 / height, x1 / width, y1 / height


ADAPTERS: dict[str, Adapter] = {
    adapter.model_type: adapter
    for adapter in (
        Adapter("llava", _llava_grids, view=resize_crop_pad_view),
        Adapter("qwen2_5_vl", _qwen_grids),
    )
}


def adapter_for(model: Any) -> Adapter:
    """The adapter of a model.

    Raises:
        TypeError: not a Hugging Face model. ValueError: no vision, or a family without an adapter.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or model_type is None:
        raise TypeError(f"patch: model must be a Hugging Face vision-language model, got {type(model).__name__}")
    known = ", ".join(sorted(ADAPTERS))
    if model_type in ADAPTERS:
        return ADAPTERS[model_type]
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"patch: model must have a vision tower, got model_type {model_type!r} without vision_config; "
            f"supported families: {known}"
        )
    raise ValueError(
        f"patch: model_type must be one of {known}, got {model_type!r}; "
        "a new family needs one Adapter in crop/models.py"
    )
