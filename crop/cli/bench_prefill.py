"""Prefill of a mid-size random LLaVA: unpatched against ILP, PLC and both, with the ratio of FLOPs beside it.

The decoder has about 300 M parameters (24 layers, width 1024, float32 on CPU, bfloat16 on CUDA); the vision tower is a
stub of two narrow layers, so that the times are the language model's. Every image of 576 tokens (24 x 24) is pruned to
the same fraction; 2880 tokens are five images in one prompt. Each pruned row is verified before it is timed: the kept
counts are the ones asked for. Contenders run interleaved, one round after another; medians are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import crop
from crop.selftest.timing import interleave

METHODS = {"ILP": "ilp", "PLC": "plc", "both": "crop"}  # names of the table
LAYERS, WIDTH, HEADS, FFN, TEXT, IMAGE_TOKEN = 24, 1024, 16, 2816, 60, 999
REGION = crop.Region.box(0.30, 0.25, 0.70, 0.55)
KEEPS = (0.33, 0.22, 0.11)


def measure_prefill(tokens: Sequence[int], device: torch.device, rounds: int, only: str) -> Iterator[dict[str, Any]]:
    """Rows of every contender whose name holds ``only``, for prompts of so many vision tokens, multiples of 576."""
    model = build(device)
    for number in tokens:
        yield from measure(model, number // 576, rounds, only)


def build(device: torch.device) -> Any:
    """The model, from configuration alone."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=8192,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return LlavaForConditionalGeneration(config).eval().to(device=device, dtype=dtype)


def prompt(model: Any, images: int) -> dict[str, torch.Tensor]:
    """`images` pictures of 576 tokens, then the question."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 900, (1, TEXT), generator=generator)
    pictures = torch.full((1, 576 * images), IMAGE_TOKEN)
    pixels = torch.randn(images, 3, 336, 336, generator=generator)
    ids = torch.cat([text[:, :10], pictures, text[:, 10:]], dim=1).to(model.device)
    return {"input_ids": ids, "pixel_values": pixels.to(model.device, model.dtype)}


@torch.no_grad()
def measure(model: Any, images: int, rounds: int, only: str) -> list[dict[str, Any]]:
    """All contenders on one prompt whose name holds ``only``, and the unpatched model, interleaved."""
    inputs = prompt(model, images)
    regions = [REGION] * images
    # A plain resize: the image fills the token grid.
    processor = type("Resize", (), {"do_resize": True, "do_center_crop": False, "do_pad": False})()
    stages: dict[str, list[dict[str, float]]] = {}

    def plain() -> None:
        model(**inputs, logits_to_keep=1)

    def pruned(name: str, method: crop.Method) -> Callable[[], None]:
        def run() -> None:
            with crop.patch(model, method, regions, processor=processor) as stats:
                model(**inputs, logits_to_keep=1)
            stages.setdefault(name, []).append(stats.seconds)

        return run

    def localize(layer: int, stride: int) -> Callable[[], None]:
        # The pass of AttentionLocalizer on this prompt, which may hold several images.
        localizer = crop.AttentionLocalizer(model, None, layer, stride=stride)

        def run() -> None:
            try:
                with localizer.reading(stop, processor=processor):
                    model.model(**inputs, use_cache=False)
            except StopIteration:
                return
            raise RuntimeError("bench: the scoring layer was not reached")

        return run

    def stop(*_: Any) -> None:
        raise StopIteration

    contenders: dict[str, Callable[[], None]] = {"unpatched": plain}
    for layer, stride in ((1, 1), (1, 2), (3, 1), (3, 2)):
        contenders[f"localizer: attention of layer {layer}, stride {stride}"] = localize(layer, stride)
    flops: dict[str, float] = {"unpatched": 1.0, "keep all": 1.0}
    contenders["keep all"] = pruned("keep all", crop.InnerLLMPruning(keep=1.0))
    contenders = {name: call for name, call in contenders.items() if only in name or call is plain}
    for keep in KEEPS:
        for kind, known in METHODS.items():
            method = crop.by_name(known, keep)
            name = f"{kind} {keep:.0%}"
            if only not in name:
                continue
            with crop.patch(model, method, regions, processor=processor) as stats:
                model(**inputs, logits_to_keep=1)
            want = [round(keep * 576)] * images
            if stats.tokens_after_ilp != want:
                raise RuntimeError(f"bench: {name} must keep {want}, got {stats.tokens_after_ilp}")
            found = crop.estimate(model, inputs, method, regions, processor=processor)
            flops[name] = found.before.decoder_flops / found.after.decoder_flops
            contenders[name] = pruned(name, method)
    stages.clear()
    plain()
    times = interleave(contenders, rounds=rounds, warmup=0)  # the pruned ones ran when they were verified
    full = times["unpatched"].median
    rows = []
    for name in contenders:
        own = [sum(run.get(stage, 0.0) for stage in ("plan", "plc", "ilp")) for run in stages.get(name, [])]
        rows.append(
            {
                "vision tokens": 576 * images,
                "contender": name,
                "ms": times[name].median * 1e3,
                "p10": times[name].p10 * 1e3,
                "p90": times[name].p90 * 1e3,
                "speed-up": full / times[name].median,
                "FLOP ratio": flops.get(name),
                "own work %": 100 * (times[name].median if "localizer" in name else sorted(own)[len(own) // 2]) / full
                if own or "localizer" in name
                else None,
            }
        )
    return rows
