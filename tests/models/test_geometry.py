"""Token geometry through every family's own processor and packing: pictures whose pixels encode their coordinates.

A picture's red is its x, its green its y, its blue is full, so that padding shows. The processor resizes, pads and cuts
it; the mean colour under each patch then goes where the model's own code puts that patch's feature; what arrives at a
token is where the token looks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crop.geometry.layout import NEWLINE, PATCH, VisionLayout
from crop.models import Prompt, families
from tests.support.pictures import grids, more, squares, tiles
from tests.support.pictures.colours import MARK
from tests.support.written import WRITERS, ovis2_markers, written

# With the limits of the processors tokens are odd in number somewhere. Only LightOnOCR's processor lets patches go into no
# token: the others resize to whole tokens.
SIZES = [(320, 320), (500, 300), (300, 500), (403, 267), (900, 260)]
BREAK = 1
CASES = squares.CASES | grids.CASES | tiles.CASES | more.CASES
UNTESTED = dict.fromkeys(more.LACKING, "this transformers lacks it")  # a family without a case -> the reason


def test_every_family_has_a_case():
    assert set(CASES) & set(UNTESTED) == set()
    missing = set(families()) - {family_of_case(name) for name in CASES} - set(UNTESTED)
    assert not missing, f"families without a case in CASES: {sorted(missing)}"


def family_of_case(name: str) -> str:
    """The model type that a case is about."""
    return {"pixtral": "llava"}.get(name, name.split(",")[0])


def layouts(config: Any, processor: Any, out: Any, count: int, breaks: int, sizes: list) -> list[VisionLayout]:
    """What the family says of a prompt with these image tokens, a break behind every ``breaks`` of them."""
    ids = [config.image_token_id] * count
    if config.model_type == "ovis2":
        ids = ovis2_markers(out, config)
    if config.model_type in WRITERS:
        ids = written(config, out)
    if breaks:
        ids = [t for n in range(count) for t in ([config.image_token_id] + [BREAK] * ((n + 1) % breaks == 0))][:-1]
    found = families()[config.model_type].images(Prompt(config, torch.tensor([ids]), out, processor, sizes))
    return [layout for _, layout in found]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(CASES))
def test_tokens_look_where_the_layout_says(name, size):
    config, processor, out, seen, breaks = CASES[name](size)
    assert config.model_type == family_of_case(name)
    count = 2 if "two images" in name else 1
    found = layouts(config, processor, out, len(seen), breaks, [size] * count)
    assert len(found) == count
    kind = torch.cat([layout.kind for layout in found])
    center = torch.cat([layout.center for layout in found])
    if breaks:
        rows = found[0].extent[1]
        assert (kind == NEWLINE).sum() == rows - 1 and len(kind) == len(seen) + rows - 1
        kind, center = kind[kind != NEWLINE], center[kind != NEWLINE]
    else:
        assert ((seen == MARK).all(1) == (kind == NEWLINE)).all()
    whole = (seen[:, 2] > 0.99) & (kind != NEWLINE)  # no padding in it
    assert whole.sum() > len(seen) // 8
    assert (kind[whole] == PATCH).all()
    # Half a pixel of the processed picture is what resampling may shift, and colours are rounded.
    error = (seen[whole, :2] - center[whole]).abs().max()
    assert error < 0.015, error


ON_GRIDS = [name for name in CASES if families()[family_of_case(name)].images.__module__ == "crop.models.grids"]


@pytest.mark.parametrize("name", [*ON_GRIDS, "pixtral"])
def test_pictures_have_odd_numbers_of_rows_and_columns(name):
    grids = []
    for size in SIZES:
        config, processor, out, seen, breaks = CASES[name](size)
        grids.append(layouts(config, processor, out, len(seen), breaks, [size])[0])
    rows, columns = (
        [int(getattr(grid, axis)[grid.kind == PATCH].max()) + 1 for grid in grids] for axis in ("row", "col")
    )
    assert any(count % 2 for count in rows) and any(count % 2 for count in columns) and rows != columns


def test_a_patch_that_goes_into_no_token_is_noticed():
    """A layout that spreads LightOnOCR's tokens over the whole picture is wrong by a patch at its far side."""
    odd = 0
    for size in SIZES:
        *_, out, seen, _ = CASES["lighton_ocr"](size)
        height, width = (int(side) for side in out["image_sizes"][0])
        whole = VisionLayout.grid(height // 14, width // 14).center
        odd += width % 14 > 0 and bool((seen[:, 0] - whole[:, 0]).abs().max() > 0.015)
    assert odd == len(SIZES)


@pytest.mark.parametrize("name", ["llava_next", "internvl", "idefics3"])
def test_a_wrong_size_is_noticed(name):
    """The check above can fail: the layout of another picture is not this one's."""
    config, processor, out, seen, breaks = CASES[name]((500, 300))
    other = dict(out)
    if name == "llava_next":
        other["image_sizes"] = torch.tensor([[300, 440]])
    if name == "idefics3":
        other |= {"rows": out["cols"], "cols": out["rows"]}
    try:
        (layout,) = layouts(config, processor, other, len(seen), breaks, [(300, 500)])
    except ValueError as error:
        assert "whole images of the grids" in str(error)
        return
    patches = layout.kind == PATCH
    assert (seen[patches, :2] - layout.center[patches]).abs().max() > 0.05
