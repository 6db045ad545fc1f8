"""What a benchmark asks, as the model and the localizers see it: chat messages in, prompts out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crop.cli.ask import Asker
from crop.cli.images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

# How a line begins with which benchmarks say in what form to answer.
FORM = re.compile(
    r"(please )?answer (the|this|with|in|using|directly|briefly)\b|(please )?only give\b|your response must\b|"
    r"provide a short\b|think step by step\b",
    re.IGNORECASE,
)

Messages = Sequence[
    dict[str, Any]
]  # {"role": ..., "content": [{"type": "text", "text": ...} or {"type": "image", "url": ...}]}


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation that waits for an answer.

    Args:
        text: all of it, after the chat template, up to where the answer begins.
        images: RGB, in the order of the text.
        question: what the last turn of the user asks, for localizers.
    """

    text: str
    images: list[Image]
    question: str


def read_messages(asker: Asker, messages: Messages, source: str, **template: Any) -> Prompt:
    """Messages as a prompt; pictures are opened like everywhere (``open_image``).

    Args:
        asker: the model that will answer.
        messages: as the tasks of lmms-eval make them. Placeholders inside a text, "<image>" and the processor's own, are
            left out: pictures stand where their parts stand.
        source: what errors call the messages.
        template: variables of the chat template, e.g. ``enable_thinking``.
    Raises:
        ValueError: a part that is neither text nor image; a conversation that the model has no template for.
    """
    turns, images, said = [], [], ""
    for message in messages:
        content = message["content"]
        given = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [_read_part(part, asker.processor, images, source) for part in given]
        turns.append({"role": message["role"], "content": parts})
        if message["role"] == "user":
            said = "\n".join(part["text"] for part in parts if part["type"] == "text")
    if asker.prompt is None:
        try:
            text = asker.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **template)
        except Exception as error:  # a program of its own, which can fail in any way
            raise ValueError(
                f"crop: the processor's chat template must take the messages of {source}, got {type(error).__name__}: {error}"
            ) from error
    elif len(turns) == len(images) == 1:
        text = asker.prompt(said)
    else:
        raise ValueError(
            "crop: messages must be one question about one image for a model with a prompt of its own, got "
            f"{len(turns)} turns with {len(images)} images in {source}"
        )
    return Prompt(text, images, what_is_asked(said))


def _read_part(part: dict[str, Any], processor: Any, images: list[Image], source: str) -> dict[str, str]:
    """A part as chat templates take it; a picture is added to ``images``."""
    if part["type"] == "image":
        images.append(open_image(part["url"]))
        return {"type": "image"}
    if part["type"] != "text":
        raise ValueError(
            f"crop: messages must be made of text and images, got {part['type']} in {source}; leave the task out, "
            "or run it with another model of lmms-eval"
        )
    text = part["text"].replace("<image>", "")
    placeholder = getattr(processor, "image_token", None)
    return {"type": "text", "text": text.replace(placeholder, "") if placeholder else text}


def what_is_asked(text: str) -> str:
    """A text without the lines at its end that say in what form to answer: they show no part of an image."""
    lines = text.strip().splitlines()
    while len(lines) > 1 and (not lines[-1].strip() or FORM.match(lines[-1].strip())):
        lines.pop()
    return "\n".join(lines)


def user_turn(visuals: Sequence[Any] | None, text: str) -> Messages:
    """What the older tasks of lmms-eval ask, as messages: visuals (pictures, files), then a text."""
    parts: list[dict[str, Any]] = []
    for visual in visuals or ():
        if hasattr(visual, "convert") or (isinstance(visual, str) and Path(visual).suffix.lower() in IMAGE_FILES):
            parts.append({"type": "image", "url": visual})
        else:
            kind = visual.get("type", "audio") if isinstance(visual, dict) else "video"
            parts.append({"type": kind, "url": visual})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def chat_arguments(arguments: tuple) -> tuple:
    """Arguments of a request of the "simple" kind, as those of the "chat" kind.

    Args:
        arguments: (context, options, doc_to_visual, document, task, split); with several rounds doc_to_text stands before
            the document.
    Returns:
        (context, doc_to_messages, options, document, task, split); ``doc_to_messages`` follows the rounds as lmms-eval's own.
    """
    context, options, to_visual, *to_text, document, task, split = arguments

    def to_messages(doc: Any, *, round_idx: int | None = None, **earlier: Any) -> Any:
        if round_idx is None:
            return user_turn(to_visual(doc) if to_visual else None, context)
        payload = to_text[0](doc, round_idx=round_idx, **earlier)
        if not isinstance(payload, tuple):
            return user_turn(None, payload), False, None, None
        visuals, text, ends, outputs, info = payload
        return None if ends else user_turn(visuals, text), ends, outputs, info

    return context, to_messages, options, document, task, split


def next_round(
    to_messages: Callable[..., Any], doc: Any, number: int, answers: list[str], info: Any
) -> tuple[Messages | None, list[str], Any]:
    """What a task with several rounds asks next.

    Args:
        to_messages: the request's ``doc_to_messages``. doc: the document. number: of the round, from 0. answers: so far.
            info: what the task noted in the last round.
    Returns:
        Messages (None: there is no further round), the answers, which a task may rewrite, and its new note.
    """
    if number == 0:
        return to_messages(doc), answers, info
    payload = to_messages(doc, round_idx=number, previous_output=list(answers), previous_round_info=info)
    if not (isinstance(payload, tuple) and len(payload) == 4):
        return None, answers, info
    messages, ends, outputs, info = payload
    return None if ends else messages, answers if outputs is None else list(outputs), info


def cut_answer(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first of the strings that end it."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text.strip()
