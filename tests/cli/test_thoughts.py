"""Thoughts and answers among generated ids, whichever marks a model has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from crop.cli.thoughts import split_thoughts

pytestmark = pytest.mark.fast
QWEN, GEMMA = {"<think>": 8, "</think>": 9}, {"<|channel>": 8, "<channel|>": 9}


@pytest.mark.parametrize("marks,ids,begun,found", [
    (QWEN, "one two", False, ("", "one two")),
    (QWEN, "8 one 9 two", False, ("one", "two")),
    (QWEN, "one 9 two", True, ("one", "two")),  # the prompt opened it
    (QWEN, "8 one", False, ("<think>one", None)),
    (QWEN, "one", True, ("one", None)),
    (QWEN, "8 9 two", False, ("", "two")),
    (GEMMA, "8 one 9 two", False, ("one", "two")),  # marks that decoding drops
    (GEMMA, "8 one", False, ("one", None)),
    ({}, "<think> one </think> two", False, ("one", "two")),  # spelled out
])  # fmt: skip
def test_thoughts_end_where_their_mark_stands(marks, ids, begun, found):
    names = {8: "<think>", 9: "</think>"} if marks is QWEN else {}
    words = [int(word) if word.isdecimal() else word for word in ids.split()]
    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(get_added_vocab=lambda: marks),
        decode=lambda part, skip_special_tokens: " ".join(
            names.get(word, "") if isinstance(word, int) else word for word in part
        ).strip(),
    )
    thoughts, answer = split_thoughts(processor, words, begun)
    assert (thoughts.replace("> ", ">"), answer) == found
