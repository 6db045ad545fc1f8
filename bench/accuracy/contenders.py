"""What is compared: a method, where its region comes from, and how its budget is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from bench.methods import others
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods import Compose, InnerLLMPruning, Method, PreLLMCompression, Selection
from crop.methods.registry import POOL_SHARE

BUDGETS = (0.5, 0.33, 0.22, 0.11, 0.055)
DOWNSAMPLED = "down-sampled image"
CUT = 2  # decoder layer at whose input inner pruning drops tokens
# Fraction of the tokens averaged over the layers, number of layers -> method; None: that budget cannot be met.
Make = Callable[[float, int], Method | None]


@dataclass(frozen=True)
class Contender:
    """One row.

    Args:
        name: of the row.
        region: "none", "oracle" or "predicted".
        average: budget and depth -> the method that meets it on average over the layers.
        kept: the same -> the method that meets it after its last cut; None where that is the same thing.
        prepare: changes the picture before the processor sees it.
        ours: drawn apart in the plots.
    """

    name: str
    region: str
    average: Make
    kept: Make | None = None
    prepare: Callable[[Image.Image, float], Image.Image] | None = None
    ours: bool = False


@dataclass(frozen=True)
class Job:
    """One contender at one budget, counted in one way: "average", "kept", or "" where there is no budget."""

    contender: Contender
    budget: float
    counted: str
    method: Method | None

    @property
    def key(self) -> str:
        return f"{self.contender.name}|{self.budget:g}|{self.counted}"


@dataclass(frozen=True)
class WholeStaysWhole(Method):
    """A method that prunes nothing where the localizer fell back on the whole image.

    Args:
        inner: applied to all other images.
    Source: own choice.
    """

    inner: Method

    @property
    def layer(self) -> int | Literal["auto"] | None:
        return self.inner.layer

    def with_layer(self, default: int) -> WholeStaysWhole:
        return replace(self, inner=self.inner.with_layer(default))

    @property
    def rows(self) -> str:
        return self.inner.rows

    @property
    def pool_mode(self) -> str:
        return self.inner.pool_mode

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | None:
        return None if region.is_whole else self.inner.plan(layout, region)

    def select(self, layout: VisionLayout, region: Region) -> Selection | None:
        return None if region.is_whole else self.inner.select(layout, region)


@dataclass(frozen=True)
class CornerOnly(Method):
    """Keep the tokens of the upper left corner, where ``shrink`` put the whole image.

    Args:
        keep: fraction of the tokens at most.
    """

    keep: float

    def plan(self, layout: VisionLayout, region: Region) -> PoolPlan | None:
        side = math.sqrt(self.keep)
        _, height, width = layout.extent
        inside = (layout.row < max(1, int(side * height))) & (layout.col < max(1, int(side * width)))
        label = layout.row.long() * width + layout.col
        return PoolPlan.from_labels(
            label.masked_fill(~inside, -1), layout.row, layout.col, inside.to(label.dtype).byte()
        )


def shrink(image: Image.Image, keep: float, grid: int = 16) -> Image.Image:
    """The image at a lower resolution in the corner of a canvas of its old size: down-sampling for a fixed token grid.

    Args:
        keep: fraction of the tokens at most. grid: tokens per side; the small image fills whole tokens.
    """
    share = max(1, int(math.sqrt(keep) * grid)) / grid
    small = image.resize([max(1, round(side * share)) for side in image.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", image.size)
    canvas.paste(small)
    return canvas


def _largest(fits: Callable[[float], bool]) -> float | None:
    """The largest fraction that fits, by bisection; None: not even a hundredth does."""
    low, high = 0.01, 1.0
    if not fits(low):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _inner(make: Make) -> Make:
    """Budget of a method that drops inside the decoder, from its average: the layers before a cut hold more."""

    def average(budget: float, layers: int) -> Method | None:
        keep = _largest(lambda keep: _average(make(keep, layers), layers) <= budget)
        return None if keep is None else make(keep, layers)

    return average


def _at_cut(make: Make) -> Make:
    """The same, its cut at the layer of all rows where it leaves the layer to the family."""
    return lambda keep, layers: make(keep, layers).with_layer(CUT)


def _average(method: Method, layers: int) -> float:
    """Fraction of the tokens that a layer sees on average; by the methods' own fractions, before they are rounded."""
    borders = [0, *(cut.layer for cut in method.cuts), layers]
    kept = [1.0, *(cut.keep for cut in method.cuts)]
    return (
        sum((stop - start) * keep for start, stop, keep in zip(borders[:-1], borders[1:], kept, strict=True)) / layers
    )


def _ilp(keep: float, layers: int) -> Method:
    return InnerLLMPruning(keep, layer=CUT)


def crop_both(pool: float, keep: float) -> Method:
    return Compose(PreLLMCompression(keep=pool), InnerLLMPruning(keep, layer=CUT))


def _both_kept(budget: float, layers: int) -> Method:
    return crop_both(budget**POOL_SHARE, budget)


def _both_average(budget: float, layers: int) -> Method:
    def average(keep: float) -> float:
        return (CUT * keep**POOL_SHARE + (layers - CUT) * keep) / layers

    keep = _largest(lambda keep: average(keep) <= budget)
    return crop_both(keep**POOL_SHARE, keep)


def contenders() -> list[Contender]:
    """All rows but the unpruned one."""
    rows = [
        Contender(DOWNSAMPLED, "none", lambda b, _: CornerOnly(b), prepare=shrink),
    ]
    for name, make in others().items():
        if make(0.5, 8).cuts:
            made = _at_cut(make)
            rows.append(Contender(name, "none", _inner(made), made))
        else:
            rows.append(Contender(name, "none", make))
    for region in ("oracle", "predicted"):
        rows += [
            Contender(f"ILP, {region}", region, _inner(_ilp), _ilp, ours=True),
            Contender(f"PLC, {region}", region, lambda b, _: PreLLMCompression(keep=b), ours=True),
            Contender(f"both, {region}", region, _both_average, _both_kept, ours=True),
        ]
    rows.append(
        Contender(
            "PLC, predicted, plain means",
            "predicted",
            lambda b, _: PreLLMCompression(keep=b, mode="mean"),
            ours=True,
        )
    )
    rows.append(
        Contender(
            "both, predicted, whole stays whole",
            "predicted",
            lambda b, n: WholeStaysWhole(_both_average(b, n)),
            ours=True,
        )
    )
    return rows


def jobs(num_layers: int, budgets: tuple[float, ...] = BUDGETS, names: tuple[str, ...] | None = None) -> list[Job]:
    """Every contender at every budget that it can meet, unpruned first.

    Args:
        num_layers: decoder layers. budgets: fractions of the image's tokens. names: only these rows.
    Raises:
        ValueError: unknown name.
    """
    nothing = Contender("unpruned", "none", lambda b, n: None)
    strict = [
        Contender(f"ILP strict, {region}", region, lambda b, n: None, ours=True) for region in ("oracle", "predicted")
    ]
    found = [Job(nothing, 1.0, "", None)]
    found += [Job(row, 0.0, "", InnerLLMPruning(mode="strict", layer=CUT)) for row in strict]
    for row in contenders():
        for budget in budgets:
            method = row.average(budget, num_layers)
            if method is not None:
                found.append(Job(row, budget, "average", method))
            if row.kept is not None:
                found.append(Job(row, budget, "kept", row.kept(budget, num_layers)))
    if names is None:
        return found
    unknown = set(names) - {job.contender.name for job in found}
    if unknown:
        raise ValueError(
            f"jobs: names must be among {sorted({j.contender.name for j in found})}, got {sorted(unknown)}"
        )
    return [job for job in found if job.contender.name in (*names, "unpruned")]
