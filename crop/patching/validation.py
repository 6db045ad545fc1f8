"""What callers hand over: regions, sizes, model arguments. Checked and matched to images before anything runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from crop.geometry.region import Region
from crop.methods.base import POOL_MODES, Method

OLDEST = (5, 17)  # transformers


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside a compiled or a PEFT one, whose modules they share."""
    model = getattr(model, "_modules", {}).get("_orig_mod", model)
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model


def as_regions(region: Region | Sequence[Region] | None) -> list[Region] | None:
    if region is None:
        return None
    regions = [region] if isinstance(region, Region) or not isinstance(region, Sequence) else list(region)
    for entry in regions:
        if not isinstance(entry, Region):
            raise TypeError(f"patch: region must hold Region objects, got {type(entry).__name__}")
    return regions


def as_sizes(
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None,
) -> list[tuple[int, int]] | None:
    if image_size is None:
        return None
    wanted = "patch: image_size must be (width, height) in whole pixels, or one such pair per image"
    if not isinstance(image_size, (tuple, Sequence)):  # a tuple is soon told
        raise TypeError(f"{wanted}, got {image_size!r}")
    pairs = image_size if len(image_size) and isinstance(image_size[0], (tuple, Sequence)) else [image_size]
    for pair in pairs:
        whole = isinstance(pair, (tuple, Sequence)) and all(isinstance(side, (int, Integral)) for side in pair)
        if not whole or len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{wanted}, got {pair!r}")
    return [(int(width), int(height)) for width, height in pairs]


def check_method(method: Method, num_layers: int) -> None:
    """What a method says of itself; a method of the user's own may say anything."""
    last = 0
    for cut in method.cuts:
        layer = cut.layer
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise TypeError(f"patch: layer of a method must be an int or None, got {layer!r}")
        if not last < layer < num_layers:
            raise ValueError(f"patch: layer must be in [{last + 1}, num_layers={num_layers} - 1], got {layer}")
        if cut.rows not in ("text", "last", "raters"):
            raise ValueError(f"patch: rows of a method must be one of ('text', 'last', 'raters'), got {cut.rows!r}")
        last = layer
    if method.pool_mode not in POOL_MODES:
        raise ValueError(f"patch: pool_mode of a method must be one of {POOL_MODES}, got {method.pool_mode!r}")


def one_per_image(name: str, given: list, owners: list[int], copies: int) -> list:
    """Match what the caller gave per image to the images of a chunk.

    Args:
        owners: the sample of each image. copies: how often generate() repeated every sample, for beams and return
            sequences; the entries are repeated with them.
    """
    count = len(owners)
    refuse_number(name, given, count, copies)
    if len(given) == count:
        return given
    if len(given) * copies == count:
        first = [sample // copies for sample in owners if sample % copies == 0]
        return repeat_entries(given, first, copies)
    return given * count


def refuse_number(name: str, given: list, count: int, copies: int) -> None:
    """Of entries that are neither one per image, ``copies`` of each counted or not, nor one that fits every image."""
    if len(given) == 1 and (given[0] is None or (isinstance(given[0], Region) and given[0].is_whole)):
        return
    if count not in (len(given), len(given) * copies):
        raise ValueError(f"patch: {name} must be given once per image, got {len(given)} for {count} images")


def repeat_entries(entries: list, owners: list[int], copies: int) -> list:
    """Repeat what belongs to the images of each sample; ``owners``: the sample of each entry, ascending."""
    repeated: list = []
    for sample in dict.fromkeys(owners):
        mine = [entry for entry, owner in zip(entries, owners, strict=True) if owner == sample]
        repeated += mine * copies
    return repeated


def refuse_sliding_window(config: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        other = f"sliding_window={window}" if window else None
    else:
        other = sorted(set(kinds) - {"full_attention"})
    if other:
        raise ValueError(f"patch: every decoder layer must use full attention, got {other}")


def refuse_attention(config: Any) -> None:
    name = config._attn_implementation or "eager"
    if name not in ("eager", "sdpa") and "flash" not in name:
        raise ValueError(f"patch: the attention implementation must be eager, sdpa or flash_attention_*, got {name!r}")


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"patch: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def past_length(cache: Any, mask: Any, added: int) -> int:
    """Logical positions before a chunk; read from the mask's shape where there is one, since a static cache keeps its
    length on the device."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.shape[1] - added
    return 0 if cache is None else int(cache.get_seq_length())


@functools.cache
def refuse_transformers() -> None:
    """Versions whose masks, caches and positions work in another way; one that was found new enough stays so."""
    import transformers

    if _release(transformers.__version__) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RuntimeError(
            f"patch: transformers must be >= {oldest}, got {transformers.__version__}; "
            f'pip install --upgrade "transformers>={oldest}"'
        )


@functools.cache
def _release(version: str) -> tuple[int, ...]:
    from packaging.version import Version

    return Version(version).release


def refuse_generation(config: Any, kwargs: Mapping[str, Any], uniform: bool) -> None:
    """Options of generate() that pruning would get wrong."""

    def option(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if option(name) is not None:
            raise ValueError(
                f"patch: generate() must not use assisted generation, got {name}={option(name)!r}: its draft tokens "
                "would take part in the scoring; use plain decoding"
            )
    if option("prefill_chunk_size") is not None:
        raise ValueError(
            "patch: generate() must prefill in one piece, got "
            f"prefill_chunk_size={option('prefill_chunk_size')}: the question would not be seen yet"
        )
    kind = option("cache_implementation")
    if kind == "static" and not uniform:
        raise ValueError(
            "patch: cache_implementation must be None or 'dynamic', got 'static': a static cache needs layers of equal "
            "length; use patch(..., cache='uniform')"
        )
    if kind not in (None, "dynamic", "static"):
        raise ValueError(
            f"patch: cache_implementation must be None, 'dynamic' or, with cache='uniform', 'static', got {kind!r}"
        )


def cache_name(module: nn.Module) -> str:
    """What a module calls its cache: transformers 5.24 renamed ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, under either name; None: there is none."""
    return arguments.get("cache") if arguments.get("cache") is not None else arguments.get("past_key_values")


def refuse_unsupported(arguments: Mapping[str, Any], ids: Tensor, language_model: nn.Module, uniform: bool) -> None:
    """Arguments of a chunk with images that this patch would get wrong."""
    from transformers import DynamicCache, StaticCache

    cache = cache_of(arguments)
    if isinstance(cache, StaticCache) and not uniform:
        raise ValueError(
            f"patch: past_key_values must be a DynamicCache, got {type(cache).__name__}: a static cache needs layers of "
            "equal length; use patch(..., cache='uniform')"
        )
    if isinstance(cache, StaticCache) and "flash" in (language_model.config._attn_implementation or ""):
        raise ValueError(
            f"patch: past_key_values must be a DynamicCache under flash attention, got {type(cache).__name__}; "
            "use attn_implementation='sdpa' or a dynamic cache"
        )
    if cache is not None and not isinstance(cache, (DynamicCache, StaticCache)):
        raise ValueError(f"patch: past_key_values must be a DynamicCache or a StaticCache, got {type(cache).__name__}")
    mask = arguments.get("attention_mask")
    if mask is not None:
        wanted = (ids.shape[0], ids.shape[1] + (0 if cache is None else cache.get_seq_length()))
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        if got != wanted:
            raise ValueError(
                f"patch: attention_mask must be None or of shape (batch, past + seq_len) = {wanted}, got {got}"
            )
    if language_model.training and getattr(language_model, "gradient_checkpointing", False):
        from transformers.modeling_layers import GradientCheckpointingLayer

        if "__call__" in vars(GradientCheckpointingLayer):
            # Up to 5.2x the whole call is run again in the backward pass, hooks included, without the forward's state.
            raise ValueError(
                "patch: gradient checkpointing must be off with this version of transformers, got a model in training mode "
                "with it on; transformers 5.24 leaves hooks outside of it"
            )


def refuse_past(method: Method, arguments: Mapping[str, Any]) -> None:
    """Scores without positions need the angles of all keys, and those of cached ones are gone."""
    cache = cache_of(arguments)
    if cache is not None and cache.get_seq_length() and not all(cut.rope for cut in method.cuts):
        raise ValueError(
            f"patch: rope must be True for an image that follows a cache, got False and {cache.get_seq_length()} cached "
            "tokens; score with positions, or process the whole conversation without a cache"
        )


def brings_images(arguments: Mapping[str, Any], videos: bool) -> bool:
    """Whether a call carries image data; without any, an image token in it is a token like others."""
    encoded = arguments.get("mm_encoder_outputs") or {}
    images = arguments.get("pixel_values") is not None or encoded.get("image") is not None
    film = arguments.get("pixel_values_videos") is not None or encoded.get("video") is not None
    if film and not videos:
        raise ValueError("patch: the prompt must hold images only, got video; give the frames as images")
    return images or film


def wants_cache(language_model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(getattr(language_model.config, "use_cache", False) if use_cache is None else use_cache)


def real_tokens(arguments: Mapping[str, Any], ids: Tensor) -> Tensor:
    """(batch, seq_len) bool on the CPU: the tokens of this chunk that are no padding."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask[:, mask.shape[1] - ids.shape[1] :].cpu().to(torch.bool)


def replace_method(owner: Any, name: str, around: Callable[..., Any], undo: ExitStack) -> None:
    """Let ``around(original, *args, **kwargs)`` stand for a method of one object, which may lack it, until ``undo``."""
    own = vars(owner)  # past a module's own way of setting attributes, which is slow and for parameters
    had, original = name in own, getattr(owner, name, None)

    @functools.wraps(original or around)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    def restore() -> None:
        if had:
            own[name] = original
        else:
            del own[name]

    own[name] = replacement
    undo.callback(restore)
