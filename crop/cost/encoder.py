"""The sizes of a vision encoder that its cost depends on, and what it does to the pictures of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from crop.cost.geometry import LayerGeometry, elements
from crop.cost.speed import Speed
from crop.geometry.pieces import Encoding
from crop.models import ModelFamily
from crop.models.encoders import extra_tokens


@dataclass(frozen=True)
class EncoderGeometry:
    """An encoder that can take part of a picture, and the projector behind it.

    Args:
        layers: from first to last, and the modules that they are. lengths: images -> of every layer, the lengths of the
            sequences that it attends in.
        embedding: elements of the matrix that every patch passes. extra: class tokens of a sequence.
        behind: elements of the tower's matrices behind its layers, and patches of a row of theirs.
        projector: the same of what is behind the tower, which runs on zeros where nothing was encoded.
    """

    layers: tuple[LayerGeometry, ...]
    blocks: tuple[nn.Module, ...]
    lengths: Callable[[Sequence[Encoding]], list[list[int]]]
    embedding: int
    extra: int
    behind: tuple[int, int]
    projector: tuple[int, int]

    @staticmethod
    def of(family: ModelFamily, model: nn.Module) -> EncoderGeometry | None:
        """Read off modules and configuration, no weight is read; None: of a kind that is not known here."""
        encoder, (tower, *more) = family.encoder_of(model.config), family.vision_modules(family.base(model))
        blocks = next((part for part in tower.modules() if _is_blocks(part)), None)
        if encoder is None or blocks is None:
            return None
        config = tower.config
        width = getattr(config, "embed_dim", config.hidden_size)
        heads = getattr(config, "num_heads", None) or config.num_attention_heads
        layers = [LayerGeometry(elements(block), heads, width // heads, width // heads, 0) for block in blocks]
        inside = {id(part) for part in blocks.modules()}
        outside = [part for part in _matrices(tower) if id(part) not in inside]
        embedding = next(part for part in outside if not hasattr(part, "in_features"))
        outside.remove(embedding)
        # An older transformers has another name for several.
        levels = getattr(model.config, "vision_feature_layers", getattr(model.config, "vision_feature_layer", None))
        levels = len(levels) if isinstance(levels, (list, tuple)) else 1  # whose features are joined

        def behind(parts: list[nn.Module]) -> tuple[int, int]:
            if not parts:
                return 0, 1
            # Else the columns of the first are those of the patches that make a row.
            merged = getattr(tower, "spatial_merge_size", 0) ** 2 or _columns(parts[0]) // width // levels
            return sum(map(elements, parts)), max(1, merged)

        return EncoderGeometry(
            tuple(layers),
            tuple(blocks),
            lambda images: encoder.lengths(tower, images),
            elements(embedding),
            extra_tokens(tower),
            behind(outside),
            behind([part for one in more for part in _matrices(one)]),
        )

    def matrices(self, images: Sequence[Encoding]) -> list[tuple[int, int]]:
        """(elements of matrices, rows that pass them) of one pass over some images, for what is taken of them; layers first."""
        lengths = self.lengths(images)
        patches, of_all = (
            sum(found[0]) - self.extra * len(found[0])
            for found in (lengths, self.lengths([replace(one, taken=torch.ones_like(one.taken)) for one in images]))
        )
        found = [(layer.weights, sum(counts)) for layer, counts in zip(self.layers, lengths, strict=True)]
        found.append((self.embedding, patches))
        return found + [
            (weights, rows // merged) for (weights, merged), rows in ((self.behind, patches), (self.projector, of_all))
        ]

    def attention_flops(self, images: Sequence[Encoding]) -> list[float]:
        """Of both products of attention of every layer, by full squares."""
        pairs = zip(self.layers, self.lengths(images), strict=True)
        return [sum(map(layer.attention_flops, lengths)) for layer, lengths in pairs]

    def flops(self, images: Sequence[Encoding]) -> float:
        """Of one pass."""
        return sum(2.0 * weights * rows for weights, rows in self.matrices(images)) + sum(self.attention_flops(images))

    def seconds(self, images: Sequence[Encoding], speed: Speed, host: float) -> float:
        """Of one pass, in which every layer takes the longer of the device and the ``host``, which launches it."""
        products = [speed.product_seconds(weights, rows) for weights, rows in self.matrices(images)]
        # These layers have no triangle to spare.
        attention = [2 * speed.attention * flops for flops in self.attention_flops(images)]
        layers = sum(max(host, sum(both)) for both in zip(products, attention, strict=False))
        return layers + sum(products[len(attention) :])


def _is_blocks(part: nn.Module) -> bool:
    """Whether it is a list of layers with attention."""
    return (
        isinstance(part, nn.ModuleList) and len(part) > 0 and any("att" in name for name, _ in part[0].named_children())
    )


def _matrices(module: nn.Module) -> Iterator[nn.Module]:
    """Linear layers and convolutions; not those of a head that pools the whole picture, which nobody reads."""
    if hasattr(module, "probe"):
        return
    if hasattr(module, "out_features") or isinstance(module, (nn.Conv2d, nn.Conv3d)):
        yield module
    for part in module.children():
        yield from _matrices(part)


def _columns(part: nn.Module) -> int:
    return part.in_features if hasattr(part, "in_features") else part.weight[0].numel()
