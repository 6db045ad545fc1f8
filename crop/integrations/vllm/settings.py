"""What holds for a whole engine: ``hf_overrides={"crop": {...}}``, which reaches every process, workers of other machines too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from crop.methods.base import POOL_MODES, PoolMode, check_choice, check_keep
from crop.patching.positions import POLICIES, Policy

NO_ONE = "not the integer 1, which JSON writers make of 1.0, too: 1.0 (or 0.999999) prunes nothing, 0.000001 leaves one token"
LOCALIZERS = ("ocr",)  # those that need nothing of the model, which runs in other processes
GIB = 1 << 30


@dataclass(frozen=True)
class Settings:
    """Settings of an engine.

    Args:
        keep: budget of requests that bring a region, or a localizer, and no budget: a fraction, or a number of tokens from 2 on.
        mode: how a cell is pooled, see ``PreLLMCompression``.
        localizer: finds the regions of images for which a request says nothing; None: they stay whole.
        positions: "original": tokens keep their place in the unpruned prompt; "compact": no gaps.
        feature_cache: GiB of vision features that are kept for further questions about an image; 0: none are.
    Raises:
        TypeError, ValueError: a value out of its range.
    """

    keep: float | int = 0.33
    mode: PoolMode = "distinct"
    localizer: str | None = None
    positions: Policy = "original"
    feature_cache: float = 0.25

    def __post_init__(self) -> None:
        check_keep("crop", self.keep)
        if isinstance(self.keep, Integral) and self.keep == 1:
            raise ValueError(f"crop: keep must be {NO_ONE}; got {self.keep!r}")
        check_choice("crop", "mode", self.mode, POOL_MODES)
        check_choice("crop", "positions", self.positions, POLICIES)
        if self.localizer is not None:
            check_choice("crop", "localizer", self.localizer, LOCALIZERS)
        limit = self.feature_cache
        if isinstance(limit, bool) or not isinstance(limit, Real) or not 0 <= limit < float("inf"):
            raise ValueError(f"crop: feature_cache must be a number of GiB from 0 on, got {limit!r}")

    @property
    def feature_bytes(self) -> int:
        """Limit of the feature cache."""
        return int(self.feature_cache * GIB)

    @staticmethod
    def of(config: Any) -> Settings:
        """Those that a model's configuration carries. ValueError: not a mapping, or an unknown name in it."""
        given = getattr(config, "crop", None)
        if given is None:
            return Settings()
        known = [field.name for field in fields(Settings)]
        if not isinstance(given, Mapping):
            raise ValueError(f"crop: hf_overrides['crop'] must be a mapping of {', '.join(known)}, got {given!r}")
        for name in given:
            if name not in known:
                raise ValueError(f"crop: hf_overrides['crop'] must name {', '.join(known)}, got {name!r}")
        return Settings(**given)
