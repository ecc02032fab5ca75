"""What training does with rule-made questions; the rules themselves are in `nutgraf.compressors.fidelity.questions`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...compressors.fidelity.questions import (
    AUX,
    COMMON,
    DATE,
    NAME,
    NUMBER,
    STOP,
    Span,
    find_spans,
    make_question,
    make_questions,
    sentences,
    word_set,
)

__all__ = [
    "AUX",
    "STOP",
    "Span",
    "answer_kind",
    "find_spans",
    "make_question",
    "make_questions",
    "rename",
    "sentences",
    "word_set",
]


def answer_kind(answer: str) -> str:
    """The kind of an answer string, as `find_spans` names kinds; `thing` when nothing more can be said."""
    if DATE.fullmatch(answer):
        return "date"
    if NUMBER.fullmatch(answer):
        return "number"
    return "name" if NAME.fullmatch(answer) and answer not in COMMON else "thing"


def rename(texts: Sequence[str], old: str, new: str) -> list[str]:
    """Put `new` for `old` in every text, whole words only: the entity-swapped variant of a passage and its questions."""
    pattern = re.compile(rf"(?<!\w){re.escape(old)}(?!\w)")
    return [pattern.sub(lambda _: new, text) for text in texts]
