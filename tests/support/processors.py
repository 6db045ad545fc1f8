"""Image processors of the tiny LLaVA."""

from __future__ import annotations

from typing import Any

from tests.support.families.squares import LLAVA_SIDE


def image_processor(kind: str) -> Any:
    """LLaVA image processors for the tiny grid: "resize", "crop" (shortest edge, centre crop), "pad"."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    side = LLAVA_SIDE
    square = {"height": side, "width": side}
    if kind == "resize":
        return CLIPImageProcessorPil(size=square, do_center_crop=False)
    if kind == "crop":
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    if kind == "pad":
        return LlavaImageProcessorPil(size=square, crop_size=square, do_pad=True)
    raise ValueError(f"image_processor: kind must be resize, crop or pad, got {kind!r}")
