"""Token geometry through the processors' own arithmetic: pictures whose pixels encode their own coordinates."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlavaConfig, Qwen2_5_VLConfig, Siglip2VisionConfig

from crop.geometry.layout import PADDING, VisionLayout
from crop.models import Prompt, families, family_of
from crop.models.fixed import resize_crop_pad_view
from tests.support.families.entry import PATCH
from tests.support.families.squares import LLAVA_GRID
from tests.support.processors import image_processor
from tests.support.tiny_families import build_model
from tests.support.written import SHAPED, TILES, written

pytestmark = pytest.mark.fast

SIZES = [(320, 320), (500, 300), (300, 500), (403, 267)]


def coordinates(width: int, height: int) -> Image.Image:
    """Red rises from left to right, green from top to bottom, blue is full: 0 blue marks processor padding."""
    x = (np.arange(width) + 0.5) / width * 255
    y = (np.arange(height) + 0.5) / height * 255
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = x[None, :].round(), y[:, None].round(), 255
    return Image.fromarray(pixels)


def read_centers(pixel_values: torch.Tensor, processor, rows: int, columns: int) -> torch.Tensor:
    """(rows * columns, 3): mean x, y and blue of the pixels under each token, undone from normalisation."""
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    picture = pixel_values * std + mean
    height, width = picture.shape[1] // rows, picture.shape[2] // columns
    cells = picture.unfold(1, height, height).unfold(2, width, width).mean((-2, -1))
    return cells.permute(1, 2, 0).reshape(-1, 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["resize", "crop", "pad"])
def test_llava_tokens_look_where_the_layout_says(kind, size):
    processor = image_processor(kind)
    pixels = processor(coordinates(*size), return_tensors="pt")["pixel_values"][0]
    seen = read_centers(pixels, processor, *LLAVA_GRID)
    layout = VisionLayout.grid(*LLAVA_GRID, box=resize_crop_pad_view(processor, size))
    # Half a pixel of the processed picture is what integer crops and resampling may shift.
    tolerance = 0.6 / (LLAVA_GRID[0] * PATCH) * max(size) / min(size) + 1 / 255
    inner = (seen[:, 2] > 0.999) & (layout.kind != PADDING)
    assert inner.sum() >= 16
    assert (seen[inner, :2] - layout.center[inner]).abs().max() < tolerance
    wholly_padding = seen[:, 2] < 0.6
    if kind == "pad" and size[0] != size[1]:
        assert wholly_padding.any()
    assert (layout.kind[wholly_padding] == PADDING).all()


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] != size[1]])
def test_a_wrong_view_is_noticed(size):
    """The check above can fail: the crop's geometry is not the resize's."""
    processor = image_processor("crop")
    pixels = processor(coordinates(*size), return_tensors="pt")["pixel_values"][0]
    seen = read_centers(pixels, processor, *LLAVA_GRID)
    assert (seen[:, :2] - VisionLayout.grid(*LLAVA_GRID).center).abs().max() > 0.1


@pytest.mark.parametrize("size", SIZES)
def test_qwen_tokens_look_where_the_layout_says(size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil()
    out = processor(coordinates(*size), return_tensors="pt")
    config = Qwen2_5_VLConfig()
    ids = torch.full((1, int(out["image_grid_thw"].prod()) // 4), config.image_token_id)
    ((sample, layout),) = families()["qwen2_5_vl"].images(Prompt(config, ids, out))
    # Rows of pixel_values are 14 x 14 patches, two frames deep, four to a token.
    patches = out["pixel_values"].view(len(layout), 4, 3, 2, 14, 14)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    seen = patches.mean((1, 3, 4, 5)) * std + mean
    assert (seen[:, :2] - layout.center).abs().max() < 0.01 and sample == 0


def test_place():
    ids = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]])
    prompt = Prompt(None, ids, {})

    def grids(*sizes):
        return [VisionLayout.grid(*size) for size in sizes]

    found = prompt.place(grids((2, 2), (1, 2), (1, 2), (2, 1)), token_id=1)
    assert [(sample, layout.position.tolist()) for sample, layout in found] == [
        (0, [1, 2, 3, 4]),
        (0, [6, 7]),
        (1, [0, 1]),
        (1, [2, 3]),
    ]
    wrong_ones = ([(2, 2)], [(4, 2), (2, 2)], [(2, 2), (1, 2), (1, 3)], [(3, 2), (2, 2), (1, 1)])
    for wrong in wrong_ones:
        with pytest.raises(ValueError, match="whole images"):
            prompt.place(grids(*wrong), token_id=1)


def test_adapters_refuse_what_they_would_get_wrong():
    qwen, llava = families()["qwen2_5_vl"].images, families()["llava"].images
    config = Qwen2_5_VLConfig()
    with pytest.raises(ValueError, match="image_grid_thw must be given"):
        qwen(Prompt(config, torch.full((1, 4), config.image_token_id), {}))
    with pytest.raises(ValueError, match="one frame per image, got 3"):
        qwen(Prompt(config, torch.full((1, 4), config.image_token_id), {"image_grid_thw": torch.tensor([[3, 4, 4]])}))
    config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=32, patch_size=8))
    ids = torch.full((1, 32), config.image_token_id)
    assert [layout.extent for _, layout in llava(Prompt(config, ids, {}))] == [(1, 4, 4)] * 2
    with pytest.raises(ValueError, match="multiple of 4 x 4 = 16, got 17"):
        llava(Prompt(config, ids[:, :17], {}))
    config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="vision_feature_select_strategy must be 'default'"):
        llava(Prompt(config, ids, {}))
    with pytest.raises(ValueError, match="got 'siglip2_vision_model'"):
        llava(Prompt(LlavaConfig(vision_config=Siglip2VisionConfig()), ids, {}))
    with pytest.raises(ValueError, match="image_size must be given"):
        resize_crop_pad_view(image_processor("crop"), None)
    with pytest.raises(TypeError, match="got Linear"):
        family_of(torch.nn.Linear(1, 1))


def test_a_wrong_attribute_is_named():
    family, model = families()["llava"], build_model("llava")
    base = model.model
    names = ", ".join(name for name, _ in base.named_children())
    for part, use in {
        "tower": lambda wrong: wrong.vision_tower(base),
        "decoder": lambda wrong: wrong.language_model(model),
        "projector": lambda wrong: wrong.vision_modules(base),
    }.items():
        message = f"{part} of family 'llava' must be an attribute of LlavaModel, got 'sight'; it has {names}"
        with pytest.raises(ValueError, match=re.escape(message)):
            use(replace(family, **{part: "sight"}))


@pytest.mark.parametrize("kind", ["AyaVision", "Cohere2Vision", "Idefics3", "SmolVLM"])
def test_images_beside_each_other_are_told_apart(kind):
    """Prompts without a word between their images, and with one."""
    config, grids = TILES[kind], [(2, 3), (1, 1), (1, 2), (3, 1)]
    cut = [rows * columns > 1 for rows, columns in grids]
    counts = [rows * columns + many for (rows, columns), many in zip(grids, cut, strict=True)]
    rows, columns = map(list, zip(*grids, strict=True))
    rows, columns = ([side * many for side, many in zip(sides, cut, strict=True)] for sides in (rows, columns))
    told = {"num_patches": counts, "rows": [rows], "cols": [columns]}
    images = [written(config, told, number)[:-1] for number in range(len(grids))]
    for between in ([], [ord(".")]):
        long = [token for image in images for token in (*image, *between)] + [ord("?")]
        short = [ord("?"), *images[2], *between, *images[0], ord("?")]
        ids = torch.tensor([long, [*short, *[0] * (len(long) - len(short))]])
        found = families()[config.model_type].images(Prompt(config, ids, {}))
        assert [sample for sample, _ in found] == [0, 0, 0, 0, 1, 1]
        assert [len(layout) for _, layout in found] == [25 * counts[number] for number in (0, 1, 2, 3, 2, 0)]
        if "Vision" not in kind:
            assert [layout.extent for _, layout in found[:4]] == [(2, 10, 15), (1, 5, 5), (2, 5, 10), (2, 15, 5)]


@pytest.mark.parametrize("kind", list(SHAPED))
def test_images_of_other_shapes_are_told_apart(kind):
    """Tiles of 5 x 5 tokens; where it has a shape of its own, the whole is of 2 x 3."""
    config, grids, order = SHAPED[kind], [(2, 3), (1, 1), (1, 2), (3, 1)], (0, 1, 2, 3, 2, 0)
    cut = [rows * columns * (rows * columns > 1) for rows, columns in grids]
    rows, columns = (list(sides) for sides in zip(*grids, strict=True))
    told = {"rows": [rows], "cols": [columns], "image_rows": rows, "image_cols": columns, "image_sizes": [[28, 42]] * 4}
    if kind == "Lfm2Vl":
        shapes = [[[10, 10]] * count + [[4, 6]] for count in cut]
        arguments = {"spatial_shapes": torch.tensor([shape for number in order for shape in shapes[number]])}
    else:
        shapes = [[[8, 12]] + [[20, 20]] * count for count in cut]
        flat = torch.tensor([shape for image in shapes for shape in image])
        whole = [list(grid) if count else [0, 0] for grid, count in zip(grids, cut, strict=True)]
        told |= {"grids": whole, "num_patches_per_image": [count + 1 for count in cut], "target_sizes": flat}
        arguments = {"target_sizes": torch.tensor([shape for number in order for shape in shapes[number]])}
    images = [written(config, told, number)[:-1] for number in range(len(grids))]
    alone = 25 if kind == "GraniteDocling" else 6
    for between in ([], [ord(".")]):
        long = [token for image in images for token in (*image, *between)] + [ord("?")]
        short = [ord("?"), *images[2], *between, *images[0], ord("?")]
        ids = torch.tensor([long, [*short, *[0] * (len(long) - len(short))]])
        found = families()[config.model_type].images(Prompt(config, ids, arguments))
        assert [sample for sample, _ in found] == [0, 0, 0, 0, 1, 1]
        assert [len(layout) for _, layout in found] == [25 * cut[number] + alone for number in order]
        if kind != "Lfm2Vl":  # it needs the processor for more
            extents = {0: (2, 10, 15), 2: (2, 5, 10), 3: (2, 15, 5)}
            assert all(found[number][1].extent == extent for number, extent in extents.items())
