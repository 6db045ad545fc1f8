"""LLaVA-NeXT and LLaVA-OneVision: pictures so thin that unpadding leaves no row or no column of the tiles."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from crop.geometry import Region
from crop.methods import InnerLLMPruning, PreLLMCompression
from crop.models.anyres import anyres_layout

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CONFIG = SimpleNamespace(image_grid_pinpoints=PINPOINTS, vision_config=SimpleNamespace(image_size=336, patch_size=14))


@pytest.mark.fast
@pytest.mark.parametrize(
    "size,tokens", [((2000, 20), 576), ((20, 2000), 576 + 72), ((400, 1), 576), ((1, 400), 576 + 48)]
)
def test_the_base_view_and_newlines_are_left(size, tokens):
    """(width, height): the tokens that the model itself makes of such pictures; methods cope with rows without patches."""
    layout = anyres_layout(CONFIG, size[::-1])
    assert len(layout) == layout.num_original == tokens
    assert layout.position.tolist() == list(range(tokens))
    for region in (Region.whole(), Region.box(0.1, 0.1, 0.4, 0.4)):
        assert PreLLMCompression(keep=64).plan(layout, region).num_out == 64
        assert InnerLLMPruning(keep=32).select(layout, region).num_keep == 32
