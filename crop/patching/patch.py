"""Apply a pruning method to an unmodified Hugging Face model for the length of a ``with`` block.

``crop.planner`` plans every call from its token ids; the hooks of ``crop.doors`` carry the plan out. Tokens keep their
original position ids. Outputs come back at the unpruned length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import nn

from crop.geometry.region import Region
from crop.methods.base import Method
from crop.patching.context import Block
from crop.patching.hooks.entry import Calls
from crop.patching.hooks.pooling import PoolingDoor
from crop.patching.hooks.pruning import PruningDoor
from crop.patching.planner import Planner
from crop.patching.stats import PruneStats

_patched: set[nn.Module] = set()


@contextmanager
def patch(
    model: nn.Module,
    method: Method | None,
    region: Region | Sequence[Region] | None = None,
    *,
    processor: Any = None,
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    positions: Literal["original", "centroid", "compact"] = "original",
    cache: Literal["ragged", "uniform"] = "ragged",
    auto: bool = False,
    readmit: bool = False,
) -> Iterator[PruneStats]:
    """Prune vision tokens in every prefill inside the block; decode and later turns follow.

    Args:
        model: unmodified Hugging Face vision-language model of a supported family.
        method: what to prune, e.g. ``Compose(PreLLMCompression(), InnerLLMPruning())``. None prunes nothing, and lets a
            cache that was pruned earlier be used.
        region: where the question looks: one Region per image or video, in prompt order over the whole batch; one alone
            serves a single image. None: every image whole.
        processor: the model's processor (or image processor). Needed by families whose token geometry it decides
            unless every region is whole.
        image_size: (width, height) of the original image, pixels, or one per image. Needed where the processor crops,
            pads or cuts into tiles.
        positions: "original": every token keeps its position ids, a pooled one takes those of its cell's leader;
            "centroid": a pooled token takes the mean of its cell; "compact": what is left is renumbered without gaps,
            from the layer on where tokens leave, and text follows.
        cache: "ragged": layers before a cut keep the keys and values of all tokens; "uniform": after a prefill they keep
            those of the tokens that are left at the end, so that all layers are equally long and static caches work.
        auto: leave a prefill unpruned where pruning is predicted not to pay (``estimate``; ``stats.estimate`` tells). The
            model then runs by itself. Where an image is cut into tiles, only a plan tells how many images there are: of a
            prefill that is left alone without one, a wrong number of regions shows up in ``stats``.
        readmit: remember the conversation as it was before the first cut (``crop.readmit`` states the cost). The first
            call of another such block on the same cache then cuts all of it anew, as a fresh run would: ``region`` is one
            per image of the whole conversation, and tokens that were pruned earlier may come back.
    Yields:
        PruneStats, filled by each prefill.
    Raises:
        TypeError: not a Hugging Face model; method or region of a wrong type.
        ValueError: unknown family, no vision, layer out of range, number of regions other than of images, missing
            processor or image size, unsupported attention mask or cache. Raised before anything runs on the model.
        RuntimeError: the model is patched already; transformers is too old.
    """
    planner = Planner(model, method, region, processor, image_size, positions=positions, cache=cache, readmit=readmit)
    if readmit and auto:
        raise ValueError("patch: auto must be False with readmit, got True: the first prefill must make the cut")
    refuse_patched(planner.language_model)
    block = Block.of(planner)
    with ExitStack() as undo:
        _patched.add(planner.language_model)
        undo.callback(_patched.discard, planner.language_model)
        Calls(block, (PoolingDoor, PruningDoor), auto).install(undo)
        yield block.stats


def refuse_patched(language_model: nn.Module) -> None:
    """A second block on a model would see the first one's tokens.

    Raises:
        RuntimeError: the model is patched already.
    """
    if language_model in _patched:
        raise RuntimeError("patch: model must not be patched already, got a nested patch of the same model")
