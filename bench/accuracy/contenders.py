"""What is compared: a method, where its region comes from, and how its budget is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from PIL import Image
from torch import nn

from bench.accuracy.canvas import Box, CornerOnly, ZoomOnly, shrink, unshrink, unzoom, zoom
from bench.accuracy.trio import Probe, Trio
from bench.methods import others
from bench.pictures import BUDGETS
from crop.geometry.layout import VisionLayout
from crop.geometry.pooling import PoolPlan
from crop.geometry.region import Region
from crop.methods import Compose, DiverseCompression, InnerLLMPruning, Method, PreLLMCompression, Selection
from crop.methods.registry import POOL_SHARE
from crop.models import family_of

DOWNSAMPLED = "down-sampled image"
CUT = 2  # decoder layer at whose input the rows that only drop inside the decoder do, unless told otherwise
REGIONS = {"oracle": "oracle", "predicted": "predicted", "shifted": "shifted", "no region": "none"}  # of ours, by name
# Fraction of the tokens averaged over the layers, number of layers -> method; None: that budget cannot be met.
Make = Callable[[float, int], Method | None]


@dataclass(frozen=True)
class Contender:
    """One row.

    Args:
        name: of the row.
        region: "none", "oracle", "predicted" or "shifted" (the true one, moved by its own size).
        average: budget and depth -> the method that meets it on average over the layers.
        kept: the same -> the method that meets it after its last cut; None where that is the same thing.
        prepare: (picture, budget, region, tokens per side) -> what the processor sees.
        back: (box there, budget, region, tokens per side) -> box in the picture.
        ours: drawn apart in the plots.
    """

    name: str
    region: str
    average: Make
    kept: Make | None = None
    prepare: Callable[[Image.Image, float, Region, int], Image.Image] | None = None
    back: Callable[[Box, float, Region, int], Box] | None = None
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


def _average(method: Method, layers: int) -> float:
    """Fraction of the tokens that a layer sees on average; by the methods' own fractions, before they are rounded."""
    borders = [0, *(cut.layer for cut in method.cuts), layers]
    kept = [1.0, *(cut.keep for cut in method.cuts)]
    return (
        sum((stop - start) * keep for start, stop, keep in zip(borders[:-1], borders[1:], kept, strict=True)) / layers
    )


def inner(name: str, region: str, kept: Make, ours: bool = False) -> Contender:
    """A row of a method that drops inside the decoder."""
    return Contender(name, region, _inner(kept), kept, ours=ours)


def both_of(pool: float, keep: float, cut: int) -> Method:
    """Ours at both stages, pooling to ``pool``."""
    return Compose(DiverseCompression(pool), InnerLLMPruning(keep, layer=cut))


def _both(name: str, region: str, cut: int) -> Contender:
    def average(budget: float, layers: int) -> Method | None:
        keep = _largest(lambda keep: (cut * keep**POOL_SHARE + (layers - cut) * keep) / layers <= budget)
        return None if keep is None else both_of(keep**POOL_SHARE, keep, cut)

    return Contender(name, region, average, lambda b, _: both_of(b**POOL_SHARE, b, cut), ours=True)


def default_cut(model: nn.Module) -> int:
    """The layer at which a model's tokens leave by default."""
    family = family_of(model)
    return family.default_layer(family.language_model(model).config)


def contenders(cut: int = CUT, model: nn.Module | None = None) -> list[Contender]:
    """All rows but the unpruned one.

    Args:
        cut: decoder layer of the rows that only drop at one layer and leave it open; "both" cuts where the model says.
        model: also for the row that takes gradients; None: without that row, and "both" at ``cut``.
    """
    own = cut if model is None else default_cut(model)
    rows = [Contender(DOWNSAMPLED, "none", lambda b, _: CornerOnly(b), prepare=shrink, back=unshrink)]
    for name in list(REGIONS)[:3]:
        rows.append(Contender(f"zoom, {name}", REGIONS[name], lambda b, _: ZoomOnly(b), prepare=zoom, back=unzoom))
    for name, make in others().items():
        if make(0.5, 8).cuts:
            rows.append(inner(name, "none", lambda keep, layers, make=make: make(keep, layers).with_layer(cut)))
        else:
            rows.append(Contender(name, "none", make))
    if model is not None:
        probe = Probe(model, cut - 1)
        rows.append(inner("trio", "none", lambda keep, _: Trio(keep, layer=cut, probe=probe)))
    for name, region in REGIONS.items():
        rows += [
            inner(f"ILP, {name}", region, lambda keep, _: InnerLLMPruning(keep, layer=cut), ours=True),
            Contender(f"PLC, {name}", region, lambda b, _: PreLLMCompression(keep=b), ours=True),
            Contender(f"diverse, {name}", region, lambda b, _: DiverseCompression(b), ours=True),
            _both(f"both, {name}", region, own),
        ]
    plain = partial(PreLLMCompression, mode="mean")
    whole = _both("both, predicted, whole stays whole", "predicted", own)
    return [
        *rows,
        Contender("PLC, predicted, plain means", "predicted", lambda b, _: plain(keep=b), ours=True),
        replace(whole, average=lambda b, n: WholeStaysWhole(_both("", "", own).average(b, n)), kept=None),
    ]


def jobs(
    num_layers: int,
    budgets: tuple[float, ...] = BUDGETS,
    names: tuple[str, ...] | None = None,
    *,
    cut: int = CUT,
    kept: bool = False,
    model: nn.Module | None = None,
) -> list[Job]:
    """Every contender at every budget that it can meet on average over the layers, unpruned first.

    Args:
        num_layers: decoder layers. budgets: fractions of the image's tokens. names: only these rows.
        cut, model: as for ``contenders``. kept: also every row that meets the budget after its last cut only.
    Raises:
        ValueError: unknown name.
    """
    found = [Job(Contender("unpruned", "none", lambda b, n: None), 1.0, "", None)]
    strict = InnerLLMPruning(mode="strict", layer=cut)
    for region in ("oracle", "predicted"):
        found.append(Job(Contender(f"ILP strict, {region}", region, lambda b, n: None, ours=True), 0.0, "", strict))
    for row in contenders(cut, model):
        for budget in budgets:
            method = row.average(budget, num_layers)
            if method is not None:
                found.append(Job(row, budget, "average", method))
            if kept and row.kept is not None:
                found.append(Job(row, budget, "kept", row.kept(budget, num_layers)))
    if names is None:
        return found
    unknown = set(names) - {job.contender.name for job in found}
    if unknown:
        raise ValueError(
            f"jobs: names must be among {sorted({j.contender.name for j in found})}, got {sorted(unknown)}"
        )
    return [job for job in found if job.contender.name in (*names, "unpruned")]
