"""Attention that vision tokens receive inside the vision tower, for methods that rank tokens before the language model."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from crop import ops
from crop.patching.attention_hook import tap
from crop.patching.validation import one_per_image

TOWERS = ("clip_vision_model", "siglip_vision_model")


class VisionSalience(AbstractContextManager):
    """Reads the attention of the tower's layer whose output becomes the features, while a block lasts.

    From the class token where the tower has one, else the mean over all tokens; averaged over heads.

    Args:
        tower: the vision tower. config: of the whole model.
    Raises:
        ValueError: a tower whose tokens do not stand one for one for the vision tokens of the language model.
    Source: VisionZip (arXiv 2412.04467), which ranks tokens so.
    """

    def __init__(self, tower: nn.Module, config: Any) -> None:
        kind = getattr(getattr(config, "vision_config", None), "model_type", None)
        if kind not in TOWERS:
            raise ValueError(
                f"patch: a method that reads the vision tower's attention needs a tower of {', '.join(TOWERS)}, "
                f"got {kind!r}"
            )
        layers = next(m.layers for m in tower.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList))
        feature = config.vision_feature_layer
        if not isinstance(feature, int):
            raise ValueError(f"patch: vision_feature_layer must be one layer for this method, got {feature!r}")
        # Hidden state 0 is the input of layer 0, hence -2 the output of the last layer but one.
        self.attention = layers[feature if feature < 0 else feature - 1].self_attn
        self.has_class_token = kind == "clip_vision_model"
        self.found: Tensor | None = None
        self.undo = ExitStack()

    def __enter__(self) -> VisionSalience:
        self.undo.enter_context(tap(self.attention, self._read))
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo.close()

    @torch.no_grad()
    def _read(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        first = int(self.has_class_token)
        images, tokens = query.shape[0], key.shape[2]
        index = torch.arange(first, tokens, device=query.device).expand(images, -1)
        rows = query[:, :, :1] if self.has_class_token else query
        self.found = ops.attention_mass(rows.contiguous(), key.contiguous(), index, scale=scale)

    def of(self, owners: list[int], copies: int) -> Tensor:
        """(num_images, N) float32 of the images of a chunk, whose samples generate() may have repeated.

        Args:
            owners: the sample of each image. copies: how often every sample was repeated.
        """
        if self.found is None:
            raise RuntimeError("patch: the vision tower must have run inside the block, got features from elsewhere")
        rows = one_per_image("salience", list(range(len(self.found))), owners, copies)
        return self.found[torch.tensor(rows, device=self.found.device)]
