"""The sizes of a decoder that its cost depends on, layer by layer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from crop.models import ModelFamily


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, of which every token passes a few."""

    count: int  # experts of the layer
    per_token: int  # those that a token passes
    weights: int  # elements of the matrices of one expert


CHUNK = 64  # tokens that the gated delta rule takes at a time, in transformers and in flash-linear-attention


@dataclass(frozen=True)
class State:
    """What a recurrent layer (gated delta rule, short convolution) carries on in the place of keys and values."""

    heads: int  # each has a matrix of its own, float32; 0 of a convolution alone
    key_dim: int  # its rows
    value_dim: int  # its columns
    inputs: int  # elements of the inputs that its convolution still sees

    @property
    def size(self) -> int:
        """Elements of the matrices of all heads."""
        return self.heads * self.key_dim * self.value_dim

    def flops(self, length: int) -> float:
        """Of the gated delta rule over whole chunks.

        Every token meets the tokens of its chunk (keys with keys, queries with keys, and what the triangular systems make
        of both and of the values) and the state (corrected, read, written). Convention: full squares inside a chunk,
        triangular systems as the products with their inverses.
        """
        chunks = -(-length // CHUNK)
        inside = CHUNK * (3 * self.key_dim + 2 * self.value_dim)
        return 2.0 * chunks * CHUNK * self.heads * (inside + 3 * self.key_dim * self.value_dim)


@dataclass(frozen=True)
class LayerGeometry:
    """One decoder layer.

    ``weights``: elements of the matrices that every token passes: projections, a dense feed-forward part, a router,
    shared experts.
    """

    weights: int
    num_heads: int
    head_dim: int  # of queries and keys
    value_dim: int  # of values
    cached: int  # elements that the cache keeps of a token; 0 where it reads those of another layer
    window: int | None = None  # tokens that a query sees at most, itself included; None: all before it
    experts: Experts | None = None  # of a mixture; None in a dense layer
    state: State | None = None  # of a recurrent layer; None where there is attention
    last: bool = False  # generate() runs it on the last token of a prompt alone

    def tokens(self, length: int) -> int:
        """How many of a sample's tokens it runs on."""
        return min(length, 1) if self.last else length

    @property
    def active_weights(self) -> int:
        """Elements of the matrices that one token meets."""
        return self.weights + (self.experts.per_token * self.experts.weights if self.experts else 0)

    def matrix_flops(self, tokens: int) -> float:
        """Of projections and feed-forward part."""
        return 2.0 * self.active_weights * tokens

    def attention_flops(self, length: int) -> float:
        """Of both products of attention, or of what a recurrent layer has in their place.

        Convention: the full square, ``2 * num_heads * (head_dim + value_dim) * length ** 2``, as
        ``torch.utils.flop_counter`` counts, though causal kernels skip nearly half of it; under a window the part of the
        square that lies less than the window off its diagonal; a row of it where the last token alone asks. Windows follow
        original positions, so that after a cut this is what they let through at most.
        """
        if self.state is not None:
            return self.state.flops(length)
        pair = 2.0 * self.num_heads * (self.head_dim + self.value_dim)
        if self.last:
            return pair * min(length, self.window or length)
        outside = 0 if self.window is None else max(length - self.window, 0)
        # Two triangles outside of the band, whose sides are shorter by the diagonal that is in neither.
        return pair * (length * length - outside * (outside + 1))

    def kv_bytes(self, length: int, element_size: int) -> int:
        """Of the keys and values that the cache keeps; a sliding layer's keeps what the next token will see."""
        if self.state is not None:
            return 4 * self.state.size + element_size * self.state.inputs
        held = length if self.window is None else min(length, self.window - 1)
        return self.cached * element_size * held


@dataclass(frozen=True)
class DecoderGeometry:
    """A decoder."""

    hidden: int  # width of its tokens
    layers: tuple[LayerGeometry, ...]  # from first to last; equal layers are one object

    @property
    def attending(self) -> LayerGeometry:
        """The first layer with attention and keys of its own."""
        return next(layer for layer in self.layers if layer.cached)

    @staticmethod
    def of(language_model: nn.Module) -> DecoderGeometry:
        """Read off the modules and the configuration of a Hugging Face decoder; no weight is read.

        Raises:
            ValueError: a mixture of experts whose configuration does not tell how many a token passes.
        """
        config = language_model.config
        kinds = ModelFamily.layer_kinds(config)
        shortens = "logits_to_keep" in inspect.signature(language_model.forward).parameters  # where keys are reused
        shared = cache(LayerGeometry)
        layers = []
        for kind, layer in zip(kinds, language_model.layers, strict=True):
            dense, experts = _matrices(layer, config)
            window = config.sliding_window if kind == "sliding_attention" else None
            state = _state(kind, config)
            heads = (0, 0, 0, 0) if state else _heads(layer.self_attn, config)
            last = shortens and state is None and heads[-1] == 0
            layers.append(shared(dense, *heads, window, experts, state, last))
        return DecoderGeometry(config.hidden_size, tuple(layers))


def _heads(attention: nn.Module, config: Any) -> tuple[int, int, int, int]:
    """Number of query heads, width of queries and keys, of values, and what is cached of a token, which may differ by layer."""
    heads = config.num_attention_heads
    if hasattr(attention, "kv_lora_rank"):  # multi-head latent attention
        keys, values = attention.qk_head_dim, attention.v_head_dim
        latent = attention.kv_lora_rank + attention.qk_rope_head_dim
        # Older transformers cache keys and values of every head.
        return heads, keys, values, latent if hasattr(attention, "expand_kv") else heads * (keys + values)
    reads, width = getattr(attention, "is_kv_shared_layer", False), attention.head_dim
    return heads, width, width, 0 if reads else 2 * (heads // attention.num_key_value_groups) * width


def _state(kind: str, config: Any) -> State | None:
    """Of a layer of this kind; None where it has none."""
    if kind == "conv":  # a short convolution and nothing else
        return State(0, 0, 0, config.hidden_size * config.conv_L_cache)
    if kind != "linear_attention":
        return None
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    width = 2 * config.linear_num_key_heads * keys + config.linear_num_value_heads * values
    return State(config.linear_num_value_heads, keys, values, width * config.linear_conv_kernel_dim)


def _matrices(layer: nn.Module, config: Any) -> tuple[int, Experts | None]:
    """Elements of the matrices that every token passes, and the experts beside them."""
    found = [module for name, module in layer.named_modules() if name.rpartition(".")[2] == "experts"]
    total = elements(layer)
    if not found:
        return total, None
    held = found[0]
    rows = held if isinstance(held, nn.ModuleList) else next(p for p in held.parameters() if p.dim() == 3)
    count = len(rows)
    names = ("num_experts_per_tok", "top_k_experts")
    per_token = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    if per_token is None:
        raise ValueError(
            "estimate: the configuration of a mixture of experts must tell num_experts_per_tok or top_k_experts, got "
            f"{type(config).__name__} without"
        )
    return total - elements(held), Experts(count, per_token, elements(held) // count)


def elements(module: nn.Module) -> int:
    """Of all matrices in a module; quantised linear layers count as what they stand for."""
    total = 0
    for part in module.modules():
        linear = hasattr(part, "in_features") and hasattr(part, "out_features")
        for name, parameter in part.named_parameters(recurse=False):
            if linear and name == "weight":
                total += part.in_features * part.out_features
            elif parameter.dim() > 1:
                total += parameter.numel()
    return total
