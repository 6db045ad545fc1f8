"""Where a model that thinks before it answers begins to answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

THINK, THOUGHT = "<think>", "</think>"
MARKS = {THINK: THOUGHT, "<|channel>": "<channel|>"}  # around a thought: Qwen, GLM, Kimi; Gemma 4


def split_thoughts(processor: Any, ids: Sequence[int], begun: bool = False) -> tuple[str, str | None]:
    """The thoughts and the answer among generated ids, decoded without special tokens and the marks between the two.

    Args:
        processor: of the model.
        ids: generated.
        begun: whether the prompt opened a thought already.
    Returns:
        (thoughts, answer): "" without thoughts; None where they did not end, and the thoughts are then as they were written.
    """

    def decode(part: Sequence[int]) -> str:
        return processor.decode(part, skip_special_tokens=True)

    known = processor.tokenizer.get_added_vocab()
    ends = {known[mark] for mark in MARKS.values() if mark in known}
    last = max((place for place, token in enumerate(ids) if token in ends), default=None)
    if last is not None:  # by ids: the text has lost the marks that are special tokens
        thoughts, answer = decode(ids[:last]), decode(ids[last + 1 :])
    else:
        text = decode(ids)
        thoughts, end, answer = text.rpartition(THOUGHT)  # a model without a token for it spells it out
        if not end:
            begun = begun or THINK in text or any(known.get(mark) in ids for mark in MARKS)
            return (text, None) if begun else ("", text)
    return thoughts.strip().removeprefix(THINK).strip(), answer.strip()
