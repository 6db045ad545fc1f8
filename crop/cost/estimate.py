"""What pruning will save of the first token, before anything runs: tokens, FLOPs, bytes, seconds, and whether it pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from crop.cost.encoder import EncoderGeometry
from crop.cost.geometry import DecoderGeometry
from crop.cost.speed import Speed, deciding_seconds, layer_host_seconds, measure_speed
from crop.geometry.layout import VisionLayout
from crop.geometry.pieces import Encoding, Pieces
from crop.geometry.region import Region
from crop.methods.base import Method
from crop.patching.batch_plan import BatchPlan
from crop.patching.planner import Planner

MARGIN = 0.02  # a saving below this share of the prefill is within what such an estimate can be wrong by


@dataclass(frozen=True)
class Cost:
    """One prefill: vision encoder and decoder; FLOPs are multiply-adds of all samples, times two, of attention its full
    square, as ``torch.utils.flop_counter`` counts.

    Args:
        tokens: vision tokens per image, averaged over the decoder layers.
        encoder_flops: of the encoder and the projector behind it; 0 where these are not counted: of families that always take
            all of a picture, where they cost the same either way, and of kinds that are not known here.
        decoder_flops: of its layers.
        kv_bytes: keys and values of all samples after it.
        encoder_seconds, decoder_seconds: predicted, the patch's own work included in the latter; NaN for a model on the meta
            device, which cannot be timed.
        launched: decoder layers that take as long as the host takes to launch them, because the device is quicker.
    """

    tokens: list[float]
    encoder_flops: float
    decoder_flops: float
    kv_bytes: int
    encoder_seconds: float
    decoder_seconds: float
    launched: int = 0

    @property
    def flops(self) -> float:
        """Of both."""
        return self.encoder_flops + self.decoder_flops

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.encoder_seconds + self.decoder_seconds


@dataclass(frozen=True)
class Estimate:
    """Prediction for one prompt.

    Args:
        before: the model as it is. after: under the method. look: what a localizer lets the model do first, None: nothing.
        prune: whether the predicted saving, less ``look`` and ``localizer_seconds``, is worth it; by FLOPs where there are
            no seconds.
        advice: the same in words, with what a localizer may take where it takes some.
    """

    before: Cost
    after: Cost
    look: Cost | None
    prune: bool
    advice: str


class Glance(Protocol):
    """What a localizer that looks with the model itself lets it run, of a picture of a size (width, height).

    Returns:
        Model inputs, size of what it looks at, method under which it does, decoder layers that run at most.
    """

    def __call__(self, size: tuple[int, int]) -> tuple[Mapping[str, Any], tuple[int, int], Method, int]: ...


def estimate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: Method,
    region: Region | Sequence[Region] | None = None,
    *,
    processor: Any = None,
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    localizer: Any = None,
    localizer_seconds: float = 0.0,
    host_seconds: float | None = None,
    plan: bool = True,
) -> Estimate:
    """Predict what pruning one prompt saves; nothing runs on the model.

    Args:
        model, method, processor, image_size: as for ``patch``.
        inputs: what ``generate()`` would be called with: ``input_ids``, ``pixel_values`` and so on.
        region: as for ``patch``; None asks before a localizer has run, which tells the same of methods with a budget, but
            nothing of ``EncoderPruning``, which then leaves nothing out.
        localizer: what is to find the region, "attention" or "head", whose look with the model itself is counted (the layer
            that it reads as a whole), and the encoder unless ``cache_vision`` lets look and answer share it: where both see
            all of the same picture. Needs ``image_size``.
        localizer_seconds: what finding the region costs beside that, to be earned back.
        host_seconds: in which the host launches one layer, of encoder or decoder, which takes the longer of host and device;
            0 for a captured graph. None: ``EAGER_LAYER`` or ``COMPILED_LAYER`` of ``crop.cost.speed`` on a GPU, 0 on a CPU.
        plan: removed, must stay True.
    Returns:
        Estimate: of encoder and decoder. Tokens and FLOPs are exact (those of sliding windows an upper bound), seconds come
        from constants of this device that are measured at first use (``measure_speed``, a fraction of a second); pooling that
        features decide is timed at every call on made-up ones, but for methods that observe the vision tower, where it counts
        as nothing.
    Raises:
        TypeError, ValueError: as ``patch``; ValueError: the prompt holds no image; a localizer that looks with no model, or
            no ``image_size`` for one that does.
    """
    if plan is not True:
        raise ValueError(
            f"estimate: plan must be left out, got {plan}; leave region out to ask before a region is known"
        )
    planner = Planner(model, method, region, processor, image_size)
    found = planner.plan(inputs)
    if found is None:
        raise ValueError("estimate: the prompt must hold an image, got none")
    work = _Work.of(planner, host_seconds)
    lengths, whole = work.lengths(found), work.whole(inputs)
    real = [found.valid.sum(1).tolist()] * len(lengths)
    before = replace(work.cost(found, real, whole), tokens=[float(len(image.layout)) for image in found.images])
    taken = [image.encoding for image in found.images] if planner.method.encodes else whole
    after, own = work.cost(found, lengths, taken), work.own_seconds(found, lengths)
    after = replace(after, decoder_seconds=after.decoder_seconds + own)
    look = None if localizer is None else work.look(localizer)
    # The patch's work counts twice: measured alone it is quicker than among the layers, and it is surely paid.
    spare = before.seconds - after.seconds - MARGIN * before.seconds - own
    wanted = localizer_seconds + (look.seconds if look else 0.0)
    prune = spare > wanted
    share = f"{1000 * before.seconds:.1f} ms of prefill, {1000 * after.seconds:.1f} ms pruned"
    if wanted:
        share += f" and {1000 * wanted:.1f} ms for the localizer"
        share += f", which may take {1000 * spare:.1f} ms" if spare > 0 else ""
    if before.launched:
        share += f"; in {before.launched} of {len(lengths)} layers the host's loop takes longer than the device"
        share += "" if prune else ": compile the layers, or ask more at once"
    source = "predicted"
    if work.device.type == "meta":
        prune = after.flops + (look.flops if look else 0.0) < (1 - MARGIN) * before.flops
        share = f"{before.flops / 1e12:.2f} TFLOPs of prefill, {after.flops / 1e12:.2f} pruned"
        share += f" and {look.flops / 1e12:.2f} for the localizer" if look else ""
        source = "counted; there are no weights to time"
    if work.encoder is None:
        source += "; without the vision encoder, which is not counted for this model"
    return Estimate(before, after, look, prune, f"{'prune' if prune else 'do not prune'}: {share} ({source})")


class _Everything(Method):
    """Plans say what everything is."""

    def encode(self, layout: VisionLayout, region: Region, pieces: Pieces) -> Tensor:
        return torch.ones(len(pieces), dtype=torch.bool)


@dataclass(frozen=True)
class _Work:
    """The sizes of a model, how fast its device is, and what the host takes per layer of decoder and encoder."""

    planner: Planner
    decoder: DecoderGeometry
    encoder: EncoderGeometry | None
    speed: Speed
    device: torch.device
    host: float
    encoder_host: float

    @staticmethod
    def of(planner: Planner, host: float | None) -> _Work:
        layers, model = planner.language_model, planner.model
        decoder, device = DecoderGeometry.of(layers), next(layers.layers[0].parameters()).device
        encoder = EncoderGeometry.of(planner.family, model)
        hosts = [
            layer_host_seconds(blocks, device) if host is None else host
            for blocks in (layers.layers, () if encoder is None else encoder.blocks)
        ]
        return _Work(planner, decoder, encoder, measure_speed(decoder, device, layers.dtype), device, *hosts)

    def lengths(self, plan: BatchPlan) -> list[list[int]]:
        """Of every decoder layer, tokens per sample that it sees."""
        found = []
        for layer in range(len(self.decoder.layers)):
            lengths = plan.valid.sum(1).tolist()
            for image in plan.images:
                lengths[image.sample] -= len(image.layout) - image.tokens_at(layer)
            found.append(lengths)
        return found

    def whole(self, inputs: Mapping[str, Any]) -> list[Encoding]:
        """What the encoder gets of the images of a prompt, if nothing is left out."""
        if self.encoder is None:
            return []
        look = Planner(self.planner.model, _Everything(), None, self.planner.image_processor, None).look(inputs)
        return list(look.encodings)

    def cost(self, plan: BatchPlan, lengths: Sequence[Sequence[int]], encodings: Sequence[Encoding]) -> Cost:
        """Of an encoder that gets ``encodings`` and of decoder layers that see ``lengths``; shorter samples are padded."""
        speed, size, count = self.speed, self.planner.language_model.dtype.itemsize, len(self.decoder.layers)
        flops, seconds, held, launched = 0.0, 0.0, 0, 0
        for layer, counts in zip(self.decoder.layers, lengths, strict=False):
            flops += layer.matrix_flops(sum(map(layer.tokens, counts))) + sum(map(layer.attention_flops, counts))
            on_device = speed.matrix_seconds(layer, len(counts) * layer.tokens(max(counts)))
            on_device += speed.attention * len(counts) * layer.attention_flops(max(counts))
            seconds += max(on_device, self.host)
            launched += on_device < self.host
            held += sum(layer.kv_bytes(count, size) for count in counts)
        tokens = [sum(image.tokens_at(layer) for layer in range(count)) / count for image in plan.images]
        return Cost(
            tokens,
            self.encoder.flops(encodings) if encodings else 0.0,
            flops,
            held,
            self.encoder.seconds(encodings, speed, self.encoder_host) if encodings else 0.0,
            seconds,
            launched,
        )

    def own_seconds(self, plan: BatchPlan, lengths: list[list[int]]) -> float:
        """Of the patch: planning, hooks, operators, scores, and what features decide."""
        speed, layers, steps = self.speed, self.decoder.layers, len(plan.prunes) + (plan.pool is not None)
        seconds = speed.image * len(plan.images) + speed.hook * (len(layers) + 8) + speed.step * steps
        for number, step in plan.prunes.items():
            if step.rows is not None:
                layer = layers[number - 1]
                scored = step.rows.shape[1] * sum(lengths[number - 1][sample] for sample in step.owners)
                # Logits once, no half of them spared; exponentials weigh as much again.
                seconds += speed.attention * 2 * 2 * 2.0 * layer.num_heads * layer.head_dim * scored
        if plan.features and self.device.type != "meta" and not self.planner.method.observes:
            seconds += deciding_seconds(plan, self.decoder.hidden, self.device, self.planner.language_model.dtype)
        return seconds

    def look(self, localizer: Any) -> Cost:
        """Of a localizer that looks with the model, at every image by itself; see ``Glance``."""
        glance: Glance | None = getattr(localizer, "glance", None)
        if glance is None:
            raise ValueError(
                f"estimate: localizer must be one that looks with the model itself (attention, head), got {localizer!r}; "
                "give localizer_seconds for others"
            )
        if self.planner.image_sizes is None:
            raise ValueError("estimate: image_size must be given for a localizer that looks with the model, got None")
        costs = []
        for size in self.planner.image_sizes:
            inputs, seen, method, layers = glance(size)
            plan = Planner(self.planner.model, method, None, self.planner.image_processor, seen).plan(inputs)
            encodings = self.whole(inputs) if not method.encodes else [image.encoding for image in plan.images]
            shared = seen == size and not method.encodes and not self.planner.method.encodes
            costs.append(self.cost(plan, self.lengths(plan)[:layers], [] if shared else encodings))
        names = ("encoder_flops", "decoder_flops", "encoder_seconds", "decoder_seconds")
        return replace(costs[0], tokens=[one for cost in costs for one in cost.tokens], kv_bytes=0,
                       **{name: sum(getattr(cost, name) for cost in costs) for name in names})  # fmt: skip
