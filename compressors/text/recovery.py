"""Puts the source's words back into an answer that was read from a shorter text (LongLLMLingua, section 4.4)."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence

from ..core.passage import CompressedPassage
from ..core.textfiles import check_strings
from ..core.units import Span, split_units

_WORD = re.compile(r"\w+")
_MORE = 3  # words that a fragment may gain beside as many as it has


def recover(answer: str, texts: Sequence[str], passages: Sequence[CompressedPassage]) -> str:
    """Replaces fragments of an answer that the compression made by the source's words.

    "Treaty Westphalia" becomes "Treaty of Westphalia", and the half of a number the whole number. A fragment is the longest
    run of words that a shorter text has, of two words or one with a digit or a capital. It is replaced by the source's
    text from its first to its last word (LongLLMLingua, arXiv 2310.06839, section 4.4).

    Unlike the paper the place in the source is known from ``spans``, and a fragment stays as it is if a source has it
    verbatim, if its places in the source differ, if they lie in more than one sentence, or if it would gain more words than it
    has, and three.

    Args:
        answer: the answer.
        texts: the source texts.
        passages: one per text, compressed to text; those without ``spans`` are left out.

    Raises:
        TypeError: if ``texts`` is one string, or a passage is not text.
        ValueError: if there are not as many passages as texts.
    """
    texts = check_strings("texts", texts, "source texts")
    if len(texts) != len(passages):
        raise ValueError(f"recover needs one passage per text: got {len(passages)} for {len(texts)} texts.")
    if other := [passage.interface for passage in passages if passage.interface != "text"]:
        raise TypeError(f"recover needs passages compressed to text, got one compressed to {other[0]}.")
    sources = [
        _Source(text, passage.text or "", passage.spans) for text, passage in zip(texts, passages) if passage.spans
    ]
    words = list(_WORD.finditer(answer))
    keys = [word.group().casefold() for word in words]
    out, done, i = [], 0, 0
    while i < len(words):
        places = [(source, *place) for source in sources for place in source.find(keys, i)]
        length = max((n for _, _, n in places), default=0)
        if length:
            start, end = words[i].start(), words[i + length - 1].end()
            old = answer[start:end]
            telling = length > 1 or any(c.isdigit() or c.isupper() for c in old)
            new = {source.original(at, n) for source, at, n in places if n == length} if telling else set()
            if len(new) == 1 and not any(source.says(old) for source in sources) and (found := new.pop()):
                out += [answer[done:start], found]
                done = end
        i += max(length, 1)
    return "".join([*out, answer[done:]])


class _Source:
    """One text, its shorter form, and where each word of that comes from."""

    def __init__(self, text: str, shorter: str, spans: Sequence[Span]) -> None:
        self.text = text
        self.words = [word.span() for word in _WORD.finditer(text)]
        self.starts, self.ends = [a for a, _ in self.words], [b for _, b in self.words]
        self.sentences = [a for a, _ in split_units(text, "sentence")]
        self.keys: list[str] = []
        self.origins: list[Span] = []  # characters of the text
        starts, shift, end = [], [], 0  # of the spans in the shorter form
        for a, b in spans:
            start = shorter.find(text[a:b], end)
            if start < 0:
                continue
            starts.append(start)
            shift.append(a - start)
            end = start + b - a
        for word in _WORD.finditer(shorter):
            first, last = bisect_right(starts, word.start()) - 1, bisect_right(starts, word.end() - 1) - 1
            if first >= 0:
                self.keys.append(word.group().casefold())
                self.origins.append((word.start() + shift[first], word.end() + shift[last]))
        self.places: dict[str, list[int]] = defaultdict(list)
        for i, key in enumerate(self.keys):
            self.places[key].append(i)

    def find(self, keys: Sequence[str], i: int) -> list[tuple[int, int]]:
        """Where the longest run of words from ``keys[i]`` on is in the shorter form, and how many words it has."""
        found = []
        for at in self.places.get(keys[i], ()):
            n = 1
            while i + n < len(keys) and at + n < len(self.keys) and self.keys[at + n] == keys[i + n]:
                n += 1
            found.append((at, n))
        longest = max((n for _, n in found), default=0)
        return [(at, n) for at, n in found if n == longest]

    def says(self, fragment: str) -> bool:
        """Whether the text has a fragment, between the borders of words."""
        return re.search(rf"(?<!\w){re.escape(fragment)}(?!\w)", self.text, re.I) is not None

    def original(self, at: int, n: int) -> str | None:
        """The source's text around ``n`` words of the shorter form, in whole words; ``None`` if it is too long."""
        first = bisect_right(self.ends, self.origins[at][0])
        last = bisect_left(self.starts, self.origins[at + n - 1][1]) - 1
        start, end = self.words[first][0], self.words[last][1]
        sentence = bisect_right(self.sentences, start) == bisect_right(self.sentences, end - 1)
        return self.text[start:end] if sentence and last - first + 1 <= 2 * n + _MORE else None
