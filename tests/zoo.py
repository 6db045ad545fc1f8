"""Every supported family, tiny: unmodified transformers classes with random weights, and prompts as their processors
would write them. ``FAMILIES`` is what the contract of `test_families.py` runs over and what README's table lists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_models
import torch
import transformers
from tiny_models import HIDDEN, IMAGE, INIT, PATCH, VIDEO, VISION_END, VISION_START, text_tokens
from torch import Tensor
from transformers.models.llava_next import modeling_llava_next as llava_next_code

from crop.models import ADAPTERS, Prompt
from crop.region import VisionLayout

NUM_LAYERS = 4
MARK = 94  # any special token that stands inside an image block
TEXT = tiny_models.TEXT | dict(num_hidden_layers=NUM_LAYERS)
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


@dataclass(frozen=True)
class Family:
    """A family as users meet it.

    Attributes:
        title: its row in README.
        classes: the transformers class.
        config: () -> configuration of the tiny model.
        image: (original size, seed) -> Image.
        sizes: two original sizes of different token grids, where the family knows such.
        join: per-sample lists of images -> model arguments; default: concatenated along the first axis.
        types: ids -> further arguments that follow from the ids.
        processor: () -> the image processor of `crop.patch`; None where the family needs none.
        attentions: what the family supports; the others are refused.
    """

    title: str
    classes: str
    config: Callable[[], Any]
    image: Callable[[tuple[int, int], int], Image]
    sizes: tuple[tuple[int, int], ...] = ((48, 32), (24, 40))
    join: Callable[[list[list[Image]]], dict[str, Tensor]] | None = None
    types: Callable[[Tensor], dict[str, Tensor]] | None = None
    processor: Callable[[], Any] | None = None
    attentions: tuple[str, ...] = ("eager", "sdpa", "flash_attention_2")


def pixels(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3000 + seed))


# ------------------------------------------------------------------- grids that follow the image
def patches_image(size: tuple[int, int], seed: int, start: int = VISION_START, end: int = VISION_END) -> Image:
    rows, columns = size[1] // (2 * PATCH), size[0] // (2 * PATCH)
    arguments = {
        "pixel_values": pixels(4 * rows * columns, 6 * PATCH * PATCH, seed=seed),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }
    return Image((start, *[IMAGE] * (rows * columns), end), arguments, size)


def film(stamped: bool) -> Callable[[tuple[int, int], int], Image]:
    """Wide pictures become videos of four pictures, two frames to the model; others stay images.

    ``stamped``: a time stands before every frame and markers around it, else they are one run.
    """

    def image(size: tuple[int, int], seed: int) -> Image:
        if size[0] < size[1]:
            return patches_image(size, seed)
        rows, columns = size[1] // (4 * PATCH), size[0] // (4 * PATCH)
        frame = (VIDEO,) * (rows * columns)
        arguments = {
            "pixel_values_videos": pixels(8 * rows * columns, 6 * PATCH * PATCH, seed=seed),
            "video_grid_thw": torch.tensor([[2, 2 * rows, 2 * columns]]),
        }
        if stamped:
            parts = [(*text_tokens(3, seed + n), VISION_START, *frame, VISION_END) for n in range(2)]
            return Image(parts[0] + parts[1], arguments, size)
        arguments["second_per_grid_ts"] = torch.tensor([1.5])
        return Image((VISION_START, *frame, *frame, VISION_END), arguments, size)

    return image


def vision_types(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def qwen2_vl() -> Any:
    vision = dict(QWEN_TOWER, embed_dim=16, hidden_size=HIDDEN, mlp_ratio=2)
    return transformers.Qwen2VLConfig(text_config=MROPE, vision_config=vision, **MARKERS)


def qwen2_5_vl() -> Any:
    vision = dict(QWEN_TOWER, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, window_size=4 * 2 * PATCH,
                  fullatt_block_indexes=[1])  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=MROPE, vision_config=vision, **MARKERS)


def qwen3_vl() -> Any:
    """Three levels of features are added again, the last behind the cut."""
    vision = dict(QWEN_TOWER, depth=3, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN,
                  num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])  # fmt: skip
    return transformers.Qwen3VLConfig(text_config=dict(MROPE, head_dim=8), vision_config=vision, **MARKERS)


def glm4v() -> Any:
    vision = dict(QWEN_TOWER, hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, image_size=32)
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=VISION_START,
               image_end_token_id=VISION_END, video_start_token_id=95, video_end_token_id=MARK)  # fmt: skip
    return transformers.Glm4vConfig(text_config=MROPE, vision_config=vision, **ids)


def pixtral_tower() -> Any:
    return transformers.PixtralVisionConfig(**TOWER, image_size=64)


def pixtral() -> Any:
    return transformers.LlavaConfig(
        vision_config=pixtral_tower(),
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def mistral3() -> Any:
    return transformers.Mistral3Config(
        vision_config=pixtral_tower(),
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def rows_image(side: int) -> Callable[[tuple[int, int], int], Image]:
    """Rows of image tokens with a break between two and an end behind the last."""

    def image(size: tuple[int, int], seed: int) -> Image:
        rows, columns = size[1] // side, size[0] // side
        ids = ([IMAGE] * columns + [MARK]) * rows
        ids[-1] = VISION_END
        arguments = {
            "pixel_values": pixels(1, 3, size[1], size[0], seed=seed),
            "image_sizes": torch.tensor([size[::-1]]),
        }
        return Image(tuple(ids), arguments, size)

    return image


def padded(images: list[list[Image]]) -> dict[str, Tensor]:
    """Pictures of different sizes in one tensor, as Pixtral's processor pads them."""
    flat = [image for row in images for image in row]
    width, height = (max(image.size[axis] for image in flat) for axis in (0, 1))
    full = torch.zeros(len(flat), 3, height, width)
    for place, image in zip(full, flat, strict=True):
        place[:, : image.size[1], : image.size[0]] = image.arguments["pixel_values"][0]
    return {"pixel_values": full, "image_sizes": torch.cat([image.arguments["image_sizes"] for image in flat])}


# ------------------------------------------------------------------------------------- tiles
SIDE = 4 * PATCH  # of a tile, pixels
ANYRES = [[SIDE * rows, SIDE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]


def llava_next() -> Any:
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=SIDE),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=ANYRES,
    )


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=SIDE, vision_use_head=False),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=ANYRES,
        vision_aspect_ratio="anyres_max_2",  # so that three tiles are interpolated
    )


def anyres_image(config: Callable[[], Any]) -> Callable[[tuple[int, int], int], Image]:
    """As many tiles and tokens as the model itself expects."""

    def image(size: tuple[int, int], seed: int, alone: bool = True) -> Image:
        base = getattr(transformers, type(config()).__name__.replace("Config", "Model"))
        tiles = 1
        if alone:
            pinpoints = config().image_grid_pinpoints
            tiles = llava_next_code.image_size_to_num_patches(list(size[::-1]), pinpoints, SIDE)
        features = [torch.zeros(tiles, (SIDE // PATCH) ** 2, 1)]
        more = dict(vision_feature_select_strategy="default") if "Next" in base.__name__ else {}
        if not more:
            more = dict(vision_aspect_ratio=config().vision_aspect_ratio)
        (packed,), _ = base.pack_image_features(
            SimpleNamespace(config=config()), features, [size[::-1]], image_newline=torch.zeros(1), **more
        )
        arguments = {
            "pixel_values": pixels(1, tiles, 3, SIDE, SIDE, seed=seed),
            "image_sizes": torch.tensor([size[::-1]]),
        }
        return Image((IMAGE,) * len(packed), arguments, size)

    return image


def tiles_padded(images: list[list[Image]]) -> dict[str, Tensor]:
    """Images of different numbers of tiles, padded to the most."""
    flat = [image.arguments["pixel_values"] for row in images for image in row]
    most = max(tiles.shape[1] for tiles in flat)
    full = [torch.nn.functional.pad(tiles, (0, 0) * 3 + (0, most - tiles.shape[1])) for tiles in flat]
    sizes = [image.arguments["image_sizes"] for row in images for image in row]
    return {"pixel_values": torch.cat(full), "image_sizes": torch.cat(sizes)}


def tiles_counted(images: list[list[Image]]) -> dict[str, Tensor]:
    return tiles_padded(images) | {"batch_num_images": torch.tensor([len(row) for row in images if row])}


def internvl() -> Any:
    vision = {key: value for key, value in TOWER.items() if key != "patch_size"}
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision, image_size=[32, 32], patch_size=[4, 4]),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def internvl_processor() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=3)


def internvl_image(size: tuple[int, int], seed: int) -> Image:
    tiles = internvl_processor().get_number_of_image_patches(size[1], size[0])
    ids = (VISION_START, *[IMAGE] * (16 * tiles), VISION_END)
    return Image(ids, {"pixel_values": pixels(tiles, 3, 32, 32, seed=seed)}, size)


def idefics3() -> Any:
    vision = transformers.Idefics3VisionConfig(**TOWER, image_size=32)
    return transformers.Idefics3Config(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT),
                                       image_token_id=IMAGE, scale_factor=2, pad_token_id=0)  # fmt: skip


def smolvlm() -> Any:
    vision = transformers.SmolVLMVisionConfig(**TOWER, image_size=32)
    return transformers.SmolVLMConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT),
                                      image_token_id=IMAGE, scale_factor=2, pad_token_id=0)  # fmt: skip


def idefics3_processor() -> Any:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})


def idefics3_image(size: tuple[int, int], seed: int) -> Image:
    """Two tiles and the whole, beside each other or one above the other; markers before each, a line end per row."""
    tile = (VISION_START, MARK, *[IMAGE] * 16)
    tiles = tile * 2 + (95,) if size[0] > size[1] else (tile + (95,)) * 2
    return Image((*tiles, *tile, VISION_END), {"pixel_values": pixels(1, 3, 3, 32, 32, seed=seed)}, size)


def images_per_sample(images: list[list[Image]]) -> dict[str, Tensor]:
    """(samples, most tiles, 3, height, width), as Idefics3's processor pads with black images."""
    rows = [torch.cat([image.arguments["pixel_values"][0] for image in row]) for row in images if row]
    most = max(map(len, rows))
    full = [torch.nn.functional.pad(row, (0, 0) * 3 + (0, most - len(row))) for row in rows]
    return {"pixel_values": torch.stack(full)}


# ------------------------------------------------------------------------- bidirectional attention
def llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=24),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )


def llava_processor() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


def gemma3() -> Any:
    """Sliding and full layers in turn, on either side of a cut; the window is shorter than the prompts."""
    text = TEXT | dict(head_dim=8, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=20,
                       query_pre_attn_scalar=8, tie_word_embeddings=False)  # fmt: skip
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=48, vision_use_head=False),
        mm_tokens_per_image=36,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )


def paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT, head_dim=8, tie_word_embeddings=False),
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=24, vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        tie_word_embeddings=False,
    )


def square_image(side: int, marked: bool) -> Callable[[tuple[int, int], int], Image]:
    """A fixed number of tokens whatever the size of the picture."""

    def image(size: tuple[int, int], seed: int) -> Image:
        ids = (IMAGE,) * (side // (2 if marked else 1)) ** 2
        pictures = {"pixel_values": pixels(1, 3, side * PATCH, side * PATCH, seed=seed)}
        return Image((VISION_START, *ids, VISION_END) if marked else ids, pictures, size)

    return image


FAMILIES: dict[str, Family] = {
    "llava": Family(
        "LLaVA-1.5 (CLIP or SigLIP tower)", "LlavaForConditionalGeneration", llava, square_image(6, False),
        processor=llava_processor,
    ),
    "pixtral": Family(
        "Pixtral", "LlavaForConditionalGeneration", pixtral, rows_image(PATCH), sizes=((24, 16), (16, 20)), join=padded
    ),
    "llava_next": Family(
        "LLaVA-NeXT: tiles, unpadding, newlines", "LlavaNextForConditionalGeneration", llava_next,
        anyres_image(llava_next), sizes=((44, 22), (15, 30)), join=tiles_padded,
    ),
    "llava_onevision": Family(
        "LLaVA-OneVision, images", "LlavaOnevisionForConditionalGeneration", llava_onevision,
        anyres_image(llava_onevision), sizes=((52, 20), (14, 30)), join=tiles_counted,
    ),
    "qwen2_vl": Family(
        "Qwen2-VL, images", "Qwen2VLForConditionalGeneration", qwen2_vl, patches_image, types=vision_types
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL, images", "Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, patches_image, types=vision_types
    ),
    "qwen2_5_vl_video": Family(
        "Qwen2.5-VL, video", "Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, film(False), types=vision_types
    ),
    "qwen3_vl": Family(
        "Qwen3-VL, images, DeepStack", "Qwen3VLForConditionalGeneration", qwen3_vl, patches_image, types=vision_types
    ),
    "qwen3_vl_video": Family(
        "Qwen3-VL, video, DeepStack", "Qwen3VLForConditionalGeneration", qwen3_vl, film(True), types=vision_types
    ),
    "glm4v": Family("GLM-4V, images", "Glm4vForConditionalGeneration", glm4v, patches_image, types=vision_types),
    "internvl": Family(
        "InternVL 2.5 and 3: tiles", "InternVLForConditionalGeneration", internvl, internvl_image,
        sizes=((70, 30), (20, 30)), processor=internvl_processor,
    ),
    "idefics3": Family(
        "Idefics3: tiles", "Idefics3ForConditionalGeneration", idefics3, idefics3_image, sizes=((48, 24), (20, 40)),
        join=images_per_sample, processor=idefics3_processor,
    ),
    "smolvlm": Family(
        "SmolVLM, images: tiles", "SmolVLMForConditionalGeneration", smolvlm, idefics3_image,
        sizes=((48, 24), (20, 40)), join=images_per_sample, processor=idefics3_processor,
    ),
    "mistral3": Family(
        "Mistral 3", "Mistral3ForConditionalGeneration", mistral3, rows_image(2 * PATCH), join=padded
    ),
    "gemma3": Family(
        "Gemma 3: sliding windows, images see themselves", "Gemma3ForConditionalGeneration", gemma3,
        square_image(12, True), attentions=("eager", "sdpa"),
        types=lambda ids: {"token_type_ids": (ids == IMAGE).int()},
    ),
    "paligemma": Family(
        "PaliGemma: prompts see themselves", "PaliGemmaForConditionalGeneration", paligemma, square_image(6, False),
        attentions=("eager", "sdpa"), types=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
    ),
}  # fmt: skip


def build_model(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A tiny random model; equal seeds give equal weights whatever the attention.

    The vision tower, which the patch leaves alone, stays eager: under flash attention the Pixtral tower of
    transformers 5.17 mixes the images of a batch.
    """
    torch.manual_seed(seed)
    family = FAMILIES[name]
    model = tiny_models.sharpen(getattr(transformers, family.classes)(family.config()), attention)
    tiny_models.set_attention(ADAPTERS[model.config.model_type].vision_tower(model.model), "eager")
    return model


# ---------------------------------------------------------------------------------------- batches
@dataclass(frozen=True)
class Sample:
    """One sample without padding."""

    family: str
    ids: tuple[int, ...]
    images: tuple[Image, ...]
    prompt_length: int

    def spans(self) -> list[tuple[int, ...]]:
        """Positions of each image's vision tokens."""
        return [tuple(layout.position.tolist()) for layout in self.layouts()]

    def layouts(self) -> list[VisionLayout]:
        """Geometry by the package's adapter, which tests of its own hold to the processors."""
        return list(_layouts(self.family, self.ids, self.images))

    def vision_key(self) -> tuple:
        return self.family, self.ids[: self.prompt_length], tuple(id(image) for image in self.images)

    def inputs(self, family: str) -> dict[str, Tensor]:
        """What the model takes for this sample alone."""
        return make_batch([self], "none").inputs

    def cut(self, stop: int) -> Sample:
        return replace(self, ids=self.ids[:stop])

    def extended(self, tokens: list[int]) -> Sample:
        return replace(self, ids=self.ids + tuple(int(token) for token in tokens))


@functools.cache
def _layouts(name: str, ids: tuple[int, ...], images: tuple[Image, ...]) -> tuple[VisionLayout, ...]:
    if not images:
        return ()
    family, config = FAMILIES[name], get_config(name)
    processor = None if family.processor is None else family.processor()
    inputs = Sample(name, ids, images, len(ids)).inputs(name)
    prompt = Prompt(config, inputs["input_ids"], inputs, processor, [image.size for image in images])
    return tuple(layout for _, layout in ADAPTERS[config.model_type].images(prompt))


@functools.cache
def get_config(name: str) -> Any:
    return FAMILIES[name].config()


@dataclass
class Batch:
    """Samples plus the padded tensors that a model takes."""

    family: str
    samples: list[Sample]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)  # column of each sample's first real token


def make_sample(family: str, pieces: list[int | tuple[int, int]], seed: int) -> Sample:
    """A sample from `pieces`: an int is that many text tokens, a (width, height) is an image."""
    ids: list[int] = []
    images = []
    for number, piece in enumerate(pieces):
        if isinstance(piece, int):
            ids += text_tokens(piece, 17 * seed + number)
            continue
        more = {} if family != "llava_onevision" else {"alone": sum(isinstance(p, tuple) for p in pieces) == 1}
        images.append(FAMILIES[family].image(piece, 17 * seed + number, **more))
        ids += images[-1].ids
    return Sample(family, tuple(ids), tuple(images), len(ids))


def make_batch(samples: list[Sample], padding: str) -> Batch:
    """Pad `samples` ("none" needs equal lengths, "left", "right") and build the model's inputs."""
    name = samples[0].family
    family, longest = FAMILIES[name], max(len(sample.ids) for sample in samples)
    assert padding != "none" or all(len(sample.ids) == longest for sample in samples)
    ids = torch.full((len(samples), longest), tiny_models.PAD)
    mask, offsets = torch.zeros_like(ids), []
    for row, sample in enumerate(samples):
        first = longest - len(sample.ids) if padding == "left" else 0
        ids[row, first : first + len(sample.ids)] = torch.tensor(sample.ids)
        mask[row, first : first + len(sample.ids)] = 1
        offsets.append(first)
    inputs = {"input_ids": ids, "attention_mask": mask}
    images = [list(sample.images) for sample in samples]
    if any(images):
        inputs |= (family.join or concatenated)(images)
    if family.types is not None:
        inputs |= family.types(ids)
    return Batch(name, samples, inputs, offsets)


def concatenated(images: list[list[Image]]) -> dict[str, Tensor]:
    flat = [image for row in images for image in row]
    keys = dict.fromkeys(key for image in flat for key in image.arguments)
    return {key: torch.cat([image.arguments[key] for image in flat if key in image.arguments]) for key in keys}


def standard_batch(family: str, padding: str, images: int) -> Batch:
    """Two samples with 1 or 2 images each and, where padding allows, one of text alone."""
    wide, tall = FAMILIES[family].sizes
    grids = [(wide, tall)[:images], (tall, wide)[:images]]
    samples = []
    for row, (before, after) in enumerate(((3, 12), (2, 5))):
        pieces: list[int | tuple[int, int]] = [before]
        for number, size in enumerate(grids[row]):
            pieces += [size, 2 + number]
        pieces[-1] = after
        samples.append(make_sample(family, pieces, seed=10 * images + row))
    if padding == "none":
        longest = max(len(sample.ids) for sample in samples)
        samples = [
            replace(longer, prompt_length=len(longer.ids))
            for longer in (s.extended(text_tokens(longest - len(s.ids), 77)) for s in samples)
        ]
        return make_batch(samples, padding)
    return make_batch([*samples, make_sample(family, [9], seed=5)], padding)


# ---------------------------------------------------------------------------------------- README
README = Path(__file__).parents[1] / "README.md"
FENCES = ("<!-- families: written by `python tests/zoo.py` -->\n", "<!-- families: end -->\n")


def readme_table() -> str:
    """What the contract runs over, as README shows it."""
    lines = ["| family | class | attention | `patch` needs, with a region |", "|---|---|---|---|"]
    for family in FAMILIES.values():
        needs = "" if family.processor is None else "`processor`, `image_size`"
        lines.append(f"| {family.title} | `{family.classes}` | {', '.join(family.attentions)} | {needs} |")
    return "\n".join(lines) + "\n"


def readme_now() -> tuple[str, str, str]:
    """README before the table, the table, README after it."""
    before, rest = README.read_text().split(FENCES[0])
    table, after = rest.split(FENCES[1])
    return before + FENCES[0], table, FENCES[1] + after


if __name__ == "__main__":
    before, _, after = readme_now()
    README.write_text(before + readme_table() + after)
