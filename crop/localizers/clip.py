"""Similarity of image patches and the question in a CLIP or SigLIP model as a localizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.localizers.boxes import box_settings, check_ranges, find_region
from crop.localizers.pretrained import load_pretrained
from crop.models.fixed import resize_crop_pad_view

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ClipLocalizer:
    """Patches that a CLIP or SigLIP model finds more like the question than their surroundings ("clip").

    Patch embeddings are what the model's pooling would make of one patch alone: the value path of the last layer for
    CLIP, the attention head for SigLIP. A patch scores by how many standard deviations its similarity to the question,
    less that to ``neutral``, exceeds the image's mean.

    Args:
        model: ``CLIPModel``, ``SiglipModel`` or one of the same parts, in evaluation mode. processor: its processor.
        neutral: text that fits every image; what is like it says nothing about the question.
        deviations: standard deviations above the mean from which a patch scores at all.
        threshold, gap, max_boxes, dilate, min_confidence: as ``find_region``.
    Raises:
        TypeError: a model without these parts. ValueError: a setting out of its range.
    Source: value path as in MaskCLIP (arXiv 2112.01071); the rest is own choice.
    """

    model: nn.Module
    processor: Any
    neutral: str = "a photo"
    deviations: float = 1.0
    threshold: float = 0.3
    gap: int = 0
    max_boxes: int = 4
    dilate: int = 0
    min_confidence: float = 0.5

    def __post_init__(self) -> None:
        check_ranges("ClipLocalizer", self)
        vision = getattr(self.model, "vision_model", None)
        if vision is None or not hasattr(self.model, "get_text_features"):
            raise TypeError(f"ClipLocalizer: model must be a CLIP or SigLIP model, got {type(self.model).__name__}")
        if not (hasattr(vision, "head") or hasattr(self.model, "visual_projection")):
            got = type(self.model).__name__
            raise TypeError(
                f"ClipLocalizer: model must have an attention-pooling head or a visual projection, got {got}"
            )

    @staticmethod
    def load(path: str | Path, device: str = "cpu") -> ClipLocalizer:
        """With model and processor from a folder or a name on the hub; see ``load_pretrained`` for what is raised."""
        return ClipLocalizer(*load_pretrained("ClipLocalizer.load", path, "AutoModel", device))

    @torch.no_grad()
    def __call__(self, image: Image, question: str) -> Region:
        if not question.strip():
            return Region.whole(0.0, "the question is empty")
        layout, similarity = self.compare(image, [question, self.neutral])
        score = similarity[0] - similarity[1]
        score = (score - score.mean()) / score.std().clamp(min=1e-6)
        return find_region(layout, (score - self.deviations).clamp(min=0), **box_settings(self))

    @torch.no_grad()
    def compare(self, image: Image, texts: list[str]) -> tuple[VisionLayout, Tensor]:
        """Cosine of every text with every patch.

        Args:
            image: RGB. texts: cut off at what the model can read.
        Returns:
            VisionLayout of the patches, (len(texts), N) float32 on the CPU.
        """
        model, processor = self.model, self.processor
        pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        patches = self._patches(pixels.to(model.device, model.dtype))[0].float()
        length = model.config.text_config.max_position_embeddings  # padded to as SigLIP was trained; CLIP masks it
        shape = {"padding": "max_length", "truncation": True, "max_length": length}
        words = processor.tokenizer(texts, return_tensors="pt", **shape)
        found = model.get_text_features(**words.to(model.device))
        text = (found if isinstance(found, Tensor) else found.pooler_output).float()
        cosine = nn.functional.normalize(text, dim=-1) @ nn.functional.normalize(patches, dim=-1).mT
        height, width = (side // model.config.vision_config.patch_size for side in pixels.shape[-2:])
        view = resize_crop_pad_view(processor.image_processor, image.size)
        return VisionLayout.grid(height, width, box=view), cosine.cpu()

    def _patches(self, pixels: Tensor) -> Tensor:
        """(1, N, dim) embeddings of the patches in the space of the texts."""
        vision = self.model.vision_model
        if hasattr(vision, "head"):
            hidden = vision(pixel_values=pixels).last_hidden_state
            return vision.head(hidden.transpose(0, 1)).unsqueeze(0)
        last = vision.encoder.layers[-1]
        entered: list[Tensor] = []
        hook = last.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        try:
            vision(pixel_values=pixels)
        finally:
            hook.remove()
        attention = last.self_attn
        value = attention.out_proj(attention.v_proj(last.layer_norm1(entered[0][:, 1:])))  # without the class token
        return self.model.visual_projection(vision.post_layernorm(value))
