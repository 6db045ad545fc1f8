"""What the page of ``crop app`` asks and shows; ``page.py`` is the page."""

from __future__ import annotations

import threading
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from crop.cli.ask import STAGES, Answer, Asker
from crop.cli.images import open_image
from crop.cli.options import SECOND_MODELS, UsageError, parse_region
from crop.cli.output import speed, where
from crop.cli.visualize import overlay
from crop.localizers.base import Localizer
from crop.localizers.pretrained import one_line
from crop.localizers.registry import localizer_names
from crop.methods.registry import by_name

if TYPE_CHECKING:
    from PIL.Image import Image

TOKENS = {
    "before": "vision tokens",
    "after_plc": "that enter the language model",
    "after_ilp": "that reach its last layer",
}
STAGE_TITLES = {"vision": "vision encoder", "prefill": "language model, prefill", "decode": "language model, decode"}


class App:
    """One model for all who open the page, one question at a time; what they chose comes with each call.

    Args:
        asker: the model.
        max_new_tokens: length of an answer at most.
    Attributes:
        localizers: name -> localizer, of those that need nothing but the model.
        missing: name -> why it is not among them, where an extra is not installed.
    """

    def __init__(self, asker: Asker, max_new_tokens: int = 32) -> None:
        self.asker, self.max_new_tokens = asker, max_new_tokens
        self.localizers: dict[str, Localizer] = {}
        self.missing: dict[str, str] = {}
        self._turn = threading.Lock()  # a model is in one block at a time, and times are of one question
        for name in localizer_names():
            if name in (*SECOND_MODELS, "box") or (name == "head" and asker.head is None):
                continue
            try:
                self.localizers[name] = asker.localizer(name)
            except ImportError as error:
                self.missing[name] = one_line(error)

    def answer(
        self, picture: str | None, question: str, localizer: str, box: str, method: str, percent: float
    ) -> tuple[str, str, Image, str]:
        """Ask with and without pruning.

        Args:
            picture: file name, None where there is none yet.
            question: plain text.
            localizer: name among ``localizers``, or "box" for ``box``, which is written as for ``parse_region``.
            method: name as for ``by_name``. percent: of the vision tokens that stay, in (0, 100].
        Returns:
            Answers with and without pruning, what the model saw, counts and times in Markdown.
        Raises:
            UsageError: no picture, no question, no box; a name, text or number that the page would not send. What the package refuses: ``REFUSED``.
        """
        if not picture:
            raise UsageError("There is no picture yet: drop one, or click on an example.")
        words = {"picture": picture, "question": question, "localizer": localizer, "box": box, "method": method}
        for name, value in words.items():  # calls from outside of the page bring anything
            if not isinstance(value, str):
                raise UsageError(f"{name} must be a text, got {value!r}")
        if isinstance(percent, bool) or not isinstance(percent, Real):
            raise UsageError(f"percent must be a number in (0, 100], got {percent!r}")
        known = (*self.localizers, "box")
        if localizer not in known:
            raise UsageError(f"localizer must be one of {', '.join(known)}, got {localizer!r}")
        if not question.strip():
            raise UsageError("There is no question yet: type one.")
        if localizer == "box" and not box.strip():
            raise UsageError("There is no box yet: drag one on the picture, or choose who finds the region.")
        try:
            image = open_image(picture, Path(picture).name)
        except (OSError, ValueError) as error:
            raise UsageError(f"The file {one_line(error).removeprefix('open_image: source ')}") from error
        if localizer == "box":
            find = self.asker.localizer("box", parse_region([box.strip()], image.size, "box"))
        else:
            find = self.localizers[localizer]
        prune = by_name(method, percent / 100, self.asker.num_layers)
        length = self.max_new_tokens
        with self._turn:
            pruned, plain = self.asker.compare(image, question, method=prune, localizer=find, max_new_tokens=length)
        return pruned.text, plain.text, overlay(image, *pruned.images[0].drawing), numbers(pruned, plain, localizer)


def numbers(pruned: Answer, plain: Answer, localizer: str) -> str:
    """Counts, times and the region, in Markdown."""
    both = pruned, plain
    rows = [("", "pruned", "unpruned"), ("---", "--:", "--:")]
    rows += [(title, *(str(getattr(answer.tokens, name)) for answer in both)) for name, title in TOKENS.items()]
    for stage in STAGES:
        times = [f"{1000 * answer.seconds[stage]:.1f} ms" for answer in both]
        rows.append((STAGE_TITLES.get(stage, stage), *times))
    rows[-1] = tuple(f"**{cell}**" for cell in rows[-1])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    because = f": {pruned.region.reason}" if pruned.region.reason else ""
    return f"{table}\n\n{speed(pruned, plain)}\n\nregion {where(pruned.region, localizer)}{because}"
