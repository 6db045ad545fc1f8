"""What transformers calls things: arguments of its models and of generate(); no other file of patching knows these names.

What is refused says why, before the model runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crop.models import ModelFamily
from crop.ops.transfer import download

OLDEST = (5, 17)  # transformers

_UNEQUAL = "a static cache needs layers of equal length; use patch(..., cache='uniform')"

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
SIZES = frozenset(  # tensors of a few numbers per picture, of which families read layouts
    """image_grid_thw video_grid_thw image_merge_sizes video_merge_sizes image_sizes batch_num_images target_sizes
    spatial_shapes image_position_ids video_position_ids num_frames_per_video""".split()
)

# Methods of a model that a block replaces.
GENERATE, ENCODE, EXPAND, PREPARE, MAKE_MASKS, CONTINUOUS = (
    "generate",
    "_maybe_prepare_encoder_kwargs_for_generation",
    "_expand_inputs_for_generation",
    "prepare_inputs_for_generation",
    "create_masks_for_generate",
    "generate_batch",
)


@functools.cache
def refuse_transformers() -> None:
    """Versions whose masks, caches and positions work in another way; one that was found new enough stays so."""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__).release < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RuntimeError(
            f"patch: transformers must be >= {oldest}, got {transformers.__version__}; "
            f'pip install --upgrade "transformers>={oldest}"'
        )


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside a compiled or a PEFT one, whose modules they share."""
    model = getattr(model, "_modules", {}).get("_orig_mod", model)
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model


def attention_of(config: Any) -> str:
    """Name of the attention implementation of a language model's configuration."""
    return config._attn_implementation or "eager"


def is_flash(config: Any) -> bool:
    """Whether the attention is one of the flash kernels, whose masks have two dimensions."""
    return "flash" in attention_of(config)


# ------------------------------------------------------------------------------ the multimodal model
def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """Arguments of a call by name."""
    return inspect.signature(module.forward).bind_partial(*args).arguments | kwargs if args else kwargs


def token_ids(arguments: Mapping[str, Any]) -> Tensor | None:
    """(batch, seq_len) ids of a call, None where it gives embeddings alone."""
    return arguments.get("input_ids")


def brings_pixels(arguments: Mapping[str, Any]) -> bool:
    """Whether the model itself will call its vision tower."""
    return any(arguments.get(name) is not None for name in PIXELS.values())


def encoded_by_generate(encode: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """What the model is going to be called with, from a call of ``ENCODE``: ids behind the cache, pixels as they come."""
    given = inspect.signature(encode).bind(*args, **kwargs).arguments
    arguments = dict(given["model_kwargs"])
    ids = given["inputs_tensor"] if given["model_input_name"] == "input_ids" else token_ids(arguments)
    cache = cache_of(arguments)
    past = 0 if cache is None else cache.get_seq_length()
    return arguments | {"input_ids": None if ids is None else ids[:, past:]}


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, under either name; None: there is none."""
    return arguments.get("cache") if arguments.get("cache") is not None else arguments.get("past_key_values")


def caller_mask(arguments: Mapping[str, Any]) -> Any:
    """The caller's attention mask."""
    return arguments.get("attention_mask")


def sees_whole_prompt(arguments: Mapping[str, Any]) -> bool:
    """Whether a prefix model is told which tokens are the prompt."""
    return arguments.get("token_type_ids") is not None


def brings_images(arguments: Mapping[str, Any], videos: bool) -> bool:
    """Whether a call carries image data; without any, an image token in it is a token like others.

    Raises:
        ValueError: it carries a video, and ``videos`` is False.
    """
    encoded = arguments.get("mm_encoder_outputs") or {}
    images, frames = (arguments.get(name) is not None or encoded.get(kind) is not None for kind, name in PIXELS.items())
    if frames and not videos:
        raise ValueError("patch: the prompt must hold images only, got video; give the frames as images")
    return images or frames


def on_host(
    ids: Tensor, arguments: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
    """What a plan needs on the CPU, read from the device at once.

    Args:
        arguments: of the call. given: the same, or what the caller of ``generate()`` gave, each image once.
    Returns:
        ids (batch, seq_len); which of them are no padding, bool; ``given`` with its ``SIZES`` there.
    """
    mask = caller_mask(arguments)
    sizes = {name: value for name, value in given.items() if name in SIZES and isinstance(value, Tensor)}
    if isinstance(mask, Tensor) and mask.ndim == 2:
        valid = mask[:, mask.shape[1] - ids.shape[1] :]
    else:  # no mask, or one that ``refuse_unsupported`` refuses
        valid = torch.ones(ids.shape, dtype=torch.bool)
    ids, valid, *values = download([ids, valid, *sizes.values()])
    return ids, valid.to(torch.bool), {**given, **dict(zip(sizes, values, strict=True))}


# ------------------------------------------------------------------------------ the language model and its layers
def _argument(name: str) -> Any:
    """A keyword argument of a call as an attribute; what is set is what the module gets."""
    return property(lambda call: call.kwargs.get(name), lambda call, value: call.kwargs.__setitem__(name, value))


class DecoderCall:
    """One call of the language model: ``embeds`` (batch, seq_len, dim), ``mask`` (two-dimensional, or made by the
    multimodal model), ``position_ids`` (..., 1 or batch, seq_len)."""

    embeds = _argument("inputs_embeds")
    mask = _argument("attention_mask")
    position_ids = _argument("position_ids")

    def __init__(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        self.module, self.kwargs = module, kwargs

    @property
    def deepstack(self) -> tuple[Tensor, list[Tensor]] | None:
        """Mask of the vision tokens, and the features of every further level that belong to them."""
        is_vision = self.kwargs.get("visual_pos_masks")
        return None if is_vision is None else (is_vision, self.kwargs["deepstack_visual_embeds"])

    @deepstack.setter
    def deepstack(self, value: tuple[Tensor, list[Tensor]]) -> None:
        self.kwargs["visual_pos_masks"], self.kwargs["deepstack_visual_embeds"] = value

    @property
    def per_layer(self) -> Tensor | None:
        """(batch, seq_len, layers, dim): what each layer adds to each token (Gemma 4); None: nothing."""
        return self.kwargs.get("per_layer_inputs")

    @per_layer.setter
    def per_layer(self, value: Tensor) -> None:
        self.kwargs["per_layer_inputs"] = value

    @property
    def last(self) -> int:
        """So many tokens at the end are all that its later layers need to run on, in some models; 0: they run on all."""
        kept = self.kwargs.get("logits_to_keep")
        return kept if isinstance(kept, int) else 0

    @last.setter
    def last(self, value: int) -> None:
        self.kwargs["logits_to_keep"] = value

    @property
    def cache(self) -> Any:
        """None: there is none."""
        return cache_of(self.kwargs)

    def make_masks(self) -> None:
        """What the language model would make of its mask, of this call and its cache, now."""
        from transformers.masking_utils import create_masks_for_generate

        given = {self._cache_name: self.cache, "position_ids": self.position_ids}
        self.mask = create_masks_for_generate(self.module.config, self.embeds, self.mask, **given)

    @property
    def _cache_name(self) -> str:
        """transformers 5.24 renamed the argument."""
        return "cache" if "cache" in inspect.signature(self.module.forward).parameters else "past_key_values"

    def make_cache(self) -> Any:
        """The cache that the model would make inside, where no maps could be attached; None where it wants none."""
        wanted = self.kwargs.get("use_cache")
        if self.module.training and getattr(self.module, "gradient_checkpointing", False):
            return None  # the model will not fill one
        if not (getattr(self.module.config, "use_cache", False) if wanted is None else wanted):
            return None
        from transformers import DynamicCache

        cache = self.kwargs[self._cache_name] = DynamicCache(config=self.module.config)
        return cache


class LayerCall:
    """One call of a decoder layer: ``hidden`` (batch, entries, dim), ``mask``, ``rotary`` (cos, sin), ``per_layer`` (batch,
    entries, dim)."""

    mask = _argument("attention_mask")
    rotary = _argument("position_embeddings")
    position_ids = _argument("position_ids")

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.module, self.args, self.kwargs = module, args, dict(kwargs)

    @property
    def hidden(self) -> Tensor:
        """Positional or by name, as the model gives it."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        if self.args:
            self.args = (value, *self.args[1:])
        else:
            self.kwargs["hidden_states"] = value

    @property
    def per_layer(self) -> Tensor | None:
        """Positional or by name; None: nothing."""
        if not _takes_per_layer(type(self.module)):
            return None
        return self.args[1] if len(self.args) > 1 else self.kwargs.get("per_layer_input")

    @per_layer.setter
    def per_layer(self, value: Tensor) -> None:
        if len(self.args) > 1:
            self.args = (self.args[0], value, *self.args[2:])
        else:
            self.kwargs["per_layer_input"] = value


@functools.cache
def _takes_per_layer(layer: type[nn.Module]) -> bool:
    return "per_layer_input" in inspect.signature(layer.forward).parameters


def past_length(cache: Any, mask: Any, added: int) -> int:
    """Input tokens before a call, read from the mask's shape where there is one: a static cache has its length on the device."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.shape[1] - added
    return 0 if cache is None else int(cache.get_seq_length())


def capacity_of(cache: Any) -> int | None:
    """Entries that a static cache has room for; None: it grows."""
    return getattr(cache.layers[0], "max_cache_len", None) if getattr(cache, "layers", None) else None


def with_hidden(output: Any, change: Callable[[Tensor, int | None], Tensor]) -> Any:
    """The language model's output with other hidden states: ``change(hidden, layer behind which they are)``, None: the norm."""
    if isinstance(output, tuple):
        return (change(output[0], None), *output[1:])
    states = getattr(output, "hidden_states", None)
    if states is not None:
        layers = [*range(-1, len(states) - 2), None]
        output.hidden_states = tuple(change(hidden, layer) for hidden, layer in zip(states, layers, strict=True))
    output.last_hidden_state = change(output.last_hidden_state, None)
    return output


# ------------------------------------------------------------------------------ what is refused
def refuse_generation(model: nn.Module, args: tuple, options: Mapping[str, Any], uniform: bool) -> None:
    """Options of generate() that pruning would get wrong; ``args`` and ``options`` are what it is called with."""
    given = args[1] if len(args) > 1 else options.get("generation_config")

    def option(name: str) -> Any:
        value = options[name] if name in options else getattr(given or model.generation_config, name, None)
        # generate() itself drops this one where it is the checkpoint's default (Gemma 3).
        return (
            None if (name, value, given) == ("cache_implementation", "hybrid", None) and name not in options else value
        )

    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        if option(name) not in (None, False):
            raise ValueError(
                f"patch: generate() must not use assisted generation, got {name}={option(name)!r}: its draft tokens "
                "would take part in the scoring; use plain decoding"
            )
    chunk, kind = option("prefill_chunk_size"), option("cache_implementation")
    if chunk is not None:
        raise ValueError(
            f"patch: generate() must prefill in one piece, got prefill_chunk_size={chunk}: the question would not be seen yet"
        )
    if kind == "static" and not uniform:
        raise ValueError(f"patch: cache_implementation must be None or 'dynamic', got 'static': {_UNEQUAL}")
    if kind not in (None, "dynamic", "static"):
        raise ValueError(
            f"patch: cache_implementation must be None, 'dynamic' or, with cache='uniform', 'static', got {kind!r}"
        )


def refuse_unsupported(arguments: Mapping[str, Any], ids: Tensor, language_model: nn.Module, uniform: bool) -> None:
    """Arguments of a call with images that this patch would get wrong."""
    from transformers import DynamicCache, StaticCache

    for name in ("output_attentions", "output_router_logits"):
        asked = arguments.get(name)
        if getattr(language_model.config, name, False) if asked is None else asked:
            raise ValueError(
                f"patch: {name} must be off, got True: every layer has them for the tokens that it holds, not for those of the "
                "input; ask outside of the block"
            )
    cache, mask = cache_of(arguments), caller_mask(arguments)
    got = type(cache).__name__
    if getattr(cache, "offloading", False):
        raise ValueError(f"patch: past_key_values must stay on its device, got a {got} with offloading=True")
    if isinstance(cache, StaticCache) and not uniform:
        raise ValueError(f"patch: past_key_values must be a DynamicCache, got {got}: {_UNEQUAL}")
    if isinstance(cache, StaticCache) and is_flash(language_model.config):
        raise ValueError(
            f"patch: past_key_values must be a DynamicCache under flash attention, got {got}; "
            "use attn_implementation='sdpa' or a dynamic cache"
        )
    if cache is not None and not isinstance(cache, (DynamicCache, StaticCache)):
        raise ValueError(f"patch: past_key_values must be a DynamicCache or a StaticCache, got {got}")
    wanted = (ids.shape[0], ids.shape[1] + (0 if cache is None else cache.get_seq_length()))
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if mask is not None and shape != wanted:
        raise ValueError(
            f"patch: attention_mask must be None or of shape (batch, past + seq_len) = {wanted}, got {shape}"
        )
    if language_model.training and getattr(language_model, "gradient_checkpointing", False):
        from transformers.modeling_layers import GradientCheckpointingLayer

        if "__call__" in vars(GradientCheckpointingLayer):
            # Up to 5.2x the whole call is run again in the backward pass, hooks included, without the forward's state.
            raise ValueError(
                "patch: gradient checkpointing must be off with this version of transformers, got a model in training mode "
                "with it on; transformers 5.24 leaves hooks outside of it"
            )


def refuse_decoder(family: ModelFamily, config: Any, positions: str, uniform: bool) -> None:
    """Decoders, or combinations with what was asked for, that this patch would get wrong.

    Args:
        config: of the language model. positions, uniform: as asked for.
    """
    name = attention_of(config)
    if name not in ("eager", "sdpa") and not is_flash(config):
        raise ValueError(f"patch: the attention implementation must be eager, sdpa or flash_attention_*, got {name!r}")
    if not family.masks_input(config):
        return
    if is_flash(config):
        raise ValueError(
            f"patch: the attention implementation must be eager or sdpa for {family.model_type!r}, got {name!r}: flash "
            "attention cannot express its masks over the tokens that are left"
        )
    if positions != "original" or uniform:
        got = f"positions={positions!r}" if positions != "original" else "cache='uniform'"
        raise ValueError(
            f"patch: {family.model_type!r}, whose masks are more than causal, needs positions='original' and cache='ragged', got {got}"
        )
