"""Every supported family, tiny: unmodified transformers classes with random weights, and prompts as their processors write
them. Nothing is downloaded. All tests run on ``FAMILIES``; README's table is written from it.

A new family is one entry in `families/squares.py` (a fixed grid), `grids.py` (a grid that follows the picture) or `tiles.py`
(several grids): a tiny configuration (``TEXT``, ``MROPE``, ``TOWER``: 4 layers of 32 channels), an image as the processor
writes it, and what sets the family apart (``Family`` in `entry.py` says what each field means). A class that the oldest
supported transformers (5.17) lacks is looked up where it is used, in the entry's own ``config``. The contract, the ways of use
and the refusals then run over it; a test that needs an exception reads it from the entry.

The weights are drawn wide, so that attention is far from uniform and dropping half of the vision tokens moves the logits by
tenths, while two attention implementations still agree to 2e-6: a pruning mistake cannot hide under a tolerance of 1e-5.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from packaging.version import Version

from tests.support.families import gemma4, grids, more_grids, more_tiles, squares, tiles
from tests.support.families.entry import INIT, LAST_TEXT, PAD, Family

SHARP = 2.5  # on the query and key weights: attention rests on 20 to 60 of 140 tokens
_ALL: dict[str, Family] = (
    squares.FAMILIES | grids.FAMILIES | more_grids.FAMILIES | gemma4.FAMILIES | tiles.FAMILIES | more_tiles.FAMILIES
)
_HERE = Version(Version(transformers.__version__).base_version)
FAMILIES = {
    name: family
    for name, family in _ALL.items()
    if hasattr(transformers, family.classes) and Version(family.since) <= _HERE
}
LACKING = {name: family.classes for name, family in _ALL.items() if name not in FAMILIES}  # by this transformers
THOROUGH = tuple(name for name, family in FAMILIES.items() if family.thorough)
SUPPORTED = [(name, attention) for name, family in FAMILIES.items() for attention in family.attentions]


@functools.cache
def get_config(name: str) -> Any:
    """The configuration of a family's tiny model, to read."""
    return FAMILIES[name].config()


def build_model(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A tiny random model; equal seeds give equal weights whatever the attention.

    The vision tower, which the patch leaves alone, stays eager: under flash attention the Pixtral tower of
    transformers 5.17 mixes the images of a batch.
    """
    return build_as(name, FAMILIES[name].config(), attention, seed)


def build_as(name: str, config: Any, attention: str, seed: int = 0) -> Any:
    """The same with another configuration."""
    torch.manual_seed(seed)
    family = FAMILIES[name]
    model = getattr(transformers, family.classes)(config).eval().requires_grad_(False)
    sharpen(model, decoder_of(name, model))
    set_attention(model, attention)
    set_attention(getattr(model.model, family.tower), "eager")
    return model


def decoder_of(name: str, model: Any) -> Any:
    """The language model: has `layers`, `norm` and `rotary_emb`."""
    return getattr(model.model, FAMILIES[name].decoder)


@torch.no_grad()
def sharpen(model: Any, decoder: Any) -> None:
    """Wide weights and sharp attention, see above; nothing special is ever generated."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # HF's own schemes differ per module: draw every matrix alike
            parameter.normal_(0.0, INIT)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
    for name, parameter in decoder.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.mul_(SHARP)
        elif name.endswith("linear_attn.out_proj.weight"):
            parameter.mul_(0.3)  # the norm before it blows up the rounding of recurrent states
    model.get_input_embeddings().weight.mul_(3.0)  # text and vision rows of similar size
    model.lm_head.weight[LAST_TEXT:] = 0.0  # never the most likely: no placeholder is generated
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD


def set_attention(model: Any, attention: str) -> None:
    """Select an attention by name without the availability checks (a flash kernel needs a GPU)."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = attention
