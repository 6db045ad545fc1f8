"""What an entry is made of, and the sizes and token ids that all tiny models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from packaging.version import Version
from torch import Tensor

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
NUM_LAYERS = 4
VOCAB = 96
HIDDEN = 32
INIT = 0.1
PATCH = 4  # pixels
PAD = 0
LAST_TEXT = 80  # ordinary text ids are 1 .. 79
IMAGE = 90
VISION_START = 91
VISION_END = 92
VIDEO = 93
MARK = 94  # any special token that stands inside an image block
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=INIT,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=PAD,
)
MROPE = dict(TEXT, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1]))
TOWER = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=PATCH,
    initializer_range=INIT,
)
QWEN_TOWER = dict(depth=2, num_heads=2, patch_size=PATCH, temporal_patch_size=2, spatial_merge_size=2,
                  initializer_range=INIT)  # fmt: skip
MARKERS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START,
               vision_end_token_id=VISION_END)  # fmt: skip

MASKS = {  # what families refuse whose masks are more than causal
    "uniform": "whose masks are more than causal, needs .* cache='ragged', got cache='uniform'",
    "compact": "whose masks are more than causal, needs positions='original' .*, got positions='compact'",
}


@dataclass(frozen=True, eq=False)
class Image:
    """One image of a prompt.

    Attributes:
        ids: its tokens, markers included.
        arguments: what its processor hands to the model for it.
        size: (width, height) of the original.
    """

    ids: tuple[int, ...]
    arguments: dict[str, Tensor]
    size: tuple[int, int]


def before(version: str, reason: str) -> Callable[[Any], str | None]:
    """An entry of ``unable`` for transformers older than ``version``."""
    old = Version(Version(transformers.__version__).base_version) < Version(version)
    return lambda _: reason if old else None


@dataclass(frozen=True)
class Family:
    """A family as users meet it.

    Attributes:
        title: its row in README.
        classes: the transformers class.
        config: () -> configuration of the tiny model.
        image: (original size, seed, whether it is the sample's only image) -> Image.
        sizes: two original sizes, (width, height), of different token grids where the family knows such.
        join: per-sample lists of images -> model arguments; default: concatenated along the first axis.
        types: ids -> further arguments that follow from the ids.
        processor: () -> the image processor of `crop.patch`; None where the family needs none.
        tower, decoder: attributes of the multimodal model.
        beside: its further modules, which a repeated image runs through again, or which no image does.
        mask: what a token sees: "causal"; "image", all of its own image, too, within its window, "image in windows", only
            in layers that have one, "image beyond windows", whatever it is; "prefix", all of the prompt, too.
        first_position: position id of the first token.
        cuts: decoder layers at which scores may cut: the layer before each sees the whole prompt.
        refuses: what the family cannot do -> what the error says: an attention, "uniform" (cache), "compact" (positions).
        unable: what this version of transformers cannot do without a patch either: "repeat" (samples of `generate()`),
            "devices" (two of them), "projector" (one call of it), (model) -> reason or None.
        since: version of transformers from which on the class is laid out as it is here; before, it is not supported.
        tower_attention: the tower's attention weights belong to the image tokens.
        thorough: tests of single features run on it; one family per kind of positions.
        fast: `pytest -m fast` runs the contract on it.
    """

    title: str
    classes: str
    config: Callable[[], Any]
    image: Callable[[tuple[int, int], int, bool], Image]
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((48, 32), (24, 40))
    join: Callable[[list[list[Image]]], dict[str, Tensor]] | None = None
    types: Callable[[Tensor], dict[str, Tensor]] | None = None
    processor: Callable[[], Any] | None = None
    tower: str = "vision_tower"
    decoder: str = "language_model"
    beside: tuple[str, ...] = ()
    mask: Literal["causal", "image", "image in windows", "image beyond windows", "prefix"] = "causal"
    first_position: int = 0
    cuts: tuple[int, ...] = (1, 2, 3)
    refuses: Mapping[str, str] = field(default_factory=dict)
    unable: Mapping[str, Callable[[Any], str | None]] = field(default_factory=dict)
    since: str = "5.17"
    tower_attention: bool = False
    thorough: bool = False
    fast: bool = False

    @property
    def attentions(self) -> tuple[str, ...]:
        return tuple(attention for attention in ATTENTIONS if attention not in self.refuses)


def pixels(*shape: int, seed: int) -> Tensor:
    """Random values, the same for equal shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3000 + seed))


def text_tokens(count: int, seed: int) -> list[int]:
    """`count` ordinary text ids."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(1, LAST_TEXT, (count,), generator=generator).tolist()
