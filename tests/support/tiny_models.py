"""Tiny random vision-language models and batches for the tests: seeded, CPU, float32, nothing downloaded.

The weights are drawn wide, so that attention is far from uniform and dropping half of the vision tokens
moves the logits by tenths, while two attention implementations still agree to 2e-6: a pruning mistake
cannot hide under a tolerance of 1e-5.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.modeling_layers import GradientCheckpointingLayer

FAMILIES = ("llava", "qwen2_5_vl")
HOOKS_INSIDE = "__call__" in vars(GradientCheckpointingLayer)  # of the checkpoint, in older versions of transformers
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
NUM_LAYERS = 6
VOCAB = 96
HIDDEN = 32
INIT = 0.1
SHARP = 2.5  # on the query and key weights: attention rests on 20 to 60 of 140 tokens
PAD = 0
IMAGE = 90
VISION_START = 91
VISION_END = 92
VIDEO = 93
LAST_TEXT = 80  # ordinary text ids are 1 .. 79
LLAVA_GRID = (8, 8)
PATCH = 4
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


def build_model(family: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A tiny random model of `family`; equal seeds give equal weights whatever the attention."""
    torch.manual_seed(seed)
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=LLAVA_GRID[0] * PATCH,
            patch_size=PATCH,
            projection_dim=16,
            initializer_range=INIT,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            image_seq_length=LLAVA_GRID[0] * LLAVA_GRID[1],
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
        )
        model = LlavaForConditionalGeneration(config)
    elif family == "qwen2_5_vl":
        text = dict(TEXT, rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                           "mrope_section": [2, 1, 1]})  # fmt: skip
        vision = dict(
            depth=2,
            hidden_size=24,
            intermediate_size=32,
            num_heads=2,
            patch_size=PATCH,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=4 * 2 * PATCH,
            out_hidden_size=HIDDEN,
            fullatt_block_indexes=[1],
            initializer_range=INIT,
        )
        config = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        raise ValueError(f"build_model: family must be one of {FAMILIES}, got {family!r}")
    return sharpen(model, attention)


def sharpen(model: Any, attention: str) -> Any:
    """Wide weights and sharp attention, see above; nothing special is ever generated."""
    model = model.eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # HF's own schemes differ per module: draw every matrix alike
                parameter.normal_(0.0, INIT)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
        decoder = getattr(model.model, "language_model", None) or model.model.text_model
        for layer in decoder.layers:
            layer.self_attn.q_proj.weight.mul_(SHARP)
            layer.self_attn.k_proj.weight.mul_(SHARP)
        model.get_input_embeddings().weight.mul_(3.0)  # text and vision rows of similar size
        model.lm_head.weight[LAST_TEXT:] = 0.0  # never the most likely: no placeholder is generated
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    set_attention(model, attention)
    return model


def set_attention(model: Any, attention: str) -> None:
    """Select an attention by name without the availability checks (a flash kernel needs a GPU)."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = attention


# ---------------------------------------------------------------------------------------- batches
@dataclass(frozen=True)
class Sample:
    """One sample without padding.

    Attributes:
        ids: token ids, placeholders included.
        grids: (height, width) in language-model tokens, one per image.
        starts: first placeholder of each image in `ids`.
        pixels: what the vision tower takes, one tensor per image.
    """

    ids: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    pixels: tuple[torch.Tensor, ...]

    def spans(self) -> list[range]:
        """Positions of each image's vision tokens."""
        return [range(s, s + h * w) for s, (h, w) in zip(self.starts, self.grids, strict=True)]

    def vision_key(self) -> tuple:
        """Equal for samples with the same images at the same places."""
        return self.grids, self.starts, tuple(pixels.numpy().tobytes() for pixels in self.pixels)

    def cut(self, stop: int) -> Sample:
        """The first ``stop`` tokens."""
        return replace(self, ids=self.ids[:stop])

    def inputs(self, family: str) -> dict[str, torch.Tensor]:
        """What the model takes for this sample alone; a placeholder that belongs to no image stands there as text."""
        mine = {position for span in self.spans() for position in span}
        ids = tuple(1 if token == IMAGE and n not in mine else token for n, token in enumerate(self.ids))
        return make_batch(family, [replace(self, ids=ids)], "none").inputs

    def extended(self, tokens: list[int]) -> Sample:
        """The same sample followed by more text tokens."""
        return replace(self, ids=self.ids + tuple(int(t) for t in tokens))

    def joined(self, other: Sample) -> Sample:
        """This sample followed by `other` (its images come after)."""
        shift = len(self.ids)
        return Sample(
            self.ids + other.ids,
            self.grids + other.grids,
            self.starts + tuple(s + shift for s in other.starts),
            self.pixels + other.pixels,
        )


@dataclass
class Batch:
    """Samples plus the padded tensors that a model takes."""

    family: str
    samples: list[Sample]
    padding: str
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)  # column of each sample's first real token

    @property
    def num_images(self) -> list[int]:
        return [len(sample.grids) for sample in self.samples]

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [grid for sample in self.samples for grid in sample.grids]

    def single(self, row: int) -> Batch:
        """One sample of the batch, alone and without padding."""
        return make_batch(self.family, [self.samples[row]], "none")


def text_tokens(count: int, seed: int) -> list[int]:
    """`count` ordinary text ids."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(1, LAST_TEXT, (count,), generator=generator).tolist()


def make_pixels(family: str, grid: tuple[int, int], seed: int) -> torch.Tensor:
    """Random pixels of one image whose tokens form `grid` (height, width)."""
    generator = torch.Generator().manual_seed(2000 + seed)
    height, width = grid
    if family == "llava":
        return torch.randn(1, 3, height * PATCH, width * PATCH, generator=generator)
    patches = height * 2 * width * 2
    return torch.randn(patches, 3 * 2 * PATCH * PATCH, generator=generator)


def make_sample(family: str, pieces: list[int | tuple[int, int]], seed: int = 0) -> Sample:
    """A sample from `pieces`: an int is that many text tokens, a (height, width) is an image."""
    ids: list[int] = []
    grids, starts, pixels = [], [], []
    for number, piece in enumerate(pieces):
        if isinstance(piece, int):
            ids += text_tokens(piece, 17 * seed + number)
            continue
        if family == "llava" and piece != LLAVA_GRID:
            raise ValueError(f"make_sample: a LLaVA grid must be {LLAVA_GRID}, got {piece}")
        ids += [VISION_START] if family == "qwen2_5_vl" else []
        starts.append(len(ids))
        ids += [IMAGE] * (piece[0] * piece[1])
        ids += [VISION_END] if family == "qwen2_5_vl" else []
        grids.append(piece)
        pixels.append(make_pixels(family, piece, 17 * seed + number))
    return Sample(tuple(ids), tuple(grids), tuple(starts), tuple(pixels))


def make_batch(family: str, samples: list[Sample], padding: str) -> Batch:
    """Pad `samples` ("none" needs equal lengths, "left", "right") and build the model's inputs."""
    longest = max(len(sample.ids) for sample in samples)
    if padding == "none" and any(len(sample.ids) != longest for sample in samples):
        lengths = [len(sample.ids) for sample in samples]
        raise ValueError(f"make_batch: samples must be equally long without padding, got {lengths}")
    ids = torch.full((len(samples), longest), PAD)
    mask = torch.zeros_like(ids)
    offsets = []
    for row, sample in enumerate(samples):
        offset = longest - len(sample.ids) if padding == "left" else 0
        ids[row, offset : offset + len(sample.ids)] = torch.tensor(sample.ids)
        mask[row, offset : offset + len(sample.ids)] = 1
        offsets.append(offset)
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= vision_inputs(family, ids, [p for s in samples for p in s.pixels],
                            [g for s in samples for g in s.grids])  # fmt: skip
    return Batch(family, samples, padding, inputs, offsets)


def vision_inputs(
    family: str,
    ids: torch.Tensor,
    pixels: list[torch.Tensor],
    grids: list[tuple[int, int]],
) -> dict[str, torch.Tensor]:
    """The inputs that belong to the images: pixels, and the grids and token types of Qwen."""
    inputs = {"pixel_values": torch.cat(pixels)} if pixels else {}
    if family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        if grids:
            inputs["image_grid_thw"] = torch.tensor([[1, 2 * h, 2 * w] for h, w in grids])
    return inputs


def standard_batch(family: str, padding: str, images: int) -> Batch:
    """The batches of the contract matrix: two samples (one for "single"), 1 or 2 images each."""
    if family == "llava":
        grids = [(LLAVA_GRID,) * images, (LLAVA_GRID,) * images]
    else:  # non-square, and different from sample to sample
        grids = [((6, 8), (4, 6))[:images], ((4, 10), (7, 5))[:images]]
    before, after = [5, 3], [22, 6]  # much padding, so that scores which see it go wrong
    samples = []
    for row in range(2):
        pieces: list[int | tuple[int, int]] = [before[row]]
        for number, grid in enumerate(grids[row]):
            pieces += [grid, 4 + number]
        pieces[-1] = after[row]
        samples.append(make_sample(family, pieces, seed=10 * images + row))
    if padding == "single":
        return make_batch(family, samples[:1], "none")
    if padding == "none":  # lengthen the shorter prompt at its end
        longest = max(len(sample.ids) for sample in samples)
        samples = [s.extended(text_tokens(longest - len(s.ids), 77)) for s in samples]
    return make_batch(family, samples, padding)


# --------------------------------------------------------------------- flash attention on the CPU
@dataclass
class FlashCalls:
    """What the fake kernels were asked: (kernel, causal, query tokens, key tokens) per call, and all by name."""

    calls: list[tuple[str, bool, int, int]] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)

    def decoder(self) -> list[tuple[str, int, int]]:
        """The causal calls, i.e. those of the language model."""
        return [(name, q, k) for name, causal, q, k in self.calls if causal]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None,
            causal: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Plain attention of one sequence, (tokens, heads, head_dim), bottom-right causal as flash is; its log-sum-exp."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    dtype, (query, key, value) = query.dtype, (states.float() for states in (query, key, value))
    logits = torch.einsum("qhd,khd->hqk", query, key) * scale
    if causal:
        rows = torch.arange(query.shape[0])[:, None] + key.shape[0] - query.shape[0]
        logits = logits.masked_fill(torch.arange(key.shape[0])[None] > rows, -torch.inf)
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1).nan_to_num(0.0), value)
    return out.to(dtype), logits.logsumexp(-1)


@contextlib.contextmanager
def flash_on_cpu() -> Iterator[FlashCalls]:
    """Transformers' own flash integration with CPU kernels of the same signature behind it."""
    record = FlashCalls()

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False,
                        window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                        deterministic=False, return_attn_probs=False):  # fmt: skip
        record.calls.append(("dense", causal, q.shape[1], k.shape[1]))
        record.arguments.append(dict(locals()))
        out, lse = zip(*(_attend(q[b], k[b], v[b], softmax_scale, causal) for b in range(q.shape[0])), strict=True)
        return (torch.stack(out), torch.stack(lse), None) if return_attn_probs else torch.stack(out)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                               dropout_p=0.0, softmax_scale=None, causal=False,
                               window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False):  # fmt: skip
        record.calls.append(("varlen", causal, q.shape[0], k.shape[0]))
        record.arguments.append(dict(locals()))
        edges_q, edges_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        parts = [
            _attend(q[q0:q1], k[k0:k1], v[k0:k1], softmax_scale, causal)
            for q0, q1, k0, k1 in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False)
        ]
        out, lse = zip(*parts, strict=True)
        return (torch.cat(out), torch.cat(lse, 1), None) if return_attn_probs else torch.cat(out)

    def lazy_imports(implementation, attention_wrapper=None, allow_all_kernels=False):
        pad, unpad = flash_utils._pad_input, flash_utils._unpad_input
        return flash_attn_func, flash_attn_varlen_func, None, pad, unpad

    names = ("_lazy_imports", "_loaded_implementation", "_flash_fn", "_flash_varlen_fn",
             "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn")  # fmt: skip
    saved = {name: getattr(flash_utils, name) for name in names}
    flash_utils._lazy_imports = lazy_imports
    flash_utils._loaded_implementation = None
    try:
        yield record
    finally:
        for name, value in saved.items():
            setattr(flash_utils, name, value)


def image_processor(kind: str) -> Any:
    """LLaVA image processors for the tiny grid: "resize", "crop" (shortest edge, centre crop), "pad"."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    side = LLAVA_GRID[0] * PATCH
    square = {"height": side, "width": side}
    if kind == "resize":
        return CLIPImageProcessorPil(size=square, do_center_crop=False)
    if kind == "crop":
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    if kind == "pad":
        return LlavaImageProcessorPil(size=square, crop_size=square, do_pad=True)
    raise ValueError(f"image_processor: kind must be resize, crop or pad, got {kind!r}")


class Quantised(torch.nn.Module):
    """A layer whose weight nobody can read: eight bits, or two of four in one byte, and a scale per row."""

    def __init__(self, linear: torch.nn.Linear, bits: int) -> None:
        super().__init__()
        top = 2 ** (bits - 1) - 1
        scale = linear.weight.abs().amax(1, keepdim=True) / top
        code = (linear.weight / scale).round().to(torch.int8)
        if bits == 4:
            code = (code[:, ::2] & 15) | (code[:, 1::2] << 4)
        self.bits, self.bias = bits, linear.bias
        self.register_buffer("weight", code)
        self.register_buffer("scale", scale)

    def full(self) -> torch.Tensor:
        if self.bits == 8:
            return self.weight * self.scale
        low, high = (self.weight << 4) >> 4, self.weight >> 4
        return torch.stack([low, high], -1).flatten(1) * self.scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.full(), self.bias)
