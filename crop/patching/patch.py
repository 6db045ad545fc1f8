"""Apply a pruning method to an unmodified Hugging Face model for the length of a ``with`` block.

The planner decides from the token ids of every call what is pruned; the hooks carry it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import nn

from crop.geometry.region import Region
from crop.methods.base import Method
from crop.patching.context import PatchContext
from crop.patching.current import CALL, GENERATION
from crop.patching.hooks import EntryHook, PoolingHook, PruningHook
from crop.patching.planner import Planner
from crop.patching.stats import PruneStats

_patched: set[nn.Module] = set()

GONE = {
    "auto": "gone since 0.2; ask first: `if crop.estimate(model, inputs, method, region).prune:`",
    "readmit": "gone since 0.2; give the whole conversation to a fresh cache inside crop.cache_vision(model)",
}


@contextmanager
def patch(
    model: nn.Module,
    method: Method | None,
    region: Region | Sequence[Region | None] | None = None,
    *,
    processor: Any = None,
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    positions: Literal["original", "compact"] = "original",
    cache: Literal["ragged", "uniform"] = "ragged",
    **gone: Any,
) -> Iterator[PruneStats]:
    """Prune vision tokens in every prefill inside the block; decode and later turns follow.

    Any number of threads, and calls inside calls, may use the model inside one block.

    Args:
        model: unmodified Hugging Face vision-language model of a supported family.
        method: what to prune, e.g. ``Compose(PreLLMCompression(), InnerLLMPruning())``. None prunes nothing, and lets a
            cache that was pruned earlier be used.
        region: where the question looks: one Region per image or video, in prompt order over the whole batch, None for a
            whole one; one alone serves a single image. None: every image whole.
        processor: the model's processor (or image processor), as it was called: options of a call must be set on it.
            Needed by families whose token geometry it decides, unless every region is whole.
        image_size: (width, height) of the original image, pixels, or one per image. Needed where that processor crops,
            pads or cuts into tiles.
        positions: "original": every token keeps its position ids, a pooled one takes those of its cell's leader;
            "compact": what is left is renumbered without gaps, from the layer on where tokens leave, and text follows.
            A model that reads places from positions may lose its answers by that: the embedded one does.
        cache: "ragged": layers before a cut keep the keys and values of all tokens; "uniform": after a prefill they keep
            those of the tokens that are left at the end, so that all layers are equally long and static caches work.
    Yields:
        PruneStats, one entry per prefill.
    Raises:
        TypeError: not a Hugging Face model; method or region of a wrong type; an unknown argument.
        ValueError: unknown family, no vision, layer out of range, number of regions other than of images, missing
            processor or image size, unsupported attention mask or cache. Raised before the language model runs; before
            anything runs, but for what the method's own ``plan`` and ``select`` refuse.
        RuntimeError: the model is patched already; transformers is too old.
    """
    for name in gone:
        raise TypeError(f"patch: {name} is {GONE.get(name, 'no argument of patch')}")
    planner = Planner(model, method, region, processor, image_size, positions=positions, cache=cache)
    refuse_patched(planner.language_model)
    context = PatchContext(planner)
    with ExitStack() as undo:
        for innermost in (CALL, GENERATION):  # an interrupt may leave an inner one
            undo.callback(innermost.set, innermost.get())
        _patched.add(planner.language_model)
        undo.callback(_patched.discard, planner.language_model)
        for kind in (EntryHook, PoolingHook, PruningHook):
            kind(context).install(undo)
        yield context.stats


def refuse_patched(language_model: nn.Module) -> None:
    """A second block on a model would see the first one's tokens.

    Raises:
        RuntimeError: the model is patched already.
    """
    if language_model in _patched:
        raise RuntimeError("patch: model must not be patched already, got a nested patch of the same model")
