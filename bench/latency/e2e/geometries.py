"""Full-size vision-language models from configuration alone, and the same ones narrower and shallower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Shrink:
    """Divide widths and depths, and leave every ratio between them; tokens stay as they are.

    Args:
        width: power of two by which hidden sizes, feed-forward sizes and the vocabulary are divided. Heads are divided as
            far as their number allows, what is left over makes them narrower.
        depth: divisor of the numbers of layers; at least 4 stay, so that a cut at layer 2 has layers behind it.
    """

    width: int = 1
    depth: int = 1

    def layers(self, count: int) -> int:
        return max(min(4, count), round(count / self.depth))

    def layer(self, index: int, count: int) -> int:
        """The layer of the shallower model that stands for layer ``index`` of ``count``."""
        return max(1, round((index + 1) * self.layers(count) / count)) - 1

    def heads(self, hidden: int, heads: int, kv_heads: int | None = None) -> dict[str, int]:
        """Hidden size and heads, as a decoder's configuration names them."""
        kv_heads, fewer = kv_heads or heads, 1
        while fewer < self.width and heads % (2 * fewer) == kv_heads % (2 * fewer) == 0:
            fewer *= 2
        return {
            "hidden_size": hidden // self.width,
            "num_attention_heads": heads // fewer,
            "num_key_value_heads": kv_heads // fewer,
        }


@dataclass(frozen=True)
class Geometry:
    """One model, and the picture it looks at.

    Args:
        config: its configuration, shrunk.
        processor: its image processor, set so that the picture becomes the tokens in ``tokens``.
        image: (width, height) of the picture, pixels.
        tokens: vision tokens of the picture, newlines included.
        parameters: in billions, as published.
    """

    config: Callable[[Shrink], Any]
    processor: Callable[[], Any]
    image: tuple[int, int]
    tokens: int
    parameters: float


def _decoder(shrink: Shrink, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    """What the configurations of all decoders name alike."""
    return shrink.heads(hidden, heads, kv_heads) | {
        "intermediate_size": ffn // shrink.width,
        "num_hidden_layers": shrink.layers(layers),
        "vocab_size": vocab // shrink.width,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def _clip(shrink: Shrink) -> Any:
    """CLIP-L/14 at 336 pixels."""
    sizes = shrink.heads(1024, 16)
    del sizes["num_key_value_heads"]
    return transformers.CLIPVisionConfig(
        **sizes,
        intermediate_size=4096 // shrink.width,
        num_hidden_layers=shrink.layers(24),
        image_size=336,
        patch_size=14,
        projection_dim=768 // shrink.width,
    )


def _vicuna(shrink: Shrink, size: str) -> Any:
    sizes = {"7b": (4096, 11008, 32, 32, 32, 32064), "13b": (5120, 13824, 40, 40, 40, 32064)}
    return transformers.LlamaConfig(**_decoder(shrink, *sizes[size]))


def _llava(size: str) -> Callable[[Shrink], Any]:
    def config(shrink: Shrink) -> Any:
        text = _vicuna(shrink, size)
        return transformers.LlavaConfig(
            vision_config=_clip(shrink), text_config=text, image_token_index=text.vocab_size - 1
        )

    return config


def _llava_next(shrink: Shrink) -> Any:
    text = _vicuna(shrink, "7b")
    return transformers.LlavaNextConfig(
        vision_config=_clip(shrink),
        text_config=text,
        image_token_index=text.vocab_size - 1,
        image_grid_pinpoints=PINPOINTS,
    )


def _markers(vocab: int) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: vocab - 1 - number for number, name in enumerate(names)}


def _rotary(text: dict, sections: tuple[int, int, int], theta: float) -> dict:
    """Sections of the rotary embedding by axis, for a head of 128 and narrower."""
    dim = text["hidden_size"] // text["num_attention_heads"]
    scaled = [section * dim // 128 for section in sections]
    scaled[0] += dim // 2 - sum(scaled)
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": scaled}


def _qwen_vision(shrink: Shrink, depth: int, hidden: int, inner: int, out: int) -> dict:
    """A vision tower of 16 heads under the names that the Qwen families have for its sizes."""
    sizes = shrink.heads(hidden, 16)
    return {
        "depth": shrink.layers(depth),
        "hidden_size": sizes["hidden_size"],
        "num_heads": sizes["num_attention_heads"],
        "intermediate_size": inner // shrink.width,
        "out_hidden_size": out,
    }


def _qwen2_5_vl(shrink: Shrink) -> Any:
    text = _decoder(shrink, 3584, 18944, 28, 28, 4, 152064)
    return transformers.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": _rotary(text, (16, 24, 24), 1e6)},
        vision_config=_qwen_vision(shrink, 32, 1280, 3420, text["hidden_size"])
        | {"fullatt_block_indexes": list(range(7, shrink.layers(32), 8)) or [shrink.layers(32) - 1]},
        tie_word_embeddings=False,
        **_markers(text["vocab_size"]),
    )


def _qwen3_vl(shrink: Shrink) -> Any:
    text = _decoder(shrink, 4096, 12288, 36, 32, 8, 151936)
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    return transformers.Qwen3VLConfig(
        text_config=text | {"head_dim": head_dim, "rope_parameters": _rotary(text, (24, 20, 20), 5e6)},
        vision_config=_qwen_vision(shrink, 27, 1152, 4304, text["hidden_size"])
        | {
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": sorted({shrink.layer(index, 27) for index in (8, 16, 24)}),
        },
        tie_word_embeddings=False,
        **_markers(text["vocab_size"]),
    )


def _internvl3(shrink: Shrink) -> Any:
    sizes = shrink.heads(1024, 16)
    del sizes["num_key_value_heads"]
    text = _decoder(shrink, 3584, 18944, 28, 28, 4, 151936)
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            **sizes,
            intermediate_size=4096 // shrink.width,
            num_hidden_layers=shrink.layers(24),
            image_size=[448, 448],
            patch_size=[14, 14],
        ),
        text_config=transformers.Qwen2Config(**text),
        image_token_id=text["vocab_size"] - 1,
        image_seq_length=256,
        tie_word_embeddings=False,
    )


PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _clip_processor() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


def _next_processor() -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    square = {"height": 336, "width": 336}
    return LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=square, image_grid_pinpoints=PINPOINTS)


def _qwen_processor(patch: int) -> Callable[[], Any]:
    def processor() -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        limits = {"shortest_edge": 56 * 56, "longest_edge": 16384 * (2 * patch) ** 2}
        return Qwen2VLImageProcessorPil(patch_size=patch, size=limits)

    return processor


def _internvl_processor() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12)


GEOMETRIES = {
    "llava-1.5-7b": Geometry(_llava("7b"), _clip_processor, (640, 480), 576, 7.06),
    "llava-1.5-13b": Geometry(_llava("13b"), _clip_processor, (640, 480), 576, 13.35),
    "llava-next-7b": Geometry(_llava_next, _next_processor, (672, 672), 2880 + 48, 7.06),  # a newline per row of tiles
    "qwen2.5-vl-7b-1k": Geometry(_qwen2_5_vl, _qwen_processor(14), (896, 896), 1024, 8.29),
    "qwen2.5-vl-7b-4k": Geometry(_qwen2_5_vl, _qwen_processor(14), (1792, 1792), 4096, 8.29),
    "qwen2.5-vl-7b-16k": Geometry(_qwen2_5_vl, _qwen_processor(14), (3584, 3584), 16384, 8.29),
    "qwen3-vl-8b": Geometry(_qwen3_vl, _qwen_processor(16), (1024, 1024), 1024, 8.77),
    "internvl3-8b": Geometry(_internvl3, _internvl_processor, (1792, 1344), 13 * 256, 7.94),  # 12 tiles and the whole
}


def build(config: Any, device: str, dtype: torch.dtype) -> Any:
    """The unmodified Hugging Face class of a configuration, random weights made where they stay."""
    name = type(config).__name__.replace("Config", "ForConditionalGeneration")
    with torch.device(device), _default_dtype(dtype):
        model = getattr(transformers, name)(config)
    return model.eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
