"""What a request asks for: the keys of ``mm_processor_kwargs`` that begin with ``crop_``, checked, one entry per image."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from crop.geometry.region import Region
from crop.integrations.vllm.settings import LOCALIZERS, NO_ONE, Settings
from crop.methods.base import POOL_MODES, check_choice
from crop.methods.plc import PreLLMCompression

KEYS = ("crop_region", "crop_keep", "crop_mode", "crop_localizer", "crop_question")
NOT_OURS = ("crop_size", "crop_to_patches", "crop_pct")  # arguments of image processors
MOST_TOKENS = 1 << 24
MOST_BOXES = 64  # of one image: geometry costs boxes x tokens, and the front process plans for everybody
LONGEST_QUESTION = 4096  # characters
BOX = "[x0, y0, x1, y1] in fractions of width and height, or a list of such"


@dataclass(frozen=True)
class ImageRequest:
    """One image that is to be pruned: ``region`` None until a localizer has found it."""

    method: PreLLMCompression
    region: Region | None

    @property
    def identity(self) -> str:
        """Equal for equal plans of one picture, different else."""
        boxes = [list(box) for box in self.region.boxes]
        return json.dumps([repr(self.method.keep), self.method.mode, boxes])


@dataclass(frozen=True)
class Request:
    """A checked request.

    Args:
        images: one entry per image, None where it stays whole.
        localizer: its name, where the regions are to be found. question: what it is asked; None: the prompt.
    """

    images: tuple[ImageRequest | None, ...]
    localizer: str | None = None
    question: str | None = None

    def located(self, find: Callable[[int], Region]) -> Request:
        """The same request with the regions that ``find`` gives for the images, by number."""
        found = (None if image is None else ImageRequest(image.method, find(n)) for n, image in enumerate(self.images))
        return Request(tuple(found))


def own_keys(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``mm_processor_kwargs`` is meant for this package."""
    return {name: value for name, value in arguments.items() if _is_own(name)}


def without_own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is meant for the model's processor, and what the processor itself hands on."""
    return {name: value for name, value in arguments.items() if not _is_own(name)}


def _is_own(name: str) -> bool:
    return name.startswith("crop_") and name not in NOT_OURS


def parse(arguments: Mapping[str, Any], count: int, settings: Settings) -> Request:
    """Check a request of ``count`` images.

    Args:
        arguments: ``mm_processor_kwargs``. ``crop_region``: one box for the only image, or a list with one entry per
            image: None (whole), a box or several boxes. ``crop_keep``: fraction of an image's tokens, or their number, from 2 on.
            ``crop_mode``: how a cell is pooled. ``crop_localizer``, ``crop_question``: see ``Request``.
    Raises:
        ValueError: requirement and value of what is wrong; nothing else is ever raised.
    """
    given = own_keys(arguments)
    for name in given:
        if name not in KEYS:
            raise ValueError(f"crop: arguments must be among {', '.join(KEYS)}, got {_short(name)}")
    region, keep, localizer = (given.get(f"crop_{name}") for name in ("region", "keep", "localizer"))
    question, mode = given.get("crop_question"), given.get("crop_mode", settings.mode)
    if not count and any(value is not None for value in (region, keep, localizer)):
        raise ValueError("crop: images must come with crop_region, crop_keep and crop_localizer, got a prompt without")
    method = _method(settings.keep if keep is None else keep, mode)
    if localizer is not None:
        if region is not None:
            raise ValueError("crop: crop_region must come without crop_localizer, got both")
        _choice("crop_localizer", localizer, LOCALIZERS)
    elif region is None and keep is None:
        localizer = settings.localizer
    if question is not None and not (isinstance(question, str) and 0 < len(question) <= LONGEST_QUESTION):
        raise ValueError(
            f"crop: crop_question must be a text of 1 to {LONGEST_QUESTION} characters, got {_short(question)}"
        )
    if isinstance(method.keep, float) and method.keep == 1.0:
        _regions(region, count)
        return Request((None,) * count)
    if localizer is not None and count:
        return Request((ImageRequest(method, None),) * count, localizer, question)
    if region is None and keep is None:
        return Request((None,) * count)
    return Request(tuple(ImageRequest(method, one) for one in _regions(region, count)))


def _method(keep: Any, mode: Any) -> PreLLMCompression:
    _choice("crop_mode", mode, POOL_MODES)
    if isinstance(keep, int) and abs(keep) > MOST_TOKENS:
        raise ValueError(f"crop: crop_keep as a token count must be in [1, {MOST_TOKENS}], got {_short(keep)}")
    if isinstance(keep, int) and not isinstance(keep, bool) and keep == 1:
        raise ValueError(f"crop: crop_keep must be {NO_ONE}; got {_short(keep)}")
    try:
        return PreLLMCompression(keep=keep, mode=mode)
    except (TypeError, ValueError) as error:
        text = str(error).partition("keep ")[2].partition(", got")[0]
        raise ValueError(f"crop: crop_keep {text}, got {_short(keep)}") from None


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    check_choice("crop", name, value if isinstance(value, str) and len(value) < 32 else _short(value), choices)


def _regions(given: Any, count: int) -> list[Region]:
    """One per image."""
    if given is None:
        return [Region.whole()] * count
    if not _is_list(given):
        raise ValueError(f"crop: crop_region must be {BOX}, one per image, got {_short(given)}")
    if given and all(isinstance(value, Real) for value in given):
        given = [given]
    if len(given) != count:
        raise ValueError(f"crop: crop_region must have one entry per image, got {len(given)} for {count} images")
    return [Region.whole() if entry is None else _region(entry) for entry in given]


def _region(entry: Any) -> Region:
    """Of a box or a list of boxes."""
    boxes = [entry] if _is_list(entry) and entry and not any(map(_is_list, entry)) else entry
    wrong = ValueError(f"crop: crop_region must be {BOX}, got {_short(entry)}")
    if not _is_list(boxes) or not boxes:
        raise wrong
    if len(boxes) > MOST_BOXES:
        raise ValueError(f"crop: crop_region must have at most {MOST_BOXES} boxes per image, got {len(boxes)}")
    for box in boxes:
        numbers = _is_list(box) and len(box) == 4
        if not numbers or any(isinstance(side, bool) or not isinstance(side, Real) for side in box):
            raise wrong
    try:
        return Region(tuple(tuple(map(float, box)) for box in boxes))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"crop: crop_region: {error}") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _short(value: Any) -> str:
    """What stands in an error text, whatever a client sent."""
    try:
        text = reprlib.repr(value)
        return text if len(text) <= 100 else f"{text[:97]}..."
    except ValueError:  # an integer of more digits than Python writes
        return f"a value of type {type(value).__name__}"
