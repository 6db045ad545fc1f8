"""What every family shares: the ModelFamily, what it gets to see of a call, and how image tokens are shared out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Encoding, Pieces

Size = tuple[int, int]
Placed = list[tuple[int, VisionLayout]]


@dataclass(frozen=True)
class Prompt:
    """What a family sees of one call that brings images."""

    config: Any  # configuration of the model
    ids: Tensor  # (samples, seq_len) token ids on the CPU, each sample once (before generate() repeats it for beams)
    arguments: Mapping[str, Any]  # the call's arguments as the model's processor made them (pixel values, grids, sizes)
    processor: Any = None  # the model's image processor; None: the caller gave none
    image_sizes: Sequence[Size] | None = None  # (width, height) of each original image, pixels; None: not given

    def argument(self, name: str) -> Any:
        """An argument that this family cannot do without. ValueError: it is missing."""
        value = self.arguments.get(name)
        if value is None:
            raise ValueError(f"patch: {name} must be given with image tokens, got None")
        return value

    def sizes(self, count: int) -> list[Size | None]:
        """The size of each of ``count`` original images, None where unknown.

        Raises:
            ValueError: the caller gave another number of sizes.
        """
        if self.image_sizes is None:
            return [None] * count
        if len(self.image_sizes) != count:
            raise ValueError(
                f"patch: image_size must be given once per image, got {len(self.image_sizes)} for {count} images"
            )
        return list(self.image_sizes)

    def place(self, layouts: Sequence[VisionLayout], token_id: int | None = None) -> Placed:
        """Give layouts, in prompt order, the positions of the vision tokens in ``ids``: (sample, layout) each.

        Args:
            layouts: one per image, whatever their positions.
            token_id: what stands where a vision token belongs; default ``config.image_token_id``.
        Raises:
            ValueError: the vision tokens are not exactly those of the layouts.
        """
        found: Placed = []
        for sample, row in enumerate(self.ids == (self.config.image_token_id if token_id is None else token_id)):
            position = torch.nonzero(row).flatten()
            while len(position):
                count = len(layouts[len(found)]) if len(found) < len(layouts) else 0
                if not 0 < count <= len(position):
                    raise ValueError(
                        f"patch: sample {sample} must hold whole images of the grids {_grids(layouts)}, "
                        f"got {int(row.sum())} image tokens"
                    )
                found.append((sample, replace(layouts[len(found)], position=position[:count])))
                position = position[count:]
        if len(found) != len(layouts):
            raise ValueError(
                f"patch: the prompt must hold whole images of the grids {_grids(layouts)}, got tokens for {len(found)}"
            )
        return found


def _grids(layouts: Sequence[VisionLayout]) -> list[tuple[int, ...]]:
    """(rows, columns) of each layout, (views, rows, columns) where it has several."""
    return [layout.extent if layout.extent[0] > 1 else layout.extent[1:] for layout in layouts]


@dataclass(frozen=True)
class DecoderTraits:
    """What a family's decoder does differently; read by masks, planner, cost model and localizers.

    Args:
        mask: what a token sees beside itself and what stands before it: "causal": nothing; "image": its image, in some
            layers or checkpoints at least; "prefix": its prompt. Beyond "causal" the multimodal model makes the masks,
            over the input.
        deepstack_method: method of the language model, (hidden_states, vision mask, features), that adds vision features
            of further levels after its first layers; None: there is none.
        unrotated: kinds of layers (``layer_types``) whose queries and keys have no rotary embedding.
        recurrent: kinds of layers that carry a state on in the place of keys: they cannot score, and what came in stays.
        norm: attribute of the language model that holds the norm behind its last layer.
    """

    mask: Literal["causal", "image", "prefix"] = "causal"
    deepstack_method: str | None = None
    unrotated: tuple[str, ...] = ()
    recurrent: tuple[str, ...] = ()
    norm: str = "norm"


class Encoder(Protocol):
    """How a tower gets less than it is called with; ``images``: those of one call of it, in its order."""

    def fits(self, config: Any) -> bool:
        """Whether the tower of a model is one for it."""

    def pieces(self, prompt: Prompt, layouts: Sequence[VisionLayout]) -> list[Pieces]:
        """What can be left out of each image of a prompt."""

    def take(
        self, tower: nn.Module, args: tuple, kwargs: dict, images: Sequence[Encoding]
    ) -> tuple[tuple, dict, Tensor]:
        """The arguments of a call of the tower, for the pieces that are taken, all that decides what it will return among
        them; and what ``put`` gets, where the rows of the output stand in the full one, on the device of the call."""

    def layers(self, tower: nn.Module) -> Sequence[nn.Module]:
        """Layers at whose input tokens may leave, or nothing does later."""

    def take_at(self, number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a call of ``layers(tower)[number]``."""

    def lengths(self, tower: nn.Module, images: Sequence[Encoding]) -> list[list[int]]:
        """Of every layer of a tower, the lengths of the sequences in which it attends, fillers included."""

    def put(self, tower: nn.Module, output: Any, place: Tensor, images: Sequence[Encoding]) -> Any:
        """The tower's output at full length, zeros where nothing was encoded."""


@dataclass(frozen=True)
class ModelFamily:
    """One family of Hugging Face vision-language models.

    Args:
        model_type: ``config.model_type`` of the family.
        images: the images of a prompt, in prompt order over the batch: (sample, layout) each.
        check: (config, image processor or None, original sizes or None, every region is whole) -> None; refuses at
            once what ``images`` could not do later. None: the family needs neither.
        tower: attribute of the multimodal model that holds the vision encoder.
        decoder: attribute of the multimodal model that holds the language model.
        projector: attribute of the multimodal model that maps the tower's features to tokens, called once per forward;
            None: the tower does it itself.
        videos: ``images`` places videos too; otherwise they are refused.
        tiles: an image may go through the tower in several rows.
        encoder: how the tower takes part of the pictures (``models.encoders``); None: it cannot.
        traits: of the decoder.
    """

    model_type: str
    images: Callable[[Prompt], Placed]
    check: Callable[[Any, Any, Sequence[Size] | None, bool], None] | None = None
    tower: str = "vision_tower"
    decoder: str = "language_model"
    projector: str | None = "multi_modal_projector"
    videos: bool = False
    tiles: bool = False
    encoder: Encoder | None = None
    traits: DecoderTraits = DecoderTraits()

    def is_vision(self, config: Any, ids: Tensor) -> Tensor:
        """Which of (batch, seq_len) token ids stand for what an image or a video shows."""
        found = ids == config.image_token_id
        return found | (ids == config.video_token_id) if self.videos else found

    def base(self, model: nn.Module) -> nn.Module:
        """The multimodal model below the language-model head."""
        if hasattr(type(model), "get_base_model"):  # PEFT
            model = model.get_base_model()
        return model.model if hasattr(model, "lm_head") else model

    def vision_tower(self, base: nn.Module) -> nn.Module:
        """The image encoder. ValueError: the model has no such attribute."""
        return self._part(base, "tower", self.tower)

    def encoder_of(self, config: Any) -> Encoder | None:
        """How the tower of a model with this configuration takes part of the pictures; None: it cannot."""
        return self.encoder if self.encoder is not None and self.encoder.fits(config) else None

    def vision_modules(self, base: nn.Module) -> list[nn.Module]:
        """What makes image features: the encoder and, where it is a module of its own, the projector behind it.

        Raises:
            ValueError: the model has no such attribute.
        """
        found = [self.vision_tower(base)]
        return found if self.projector is None else [*found, self._part(base, "projector", self.projector)]

    def language_model(self, model: nn.Module) -> nn.Module:
        """The decoder: has ``layers``, a norm and ``config``. ValueError: the model has no such attribute."""
        return self._part(self.base(model), "decoder", self.decoder)

    def _part(self, base: nn.Module, what: str, name: str) -> nn.Module:
        found = getattr(base, name, None)
        if found is None:
            raise ValueError(
                f"patch: {what} of family {self.model_type!r} must be an attribute of {type(base).__name__}, "
                f"got {name!r}; it has {', '.join(dict(base.named_children()))}"
            )
        return found

    @staticmethod
    def layer_kinds(config: Any) -> list[str]:
        """What every decoder layer is, in transformers' words; as its caches do, where the configuration does not tell.

        Args:
            config: of the language model.
        """
        slides = getattr(config, "sliding_window", None) is not None
        every = "sliding_attention" if slides else "full_attention"
        return list(getattr(config, "layer_types", None) or [every] * config.num_hidden_layers)

    def shared_layers(self, config: Any) -> int:
        """Decoder layers at the end that take keys and values of earlier layers, the last ones of their kind."""
        return getattr(config, "num_kv_shared_layers", None) or 0

    def scoring_layers(self, config: Any) -> list[int]:
        """Decoder layers whose attention sees the whole prompt, so that it can score for a cut behind them.

        Where every window slides, all of them: a prompt shorter than it is seen. Those that share keys are none of them:
        transformers may give them the last tokens alone.
        """
        kinds = self.layer_kinds(config)
        own = list(enumerate(kinds[: len(kinds) - self.shared_layers(config)]))
        full = [layer for layer, kind in own if kind == "full_attention"]
        return full or [layer for layer, kind in own if kind == "sliding_attention"]

    def last_cut(self, config: Any) -> int:
        """The last decoder layer at whose input tokens may leave: what later layers take keys from must hold no more than they."""
        kinds = self.layer_kinds(config)
        first = len(kinds) - self.shared_layers(config)
        givers = [max(layer for layer in range(first) if kinds[layer] == kind) for kind in set(kinds[first:])]
        return min(givers, default=len(kinds) - 1)

    def position_axes(self, config: Any) -> int:
        """Axes of a language model's rotary embedding: as many as its frequencies are shared out to, else 1."""
        return len((getattr(config, "rope_parameters", None) or {}).get("mrope_section", "1"))

    def windows(self, config: Any) -> list[int | None]:
        """Sliding window of every decoder layer, None where it sees everything."""
        kinds = self.layer_kinds(config)
        return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]

    def recurrent_layers(self, config: Any) -> list[int]:
        """Decoder layers that carry a state on."""
        return [layer for layer, kind in enumerate(self.layer_kinds(config)) if kind in self.traits.recurrent]

    def masks_input(self, config: Any) -> bool:
        """Whether masks are made over all input tokens, because what a layer sees depends on where these stood."""
        return self.traits.mask != "causal" or any(window is not None for window in self.windows(config))

    def check_decoder(self, decoder: nn.Module) -> None:
        """Refuse layers that the masks of this family do not speak of, and scores that would not be the model's: ValueError."""
        config = decoder.config
        cap = getattr(config, "attn_logit_softcapping", None)
        if cap is not None:
            raise ValueError(
                f"patch: attn_logit_softcapping must be None, got {cap} (Gemma 2 text model): the scores would not be the "
                "model's attention; use a family without"
            )
        if any(hasattr(getattr(layer, "self_attn", None), "sinks") for layer in decoder.layers):
            raise ValueError(
                f"patch: attention must be without sinks, got those of {type(decoder).__name__}: the scores would not be "
                "the model's attention; use a checkpoint with another text model"
            )
        if self.traits.mask == "causal":
            other = set(self.layer_kinds(config)) - {"full_attention", "sliding_attention", *self.traits.recurrent}
            if other:
                raise ValueError(
                    f"patch: every decoder layer must be of full attention or of a sliding window, got {sorted(other)}"
                )

    def check_cuts(self, config: Any, layers: Sequence[int | str], uniform: bool) -> None:
        """Refuse cuts that layers with states, or with keys of other layers, would get wrong: ValueError.

        A state cannot give back what went into it, and the first attention layer tells how much that was.

        Args:
            config: of the language model. layers: where cuts are, "auto" among them. uniform: whether all layers are to
                hold the same tokens in the end.
        """
        states, first = self.recurrent_layers(config), next(iter(self.scoring_layers(config)), 0)
        asked, last = [layer for layer in layers if layer != "auto"], self.last_cut(config)
        early, late = [layer for layer in asked if layer <= first], [layer for layer in asked if layer > last]
        if states and uniform:
            raise ValueError(
                f"patch: {self.model_type!r}, whose layers carry states, needs cache='ragged', got cache='uniform'"
            )
        if states and early:
            raise ValueError(
                f"patch: layer must be > {first}, the first with attention, for {self.model_type!r}, got {early[0]}"
            )
        if self.shared_layers(config) and late:
            raise ValueError(
                f"patch: layer must be <= {last} for this {self.model_type!r}, got {late[0]}: the last "
                f"{self.shared_layers(config)} layers reuse the keys and values of earlier ones, of which {last} is the first"
            )

    def check_scoring(self, config: Any, layers: Sequence[int], total: int) -> None:
        """Refuse cuts behind a sliding layer that does not see the whole prompt, which it would have to score: ValueError.

        Args:
            config: of the language model. layers: where cuts by score are. total: tokens, those of the cache included.
        """
        seen, states = self.windows(config), self.recurrent_layers(config)
        for layer in layers:
            if layer - 1 in states:
                full = self._scored_cuts(config)
                raise ValueError(
                    f"patch: layer must follow a layer with attention, i.e. be one of {full}, got {layer}: layer "
                    f"{layer - 1} is recurrent and cannot score"
                )
            window = seen[layer - 1]
            if window is not None and total > window:
                full = [number for number in self._scored_cuts(config) if seen[number - 1] is None]
                where = f"i.e. be one of {full}" if full else "which none does (prune by PreLLMCompression instead)"
                raise ValueError(
                    f"patch: layer must follow a layer that sees all {total} tokens, {where}, got {layer}: "
                    f"layer {layer - 1} scores and has a sliding window of {window}"
                )

    def _scored_cuts(self, config: Any) -> list[int]:
        """Layers that a scoring one stands before."""
        return [layer + 1 for layer in self.scoring_layers(config) if layer < self.last_cut(config)]

    def default_layer(self, config: Any) -> int:
        """Decoder layer at whose input ``layer="auto"`` prunes: the first from ``crop_layer`` on that a scoring layer precedes.

        ``crop_layer`` stands in the config of the language model where somebody has measured it; 2 elsewhere.

        Raises:
            ValueError: no layer of this decoder can score for a later one, or ``crop_layer`` is none of its layers.
        """
        start = getattr(config, "crop_layer", 2)
        if type(start) is not int or start < 1 or (start != 2 and start >= config.num_hidden_layers):
            raise ValueError(
                f"patch: crop_layer of the config must be an int in [1, {config.num_hidden_layers - 1}], got {start!r}"
            )
        cuts = self._scored_cuts(config)
        if not cuts:
            raise ValueError(
                f"patch: layer must follow a layer with full attention, got a decoder of {config.num_hidden_layers} layers "
                "without one before its last; prune before the language model (PreLLMCompression) instead"
            )
        return next((layer for layer in cuts if layer >= start), cuts[-1])


def need_picture(config: Any, processor: Any, sizes: Sequence[Size] | None, what: str) -> None:
    """ValueError: the caller gave no processor or no sizes, by which alone a region is found; they decide ``what``."""
    if processor is None or sizes is None:
        name = "processor" if processor is None else "image_size"
        raise ValueError(
            f"patch: {name} must be given for {config.model_type!r} with a region, because it decides {what}, got None"
        )


def stack_views(layouts: Sequence[VisionLayout]) -> VisionLayout:
    """One layout of several, each a view of its own, with positions from 0 in that order."""
    count = sum(len(layout) for layout in layouts)
    view = torch.arange(len(layouts), dtype=torch.int32)
    return VisionLayout(
        position=torch.arange(count),
        center=torch.cat([layout.center for layout in layouts]),
        row=torch.cat([layout.row for layout in layouts]),
        col=torch.cat([layout.col for layout in layouts]),
        view=view.repeat_interleave(torch.tensor([len(layout) for layout in layouts])),
        kind=torch.cat([layout.kind for layout in layouts]),
        num_original=count,
    )
