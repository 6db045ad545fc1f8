"""The layer figure: what is in it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from crop.geometry.layout import VisionLayout
from crop.geometry.region import Region
from crop.methods import PreLLMCompression

pytest.importorskip("matplotlib")
from bench.figure import layer_figure  # noqa: E402


def test_layer_figure_counts_the_tokens(tmp_path):
    layout, region = VisionLayout.grid(8, 8), Region.box(0, 0, 0.5, 0.25)
    plan = PreLLMCompression(keep=24).plan(layout, region)
    kept = plan.leader.long()[:10]
    image = Image.new("RGB", (64, 64), (200, 200, 220))
    figure = layer_figure(image, layout, plan, {4: kept, 0: None}, region, num_layers=8, title="why")
    texts = [(axes.get_title(), axes.get_xlabel()) for axes in figure.axes]
    assert [title for title, _ in texts] == ["image", "layers 0 to 3", "layers 4 to 7"]
    assert texts[0][1] == "64 tokens"
    assert texts[1][1].startswith("24 tokens\n") and texts[2][1].startswith("10 tokens\n")
    assert "dropped" not in texts[1][1] and "dropped" in texts[2][1]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"region", "ring", "dropped"} <= set(labels)
    figure.savefig(tmp_path / "figure.svg")
    with pytest.raises(ValueError, match="begin at layer 0"):
        layer_figure(image, layout, plan, {4: kept})


def test_layer_figure_shows_every_view():
    grid = VisionLayout.grid(4, 4)
    twice = VisionLayout(
        position=torch.arange(32), center=grid.center.repeat(2, 1), row=grid.row.repeat(2), col=grid.col.repeat(2),
        view=torch.arange(2, dtype=torch.int32).repeat_interleave(16), kind=grid.kind.repeat(2), num_original=32,
    )  # fmt: skip
    figure = layer_figure(Image.new("RGB", (32, 32)), twice, None, {0: None, 2: torch.arange(20)}, num_layers=4)
    below = [axes.get_xlabel() for axes in figure.axes]
    assert [text.split("\n")[0] for text in below] == ["32 tokens", "16 tokens", "16 tokens"] + [
        "32 tokens", "16 tokens", "4 tokens"]  # fmt: skip
