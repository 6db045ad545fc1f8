"""One square grid of a fixed size per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Box
from crop.models.clip import TOWERS, class_tokens
from crop.models.family import Placed, Prompt, Size
from crop.models.grids import pixtral_images

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def square_images(prompt: Prompt, side: int, processor_view: bool = False) -> Placed:
    """``side`` x ``side`` tokens per image, which show the whole image or what the processor shows of it.

    Raises:
        ValueError: the number of image tokens is not a multiple.
    """
    count = int((prompt.ids == prompt.config.image_token_id).sum())
    if count % (side * side):
        raise ValueError(f"patch: image tokens must be a multiple of {side} x {side} = {side * side}, got {count}")
    views = [WHOLE] * (count // (side * side))
    if processor_view and prompt.processor is not None:
        views = [  # without a size every region is whole
            WHOLE if size is None else resize_crop_pad_view(prompt.processor, size) for size in prompt.sizes(len(views))
        ]
    return prompt.place([VisionLayout.grid(side, side, box=view) for view in views])


def llava_images(prompt: Prompt) -> Placed:
    """LLaVA-1.5 and ViP-LLaVA with a CLIP or SigLIP tower; Pixtral where the tower is Pixtral's."""
    config = prompt.config
    vision = config.vision_config
    if vision.model_type == "pixtral":
        return pixtral_images(prompt)
    if vision.model_type not in TOWERS:
        raise ValueError(
            f"patch: the vision tower of {config.model_type} must be one of {', '.join(TOWERS)} (a fixed square "
            f"grid) or pixtral, got {vision.model_type!r}"
        )
    refuse_class_token(config)
    return square_images(prompt, vision.image_size // vision.patch_size, processor_view=True)


def fast_vlm_images(prompt: Prompt) -> Placed:
    """FastVLM: a convolutional tower over a square of fixed size."""
    return square_images(prompt, math.isqrt(prompt.config.image_seq_length), processor_view=True)


def janus_images(prompt: Prompt) -> Placed:
    """Janus and DeepSeek-VL: the image, padded to a square, one token per patch."""
    vision = prompt.config.vision_config
    return square_images(prompt, vision.image_size // vision.patch_size, processor_view=True)


def gemma3_images(prompt: Prompt) -> Placed:
    """Gemma 3: the resized image, pooled to a square. Pan-and-scan crops are images of their own to the model."""
    return square_images(prompt, math.isqrt(prompt.config.mm_tokens_per_image))


def gemma3_check(config: Any, processor: Any, sizes: Sequence[Size] | None, whole: bool) -> None:
    """The regions of a picture would not be those of its crops."""
    if getattr(processor, "do_pan_and_scan", False):
        raise ValueError(
            "patch: do_pan_and_scan of the image processor must be off, got True: its crops stand in the prompt as "
            "images of their own; crop the picture yourself and give each part its region"
        )


def paligemma_images(prompt: Prompt) -> Placed:
    """PaliGemma: the resized image, one token per patch."""
    vision = prompt.config.vision_config
    return square_images(prompt, vision.image_size // vision.patch_size)


def refuse_class_token(config: Any) -> None:
    """A class token among the vision features lies nowhere in the image. ValueError: the configuration keeps it."""
    strategy = getattr(config, "vision_feature_select_strategy", "default")  # ViP-LLaVA knows no other
    if strategy == "full" and class_tokens(config.vision_config):
        raise ValueError(
            "patch: vision_feature_select_strategy must be 'default' with a CLIP tower, got 'full': it keeps the class "
            "token among the vision features"
        )


def llava_check(config: Any, processor: Any, sizes: Sequence[Size] | None, whole: bool) -> None:
    """The processor decides which part of the image the tokens show."""
    if config.vision_config.model_type == "pixtral":
        return
    if processor is None and not whole:
        raise ValueError(
            f"patch: processor must be given for {config.model_type!r} with a region, because it decides which part of the "
            "image the tokens show, got None"
        )
    if processor is not None and sizes is None and not whole:
        resize_crop_pad_view(processor, None)  # refuses now if it needs the size


def resize_crop_pad_view(image_processor: Any, image_size: Size | None) -> Box:
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
