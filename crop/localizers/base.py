"""The role of a localizer, the two that look at nothing, and how a question is put to a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from crop.geometry.region import Region

if TYPE_CHECKING:
    from PIL.Image import Image


class Localizer(Protocol):
    """The role: what part of ``image`` does ``question`` need?"""

    def __call__(self, image: Image, question: str) -> Region: ...


@dataclass(frozen=True)
class BoxLocalizer:
    """The region that the caller knows already ("box"), for every question: a user's selection, an annotation."""

    region: Region

    def __call__(self, image: Image, question: str) -> Region:
        return self.region


@dataclass(frozen=True)
class WholeLocalizer:
    """The whole image ("whole"): pruning is then led by attention alone."""

    def __call__(self, image: Image, question: str) -> Region:
        return Region.whole()


# In a block of ``shared_encoding``: the image and the rest that was encoded last, and what came of it; or nothing yet.
_last: ContextVar[list[tuple[Image, tuple, Any]] | None] = ContextVar("last encoding", default=None)


@contextmanager
def shared_encoding() -> Iterator[None]:
    """Run the processor once where the same image, question and prompt are encoded again inside the block."""
    token = _last.set([])
    try:
        yield
    finally:
        _last.reset(token)


def encode(
    processor: Any, image: Image | list[Image], question: str, prompt: Callable[[str], str] | None = None
) -> Any:
    """Model inputs for one question and its image, or images; inside ``cache_vision`` equal ones are made once.

    Args:
        image: RGB; several in the order of the prompt, such as those of ``crop.zoom``.
        prompt: question -> the full text with a placeholder per image; default: the processor's chat
            template, one user turn.
    Returns:
        What the processor makes of it, on the CPU.
    Raises:
        ValueError: no prompt, and the processor has no chat template, or one that fails.
    """
    last, asked = _last.get(), (processor, prompt, question)
    if last and last[0][0] is image and last[0][1] == asked:
        return copy.copy(last[0][2])
    if prompt is not None:
        text = prompt(question)
    elif getattr(processor, "chat_template", None):
        text = chat(processor, question, images=len(image) if isinstance(image, list) else 1)
    else:
        raise ValueError("encode: prompt must be given for a processor without a chat template, got None")
    inputs = processor(images=image, text=text, return_tensors="pt", **begin_once(processor, text))
    if last is not None:
        last[:] = [(image, asked, copy.copy(inputs))]  # moving inputs to a device writes into what is moved
    return inputs


def blank(processor: Any, size: tuple[int, int], prompt: Callable[[str], str] | None = None) -> Any:
    """As ``encode``, of a picture of (width, height) that shows nothing, and no question."""
    from PIL import Image

    with shared_encoding():
        return encode(processor, Image.new("RGB", size, "gray"), "", prompt)


def begin_once(processor: Any, text: str) -> dict[str, bool]:
    """Argument of a processor's call that keeps the tokenizer from adding a first token that the text holds already."""
    first = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    return {"add_special_tokens": False} if first and text.startswith(first) else {}


def template_reads(processor: Any, variable: str) -> bool:
    """Whether a processor has a chat template that names a variable."""
    return variable in str(getattr(processor, "chat_template", ""))


def chat(processor: Any, question: str, images: int) -> str:
    """One user turn in the processor's chat template, the images first, to be answered without thinking first.

    Templates of models that can do either read ``enable_thinking``; with others transformers warns of it.

    Raises:
        ValueError: the template fails.
    """
    turn = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
    quiet = {"enable_thinking": False} if template_reads(processor, "enable_thinking") else {}
    try:
        return processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True, **quiet)
    except Exception as error:  # a program of its own, which can fail in any way
        raise ValueError(
            "encode: the processor's chat template must take one user turn with parts of type image and text, got "
            f"{type(error).__name__}: {error}"
        ) from error
