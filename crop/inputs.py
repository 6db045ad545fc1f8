"""What callers hand over: regions, sizes, model arguments. Checked and matched to images before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .region import Region


def as_regions(region: Region | Sequence[Region] | None) -> list[Region] | None:
    if region is None:
        return None
    regions = [region] if isinstance(region, Region) else list(region)
    for entry in regions:
        if not isinstance(entry, Region):
            raise TypeError(f"patch: region must hold Region objects, got {type(entry).__name__}")
    return regions


def as_sizes(
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None,
) -> list[tuple[int, int]] | None:
    if image_size is None:
        return None
    sizes = [image_size] if isinstance(image_size[0], int) else list(image_size)
    for size in sizes:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"patch: image_size must be (width, height) in pixels, got {size}")
    return [(int(width), int(height)) for width, height in sizes]


def one_per_image(name: str, given: list, owners: list[int], ids: Tensor) -> list:
    """Match what the caller gave per image to the images of a chunk (``owners``: the sample of each).

    generate() repeats every sample for beams and several returned sequences; the entries are repeated with them.
    """
    count = len(owners)
    if len(given) == count:
        return given
    if len(given) == 1 and (
        given[0] is None or (isinstance(given[0], Region) and given[0].is_whole)
    ):
        return given * count
    copies = count // max(len(given), 1)
    if copies * len(given) == count and repeats(ids, copies):
        first = [sample // copies for sample in owners if sample % copies == 0]
        return repeat_entries(given, first, copies)
    raise ValueError(
        f"patch: {name} must be given once per image, got {len(given)} for {count} images"
    )


def repeats(ids: Tensor, copies: int) -> bool:
    """Whether each run of ``copies`` samples is one sample repeated."""
    if ids.shape[0] % copies:
        return False
    groups = ids.view(-1, copies, ids.shape[1])
    return bool((groups == groups[:, :1]).all())


def repeat_entries(entries: list, owners: list[int], copies: int) -> list:
    """Repeat what belongs to the images of each sample; ``owners``: the sample of each entry, ascending."""
    repeated: list = []
    for sample in dict.fromkeys(owners):
        mine = [entry for entry, owner in zip(entries, owners, strict=True) if owner == sample]
        repeated += mine * copies
    return repeated


def refuse_sliding_window(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds or (window and getattr(config, "layer_types", None) is None):
        raise ValueError(
            f"patch: every decoder layer must use full attention, got {sorted(kinds) or f'sliding_window={window}'}"
        )


def refuse_unsupported(arguments: Mapping[str, Any], language_model: nn.Module) -> None:
    """Arguments of a chunk with images that this patch would get wrong."""
    from transformers import DynamicCache

    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"patch: attention_mask must be (batch, seq_len) or None, got {shape}")
    cache = arguments.get("past_key_values")
    if cache is not None and not isinstance(cache, DynamicCache):
        raise ValueError(
            f"patch: past_key_values must be a DynamicCache, got {type(cache).__name__}"
        )
    if language_model.training and getattr(language_model, "gradient_checkpointing", False):
        raise ValueError(
            "patch: gradient checkpointing must be off, got a model in training mode with it on"
        )


def wants_cache(language_model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(
        getattr(language_model.config, "use_cache", False) if use_cache is None else use_cache
    )


def real_tokens(arguments: Mapping[str, Any], ids: Tensor) -> Tensor:
    """(batch, seq_len) bool on the CPU: the tokens of this chunk that are no padding."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask[:, mask.shape[1] - ids.shape[1] :].cpu().to(torch.bool)
