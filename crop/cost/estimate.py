"""What pruning will save, before anything runs: tokens, FLOPs, cache bytes, seconds, and whether it pays at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from crop.cost.geometry import DecoderGeometry
from crop.cost.speed import Speed, layer_host_seconds, measure_speed
from crop.geometry.region import Region
from crop.methods.base import Method
from crop.patching.batch_plan import BatchPlan
from crop.patching.planner import Planner

MARGIN = 0.02  # a saving below this share of the prefill is within what such an estimate can be wrong by


@dataclass(frozen=True)
class Cost:
    """One prefill of the decoder.

    Args:
        tokens: vision tokens per image, averaged over the decoder layers.
        flops: multiply-adds of all samples, times two; attention by its full square, as ``torch.utils.flop_counter`` counts.
        kv_bytes: keys and values of all samples after it.
        seconds: predicted, the patch's own work included; NaN for a model on the meta device, which cannot be timed.
        launched: layers that take as long as the host takes to launch them, because the device is quicker.
    """

    tokens: list[float]
    flops: float
    kv_bytes: int
    seconds: float
    launched: int = 0


@dataclass(frozen=True)
class Estimate:
    """Prediction for one prompt.

    Args:
        before: the model as it is. after: under the method.
        prune: whether the predicted saving, less ``localizer_seconds``, is worth it; by FLOPs where there are no seconds.
        advice: the same in words, with what a localizer may take where it takes some.
    """

    before: Cost
    after: Cost
    prune: bool
    advice: str


def estimate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: Method,
    region: Region | Sequence[Region] | None = None,
    *,
    processor: Any = None,
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    localizer_seconds: float = 0.0,
    host_seconds: float | None = None,
    plan: bool = True,
) -> Estimate:
    """Predict what pruning one prompt saves; nothing runs on the model.

    Args:
        model, method, processor, image_size: as for ``patch``.
        inputs: what ``generate()`` would be called with: ``input_ids``, ``pixel_values`` and so on.
        region: as for ``patch``; None asks before a localizer has run, which tells the same of methods with a budget.
        localizer_seconds: what finding the region costs, to be earned back.
        host_seconds: in which the host launches one decoder layer, which takes the longer of host and device; 0 for a
            captured graph. None: ``EAGER_LAYER`` or ``COMPILED_LAYER`` of ``crop.cost.speed`` on a GPU, 0 on a CPU.
        plan: removed, must stay True.
    Returns:
        Estimate: of the decoder alone; what ``EncoderPruning`` saves in the vision encoder is not counted, and the advice
        says so. Tokens and FLOPs are exact (those of sliding windows an upper bound), seconds come from constants of
        this device that are measured at first use (``measure_speed``, a fraction of a second).
    Raises:
        TypeError, ValueError: as ``patch``; ValueError: the prompt holds no image.
    """
    if plan is not True:
        raise ValueError(
            f"estimate: plan must be left out, got {plan}; leave region out to ask before a region is known"
        )
    planner = Planner(model, method, region, processor, image_size)
    found = planner.plan(inputs)
    if found is None:
        raise ValueError("estimate: the prompt must hold an image, got none")
    decoder = planner.language_model
    geometry = DecoderGeometry.of(decoder)
    device = next(decoder.layers[0].parameters()).device
    speed = measure_speed(geometry, device, decoder.dtype)
    host = layer_host_seconds(decoder.layers, device) if host_seconds is None else host_seconds
    count, size = len(geometry.layers), decoder.dtype.itemsize
    real = found.valid.sum(1).tolist()
    unpruned, pruned = [real] * count, [_lengths(found, real, layer) for layer in range(count)]
    averages = [sum(image.tokens_at(layer) for layer in range(count)) / count for image in found.images]
    before = _cost(geometry, speed, host, unpruned, size, [float(len(image.layout)) for image in found.images])
    after = _cost(geometry, speed, host, pruned, size, averages)
    own = _own_seconds(found, geometry, speed, pruned)
    after = replace(after, seconds=after.seconds + own)
    # The patch's work counts twice: measured alone it is quicker than among the layers, and it is surely paid.
    spare = before.seconds - after.seconds - MARGIN * before.seconds - own
    prune = spare > localizer_seconds
    share = f"{1000 * before.seconds:.1f} ms of prefill, {1000 * after.seconds:.1f} ms pruned"
    if localizer_seconds:
        share += f" and {1000 * localizer_seconds:.1f} ms for the localizer"
        share += f", which may take {1000 * spare:.1f} ms" if spare > 0 else ""
    if before.launched:
        share += f"; in {before.launched} of {count} layers the host's loop takes longer than the device"
        share += "" if prune else ": compile the layers, or ask more at once"
    source = "predicted"
    if device.type == "meta":
        prune = after.flops < (1 - MARGIN) * before.flops
        share = f"{before.flops / 1e12:.2f} TFLOPs of prefill, {after.flops / 1e12:.2f} pruned"
        source = "counted; there are no weights to time"
    if planner.method.encodes:
        source += "; what it saves in the vision encoder comes on top"
    return Estimate(before, after, prune, f"{'prune' if prune else 'do not prune'}: {share} ({source})")


def _lengths(plan: BatchPlan, real: list[int], layer: int) -> list[int]:
    """Tokens per sample that a decoder layer sees. real: before pruning."""
    found = list(real)
    for image in plan.images:
        found[image.sample] -= len(image.layout) - image.tokens_at(layer)
    return found


def _cost(
    geometry: DecoderGeometry,
    speed: Speed,
    host: float,
    lengths: list[list[int]],
    element_size: int,
    tokens: list[float],
) -> Cost:
    """Of layers that see ``lengths[layer]`` tokens per sample; shorter samples are padded. host: seconds per layer."""
    flops, seconds, held, launched = 0.0, 0.0, 0, 0
    for layer, counts in zip(geometry.layers, lengths, strict=True):
        flops += layer.matrix_flops(sum(map(layer.tokens, counts))) + sum(map(layer.attention_flops, counts))
        device = speed.matrix_seconds(layer, len(counts) * layer.tokens(max(counts)))
        device += speed.attention * len(counts) * layer.attention_flops(max(counts))
        seconds += max(device, host)
        launched += device < host
        held += sum(layer.kv_bytes(count, element_size) for count in counts)
    return Cost(tokens, flops, held, seconds, launched)


def _own_seconds(plan: BatchPlan, geometry: DecoderGeometry, speed: Speed, lengths: list[list[int]]) -> float:
    """Of the patch: planning, hooks, operators, scores."""
    steps = len(plan.prunes) + (plan.pool is not None)
    seconds = speed.image * len(plan.images) + speed.hook * (len(geometry.layers) + 8) + speed.step * steps
    for number, step in plan.prunes.items():
        if step.rows is not None:
            layer = geometry.layers[number - 1]
            scored = step.rows.shape[1] * sum(lengths[number - 1][sample] for sample in step.owners)
            # Logits once, no half of them spared; exponentials weigh as much again.
            seconds += speed.attention * 2 * 2 * 2.0 * layer.num_heads * layer.head_dim * scored
    return seconds
