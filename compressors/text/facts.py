"""Checks a written text against its source: numbers and names that the source lacks were invented."""

from __future__ import annotations

import re

from ..core.units import split_units

_FACT = re.compile(r"\w*\d\w*|(?<![.!?]\s)(?<!^)\b[A-Z]\w+")  # numbers, and capitalised words inside a sentence
_WORD = re.compile(r"\w+")


def supported(short: str, source: str) -> str:
    """The sentences of a short version whose numbers and names all occur in the source."""
    said = set(_WORD.findall(source.casefold()))
    sentences = [short[a:b].strip() for a, b in split_units(short, "sentence")]
    return " ".join(s for s in sentences if all(fact.casefold() in said for fact in _FACT.findall(s)))
