"""Two levels of a text, lines and sentences, as runs of tokens; and which of them get a budget of slots."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.units import split_units
from ..core.words import plain_words
from .segments import equal_lengths

SENTENCE, LINE = 0, 1
SHORT = 3  # characters of a word that is not compared


@dataclass(order=True)
class Unit:
    """A line or a sentence.

    Attributes:
        end, start: its tokens are those from ``start`` to ``end - 1``.
        level: `SENTENCE` or `LINE`; of units with one end the sentence comes first.
        text: its characters.
        kept: whether it gets a slot.
    """

    end: int
    level: int
    start: int = field(compare=False)
    text: str = field(compare=False, repr=False)
    kept: bool = field(default=False, compare=False)


def find_units(text: str, starts: Sequence[int], longest: int) -> list[Unit]:
    """Lines and sentences of a text in order of their ends; each level covers all tokens.

    Args:
        text: the text.
        starts: first character of each token.
        longest: the most tokens of a unit; longer ones are divided. A line of one sentence has no sentence.
    """
    lines, at = [0], 0
    for line in text.splitlines(keepends=True):
        if line.strip():
            lines.append(at + len(line.rstrip()))
        at += len(line)
    lines[1:] = [*lines[1:-1], len(text)]  # white space at the end belongs to the last line
    sentences = [end for _, end in split_units(text, "sentence")]
    found, ends = list[Unit](), list[int]()
    for level, characters in ((LINE, lines), (SENTENCE, sentences)):
        begin, units = 0, list[Unit]()
        for end in sorted({bisect_left(starts, character) for character in characters} - {0}):
            for length in equal_lengths(end - begin, longest):
                stop = starts[begin + length] if begin + length < len(starts) else len(text)
                units.append(Unit(begin + length, level, begin, text[starts[begin] : stop]))
                begin += length
        if level == LINE:
            ends = [unit.end for unit in units]
        else:
            several = Counter(bisect_left(ends, unit.end) for unit in units)
            units = [unit for unit in units if several[bisect_left(ends, unit.end)] > 1]
        found += units
    return sorted(found)


def keep_best(units: Sequence[Unit], query: str | None, most: int) -> None:
    """Marks at most ``most`` units: lines first, then the sentences of the best lines.

    The best ones share most words with the question; of these, or without one, they are the longest.
    """
    asked = _words(query or "")

    def best_first(some: Sequence[Unit]) -> list[Unit]:
        return sorted(some, key=lambda unit: (-len(asked & _words(unit.text)), unit.start - unit.end))

    lines = [unit for unit in units if unit.level == LINE]
    ends, inside = [line.end for line in lines], [list[Unit]() for _ in lines]
    for unit in units:
        if unit.level == SENTENCE:
            inside[bisect_left(ends, unit.end)].append(unit)
    ranked = best_first(lines)
    of = {id(line): sentences for line, sentences in zip(lines, inside)}
    for unit in [*ranked, *(unit for line in ranked for unit in best_first(of[id(line)]))][:most]:
        unit.kept = True


def _words(text: str) -> frozenset[str]:
    return frozenset(text[a:b].lower() for a, b in plain_words(text) if b - a > SHORT)
